"""Mean and variance in one pass."""

from collections.abc import Callable
from typing import Any

import cases
import numpy as np

from . import by, prepared

OVER = {"batch": (0, 2, 3), "instance": (2, 3)}


def _numbanorm(x: np.ndarray, axes: tuple[int, ...]) -> Callable[[], Any]:
    moments = prepared.need("numbanorm", "moments").moments

    def call() -> tuple[np.ndarray, np.ndarray]:
        found = moments(x, axes)
        return found.mean, found.var()

    return call


def _torch(x: np.ndarray, axes: tuple[int, ...]) -> Callable[[], Any]:
    torch = prepared.need("torch")
    tensor = torch.from_numpy(x)
    return lambda: torch.var_mean(tensor, axes, correction=0)[::-1]


def _numpy(x: np.ndarray, axes: tuple[int, ...]) -> Callable[[], Any]:
    return lambda: (x.mean(axes), x.var(axes))


MAKE = {"numbanorm": _numbanorm, "torch": _torch, "numpy": _numpy}


def timed(name: str) -> Callable[..., None]:
    """Return a benchmark of the moments that are ready, with a name for people."""

    def time(self: "_Moments", *_: Any) -> None:
        assert self.call is not None
        self.call()

    time.pretty_name = name
    return time


class _Moments(by.Prepared):
    """Moments that are ready."""

    call: Callable[[], Any] | None = None

    def ready_moments(self, case: cases.Case, axes: tuple[int, ...], library: str) -> None:
        """Make them ready, and compare them with the definition."""
        # A class has one case in a process.
        if self.call is not None:
            return
        x = case.data()[0]
        call = MAKE[library](x, axes)
        found = call()
        exact = x.astype("float64")
        for value, true in zip(found, (exact.mean(axes), exact.var(axes)), strict=True):
            np.testing.assert_allclose(value, true, rtol=1e-4)
        self.call = call


class Images(_Moments):
    """By shape and by what they are taken over."""

    param_names: Any = ("over", "shape")
    params: Any = (tuple(OVER), by.SHAPES)
    time_moments = timed("Moments of images, by shape")

    def setup(self, over: str, shape: str, library: str = "numbanorm") -> None:
        """Make the array ready."""
        self.ready_moments(cases.Case("batch", cases.IMAGES[shape]), OVER[over], library)


class Rows(_Moments):
    """Of each row, by shape."""

    param_names: Any = ("shape",)
    params: Any = (("bert", "narrow"),)
    time_moments = timed("Moments of rows, by shape")

    def setup(self, shape: str, library: str = "numbanorm") -> None:
        """Make the array ready."""
        self.ready_moments(cases.Case("layer", cases.ROWS[shape], "last"), (-1,), library)


class Kinds(_Moments):
    """By layout, dtype and threads: of each channel, resnet 28x28."""

    param_names = ("channels", "dtype", "threads")
    params = (("first", "last"), ("float32", "float64"), (1, 2))
    time_moments = timed("Moments by layout, dtype and threads")

    def setup(self, channels: str, dtype: str, threads: int) -> None:
        """Make the array ready."""
        prepared.need("numbanorm", "moments").set_num_threads(threads)
        axes = OVER["batch"] if channels == "first" else (0, 1, 2)
        self.ready_moments(by.case_of("batch", channels, dtype), axes, "numbanorm")
