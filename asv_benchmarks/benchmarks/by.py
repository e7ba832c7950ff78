"""What is varied: a class for each, which forward.py and backward.py take their clocks to."""

from collections.abc import Callable
from typing import Any

import cases

from . import prepared

LAYERS = ("batch", "instance", "group", "switchable")
# One of each family of kernels, where the product of all would take hours.
FEW_LAYERS = ("batch", "switchable", "layer")
# The largest, the one with the shortest rows, and the smallest; compare.py has all of them.
SHAPES = ("resnet 56x56", "resnet 7x7", "small 32x32")

THEN = {"relu": ("relu", False), "residual + relu": ("relu", True), "gelu": ("gelu", False)}


def case_of(layer: str, layout: str = "first", dtype: str = "float32") -> cases.Case:
    """Return a case of middling size for any layer."""
    if layer == "layer":
        return cases.Case(layer, cases.ROWS["vit"], "last", dtype)
    shape = cases.IMAGES["resnet 28x28"]
    return cases.Case(
        layer, shape if layout == "first" else cases.channels_last(shape), layout, dtype
    )


def timed(name: str, *phases: str) -> Callable[..., None]:
    """Return a benchmark of phases of the runner, with a name for people."""

    def time(self: "Prepared", *_: Any) -> None:
        for phase in phases:
            getattr(self.runner, phase)()

    time.pretty_name = name
    return time


class Prepared:
    """A case that is ready; a call is timed on its own, since asv sets up before each."""

    # Counted up where what is measured changes; asv would take the text of the code for that.
    version = "1"
    number = 1
    rounds = 1
    repeat = (3, 30, 0.3)
    warmup_time = 0.05
    timeout = 120
    runner: cases.Runner

    def ready(self, case: cases.Case, library: str = "numbanorm", fresh: bool = False) -> None:
        """Make a case ready."""
        self.runner = prepared.runner(case, library, fresh)


class Images(Prepared):
    """Layers of images by shape: channels first, float32, all threads."""

    param_names: Any = ("layer", "shape")
    params: Any = (LAYERS, SHAPES)

    def setup(self, layer: str, shape: str, library: str = "numbanorm") -> None:
        """Make the case ready."""
        self.ready(cases.Case(layer, cases.IMAGES[shape]), library)


class Rows(Prepared):
    """Layers of rows by shape."""

    param_names: Any = ("layer", "shape")
    params: Any = (("layer", "rms"), ("bert", "narrow"))

    def setup(self, layer: str, shape: str, library: str = "numbanorm") -> None:
        """Make the case ready."""
        self.ready(cases.Case(layer, cases.ROWS[shape], "last"), library)


class Layouts(Prepared):
    """Channels first and last, resnet 28x28."""

    param_names = ("layer", "channels")
    params = (LAYERS, ("first", "last"))

    def setup(self, layer: str, channels: str) -> None:
        """Make the case ready."""
        self.ready(case_of(layer, channels))


class Dtypes(Prepared):
    """32, 64 and 16 bits, resnet 28x28 and rows of vit."""

    param_names: Any = ("layer", "dtype")
    params: Any = (FEW_LAYERS, ("float32", "float64", "bfloat16", "float16"))

    def setup(self, layer: str, dtype: str, library: str = "numbanorm") -> None:
        """Make the case ready."""
        self.ready(case_of(layer, dtype=dtype), library)


class Fused(Prepared):
    """Norm and activation, and with a residual, resnet 28x28 and rows of vit."""

    param_names: Any = ("layer", "then", "dtype")
    params: Any = (FEW_LAYERS, tuple(THEN), ("float32", "bfloat16"))

    def setup(self, layer: str, then: str, dtype: str, library: str = "numbanorm") -> None:
        """Make the case ready."""
        activation, residual = THEN[then]
        case = case_of(layer, dtype=dtype)
        self.ready(case._replace(activation=activation, residual=residual), library)


class Threads(Prepared):
    """One thread and two, resnet 28x28 and rows of vit."""

    param_names = ("layer", "threads")
    params = (FEW_LAYERS, (1, 2))

    def setup(self, layer: str, threads: int) -> None:
        """Make the case ready."""
        prepared.need("numbanorm", "set_num_threads").set_num_threads(threads)
        self.ready(case_of(layer))


class Memory(Prepared):
    """Into out= and into fresh memory, resnet 28x28 and rows of vit."""

    param_names = ("layer", "into")
    params = (FEW_LAYERS, ("out=", "fresh memory"))

    def setup(self, layer: str, into: str) -> None:
        """Make the case ready."""
        self.ready(case_of(layer), fresh=into != "out=")
