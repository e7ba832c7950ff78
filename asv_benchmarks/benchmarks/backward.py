"""Backward; the forward that it needs is part of the setup."""

from typing import Any

from . import by


class _Backward:
    runner: Any

    def setup(self, *params: Any) -> None:
        super().setup(*params)
        self.runner.train()


class Images(_Backward, by.Images):
    """By shape."""

    time_backward = by.timed("Backward, images, by shape", "backward")


class Rows(_Backward, by.Rows):
    """By shape."""

    time_backward = by.timed("Backward, rows, by shape", "backward")


class Layouts(_Backward, by.Layouts):
    """By layout."""

    time_backward = by.timed("Backward, channels first and last", "backward")


class Dtypes(_Backward, by.Dtypes):
    """By dtype."""

    time_backward = by.timed("Backward, by dtype", "backward")


class Fused(_Backward, by.Fused):
    """By what follows the norm."""

    time_backward = by.timed("Backward, norm, residual and activation", "backward")


class Threads(_Backward, by.Threads):
    """By threads."""

    time_backward = by.timed("Backward, by number of threads", "backward")


class Memory(_Backward, by.Memory):
    """By what is written to."""

    time_backward = by.timed("Backward, into out= and fresh memory", "backward")
