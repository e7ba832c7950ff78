"""Backward; the forward that it needs is part of the setup."""

from typing import Any

from . import by


class _Backward:
    runner: Any

    def setup(self, *params: Any) -> None:
        super().setup(*params)
        self.runner.train()

    def time_backward(self, *_: Any) -> None:
        self.runner.backward()


class Images(_Backward, by.Images):
    """By shape, beside PyTorch and NumPy."""


class Rows(_Backward, by.Rows):
    """By shape, beside PyTorch and NumPy."""


class Layouts(_Backward, by.Layouts):
    """By layout."""


class Dtypes(_Backward, by.Dtypes):
    """By dtype."""


class Threads(_Backward, by.Threads):
    """By threads."""


class Memory(_Backward, by.Memory):
    """By what is written to."""
