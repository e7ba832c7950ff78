"""Forward in training, and in evaluation where it does something else."""

from typing import Any

from . import by


class _Train:
    runner: Any

    def time_train(self, *_: Any) -> None:
        self.runner.train()


class Images(_Train, by.Images):
    """By shape, beside PyTorch and NumPy."""


class Rows(_Train, by.Rows):
    """By shape, beside PyTorch and NumPy."""


class Layouts(_Train, by.Layouts):
    """By layout."""


class Dtypes(_Train, by.Dtypes):
    """By dtype."""


class Threads(_Train, by.Threads):
    """By threads."""


class Memory(_Train, by.Memory):
    """By what is written to."""


class Evaluation(by.Images):
    """With running statistics."""

    params = (("batch",), *by.Images.params[1:])

    def time_evaluate(self, *_: Any) -> None:
        """Time a forward in evaluation."""
        self.runner.evaluate()
