"""Forward in training, and in evaluation where it does something else."""

from . import by


class Images(by.Images):
    """By shape."""

    time_train = by.timed("Forward, images, by shape", "train")


class Rows(by.Rows):
    """By shape."""

    time_train = by.timed("Forward, rows, by shape", "train")


class Layouts(by.Layouts):
    """By layout."""

    time_train = by.timed("Forward, channels first and last", "train")


class Dtypes(by.Dtypes):
    """By dtype."""

    time_train = by.timed("Forward, by dtype", "train")


class Fused(by.Fused):
    """By what follows the norm."""

    time_train = by.timed("Forward, norm, residual and activation", "train")


class Threads(by.Threads):
    """By threads."""

    time_train = by.timed("Forward, by number of threads", "train")


class Memory(by.Memory):
    """By what is written to."""

    time_train = by.timed("Forward, into out= and fresh memory", "train")


class Evaluation(by.Images):
    """With running statistics."""

    params = (("batch",), *by.Images.params[1:])
    time_evaluate = by.timed("Evaluation, BatchNorm, by shape", "evaluate")
