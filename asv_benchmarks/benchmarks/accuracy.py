"""Accuracy where it is hard: data of standard deviation 2 at an offset of a million."""

from typing import Any

import cases
import numpy as np
import plain
import rounding

from . import by, prepared

OFFSET = 1e6


class Offset:
    """The largest error of y, in units in the last place of float32."""

    param_names: Any = ("layer",)
    params: Any = ((*by.LAYERS, "layer", "rms"),)
    unit = "ulp"
    version = "1"
    timeout = 120

    def setup(self, layer: str, library: str = "numbanorm") -> None:
        """Compile, and compare at no offset."""
        rows = layer in ("layer", "rms")
        shape = cases.ROWS["narrow"] if rows else cases.IMAGES["small 32x32"]
        self.case = cases.Case(layer, shape, "last" if rows else "first")
        prepared.runner(self.case, library)

    def track_largest_error(self, _: str, library: str = "numbanorm") -> float:
        """Return it; around zero, a unit is that of 1. Not a number means that y has one."""
        case = self.case._replace(offset=OFFSET)
        make: dict[str, Any] = {
            "numbanorm": cases.numbanorm_runner,
            "torch": cases.torch_runner,
            "numpy": plain.runner,
        }
        runner = make[library](case)
        y = runner.array(runner.train())
        exact = plain.runner(case, "float64").train()
        ulp = np.spacing(np.maximum(np.abs(exact), 1).astype("float32"))
        return round(float((np.abs(y - exact) / ulp).max()), 1)

    track_largest_error.pretty_name = "Largest error of y around a million"


class Half:
    """The largest error of y and dx of 16 bits, in units in the last place."""

    param_names: Any = ("layer", "dtype")
    params: Any = (rounding.LAYERS, ("bfloat16", "float16"))
    unit = "ulp"
    version = "1"
    timeout = 120

    def setup(self, layer: str, dtype: str) -> None:
        """Compile, and compare at no offset."""
        prepared.runner(rounding.case_of(layer, "last", dtype, 0))

    def track_largest_error(self, layer: str, dtype: str) -> float:
        """Return it, at an offset of ten."""
        case = rounding.case_of(layer, "last", dtype, 10)
        return round(rounding.largest_error(case, cases.numbanorm_runner(case)), 3)

    track_largest_error.pretty_name = "Largest error of y and dx of 16 bits"
