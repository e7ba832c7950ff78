"""Types of arrays: those that annotations name, and how the elements of x are stored."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbanorm.kernels.access import ARITHMETIC

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Axes = tuple[int, ...]


@functools.lru_cache(maxsize=64)
def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether x may have this type: float32, float64, or a float of 16 bits.

    bfloat16 is recognised by its name: where such an array is given, somebody has imported it.
    """
    return (dtype.kind == "f" and dtype.itemsize <= 8) or dtype.name == "bfloat16"


@functools.lru_cache(maxsize=64)
def stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that the kernels see: integers for floats of 16 bits."""
    if dtype.itemsize != 2 or dtype.kind in "iu":
        return dtype
    return np.dtype(np.int16 if dtype.kind == "f" else np.uint16)


@functools.lru_cache(maxsize=64)
def arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that x of a type is calculated with."""
    found: np.dtype[Any] = np.dtype(ARITHMETIC[stored(dtype)])
    return found
