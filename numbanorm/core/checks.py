"""What arguments may be: each check returns the argument ready for use, or says what would do."""

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from numbanorm.core.geometry import axis_tuple
from numbanorm.core.types import Array, is_float
from numbanorm.kernels.activations import NAMES, Activation

NATIVE = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)
# To ask the abstract class takes as long as a small array.
REAL = float, int, numbers.Real
STATISTICS = ("in", "ln", "bn", "gn")

ActivationLike = str | tuple[str, float] | None


def as_array(value: ArrayLike, name: str) -> Array:
    """Return value as an array, or name what has no shape."""
    if value is None:
        raise TypeError(f"{name}: an array is needed, got None")
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: an array is needed; {error}") from None
    except (TypeError, RuntimeError) as error:  # as of a tensor that cannot be one
        raise TypeError(f"{name}: an array is needed; {error}") from None


def _remedy(value: ArrayLike, array: Array, name: str) -> str:
    """Return what makes floats of what was given, if anything does."""
    for method in ("toarray", "todense"):
        if hasattr(value, method):  # a sparse array is an object to NumPy
            return f"it is sparse; {name}.{method}().astype(numpy.float32) would do"
    if array.dtype.kind == "c":
        return f"layers for its parts, {name}.real and {name}.imag, would do, or abs({name})"
    try:
        np.asarray(array, np.float32)
    except (TypeError, ValueError):
        return "numbers are needed, and not all of this are"
    return f"numpy.asarray({name}, numpy.float32) would do"


def float_array(x: ArrayLike, name: str) -> Array:
    """Return x as an aligned native array of floats, or say what would do."""
    if type(x) is np.ndarray and x.dtype in NATIVE and x.flags.aligned:
        return x  # nothing is to be found out: that takes as long as a small kernel
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array was given; pass {name}.data and mask=~{name}.mask")
    array = as_array(x, name)
    if not is_float(array.dtype):
        raise TypeError(
            f"{name}: an array of float32, float64, float16 or bfloat16 is needed, "
            f"got {array.dtype}; {_remedy(x, array, name)}"
        )
    if not array.flags.aligned or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array


def bool_mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """Return mask broadcast to the shape of x."""
    if mask is None:
        return None
    array = as_array(mask, "mask")
    if array.dtype != np.bool_:
        raise TypeError(
            f"mask: an array of bool, True where an element counts, is needed, got {array.dtype}; "
            f"mask != 0 would do for numbers"
        )
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"mask: a shape that broadcasts to x, {shape}, is needed, got {array.shape}"
        ) from None


def like_x(value: ArrayLike | None, name: str, x: Array) -> Array | None:
    """Return an array of the shape of x in the type of x, or None."""
    if value is None:
        return None
    array = float_array(value, name)
    if array.shape != x.shape:
        raise ValueError(f"{name}: the shape of x, {x.shape}, is needed, got {array.shape}")
    if array.dtype != x.dtype:
        with np.errstate(over="ignore"):
            array = array.astype(x.dtype)
    return array


def others(array: Array | None) -> tuple[Array, ...]:
    """Return an array alone, or nothing for None."""
    return () if array is None else (array,)


def empty_array(like: Array) -> Array:
    """Return an array of the shape and type of another one, in C order."""
    return np.empty(like.shape, like.dtype)


def output_array(
    out: Array | None,
    like: Array,
    *inputs: Array,
    name: str = "out",
    empty: Callable[[Array], Array] = empty_array,
) -> tuple[Array, bool]:
    """Return ``out``, or an ``empty`` array like ``like``, and whether it has the memory of that.

    Neither ``like`` nor the other ``inputs`` may overlap it in part.
    """
    if out is None:
        return empty(like), False
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name}: a numpy.ndarray is needed, got {type(out).__name__}")
    if out.dtype != like.dtype:
        raise TypeError(f"{name}: dtype {like.dtype} is needed, got {out.dtype}")
    if out.shape != like.shape:
        raise ValueError(f"{name}: shape {like.shape} is needed, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError(f"{name}: an array that may be written to is needed, got a read-only one")
    if 0 in out.strides and out.size:
        if any(stride == 0 and n > 1 for stride, n in zip(out.strides, out.shape, strict=True)):
            raise ValueError(
                f"{name}: an array with memory for each element is needed, got a broadcast one"
            )
    in_place = False
    for x in (like, *inputs):
        if not np.may_share_memory(x, out):
            continue
        if x.ctypes.data == out.ctypes.data and x.strides == out.strides:
            in_place = in_place or x is like
            continue
        try:
            # NumPy's stub knows of -1 and 0 only, NumPy of any number.
            overlap = np.shares_memory(x, out, max_work=10_000)  # type: ignore[arg-type]
        except np.exceptions.TooHardError:
            overlap = True
        if overlap:
            raise ValueError(
                f"{name}: the input itself or memory of its own is needed, got a partial overlap"
            )
    return out, in_place


def check_eps(eps: float | None) -> float:
    """Return eps as a float; it must be finite and not negative."""
    if isinstance(eps, bool) or not isinstance(eps, REAL):
        raise TypeError(f"eps: a number is needed, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: a finite number of at least 0 is needed, got {eps!r}")
    return float(eps)


def check_activation(activation: ActivationLike) -> Activation | None:
    """Return what an activation is for the kernels, or None."""
    if activation is None:
        return None
    name, slope = activation, None
    if isinstance(activation, tuple) and len(activation) == 2:
        name, slope = activation
    found = NAMES.get(name) if isinstance(name, str) else None
    if found is None or (slope is not None and name != "leaky_relu"):
        names = ", ".join(map(repr, NAMES))
        raise ValueError(
            f"activation: None, {names} or ('leaky_relu', slope) is needed, got {activation!r}"
        )
    if slope is None:
        return found
    if isinstance(slope, bool) or not isinstance(slope, REAL) or not math.isfinite(slope):
        raise ValueError(f"activation: a finite number is needed for the slope, got {slope!r}")
    return found._replace(slope=float(slope))


def check_momentum(momentum: float | None) -> float | None:
    """Return momentum as a float, or None; it must be from 0 to 1."""
    if momentum is None:
        return None
    if isinstance(momentum, bool) or not isinstance(momentum, REAL):
        raise TypeError(f"momentum: a number from 0 to 1 or None is needed, got {momentum!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: a number from 0 to 1 or None is needed, got {momentum!r}")
    return float(momentum)


def check_count(value: int, name: str) -> int:
    """Return a size as an int; it must be positive."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: a positive int is needed, got {value!r}")
    if value.__index__() < 1:
        raise ValueError(f"{name}: a positive int is needed, got {value!r}")
    return value.__index__()


def check_shape(shape: int | Iterable[int], name: str) -> tuple[int, ...]:
    """Return an int or a sequence of ints as a non-empty tuple of sizes."""
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if any(isinstance(n, bool) or not hasattr(n, "__index__") for n in sizes):
        raise TypeError(f"{name}: an int or a sequence of ints is needed, got {shape!r}")
    if not sizes or any(n < 0 for n in sizes):
        raise ValueError(f"{name}: at least one size, none negative, is needed, got {shape!r}")
    return tuple(n.__index__() for n in sizes)


def check_flag(value: bool, name: str) -> bool:
    """Return True or False; a word is neither."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: True or False is needed, got {value!r}")
    return bool(value)


def check_device(device: object) -> None:
    """Raise unless it is the CPU, where all arrays are."""
    if device is not None and str(device) != "cpu":
        raise ValueError(
            f"device: None or 'cpu' is needed, as arrays are nowhere else, got {str(device)!r}"
        )


def check_dtype(dtype: DTypeLike | None) -> np.dtype[Any]:
    """Return the type of parameters; float32 or float64, where None is the first."""
    try:
        result = np.dtype(dtype)
    except TypeError:
        result = None
    if dtype is None:
        return np.dtype(np.float32)
    if result is None or result not in (np.float32, np.float64):
        raise TypeError(f"dtype: float32 or float64 is needed, got {dtype!r}")
    return result


def parameter(value: ArrayLike | None, name: str, shape: tuple[int, ...]) -> Array | None:
    """Return a parameter as a float array of this shape, or None."""
    if value is None:
        return None
    array = as_array(value, name)
    if not is_float(array.dtype):
        raise TypeError(
            f"{name}: an array of floats is needed, got {array.dtype}; "
            f"{_remedy(value, array, name)}"
        )
    if array.shape != shape:
        raise ValueError(f"{name}: shape {shape} is needed for this x, got {array.shape}")
    return array


def check_channel_axis(axis: int) -> int:
    """Return a channel axis as an int; axis 0 is the batch."""
    (channel,) = axis_tuple((axis,), "axis")
    if channel == 0:
        raise ValueError("axis: axis 0 is the batch, so that 1 or -1 would do, got 0")
    return channel


def check_over(over: Iterable[str], num_groups: int | None) -> tuple[str, ...]:
    """Return the names of the statistics; "gn" and num_groups need each other."""
    if isinstance(over, str) or not isinstance(over, Iterable):
        raise TypeError(f"over: a sequence of names out of {STATISTICS} is needed, got {over!r}")
    names = tuple(over)
    if not names or len(set(names)) < len(names) or not set(names) <= set(STATISTICS):
        raise ValueError(f"over: one or more of {STATISTICS}, each once, are needed, got {over!r}")
    if "gn" in names and num_groups is None:
        raise ValueError("num_groups: the number of groups is needed for 'gn', got None")
    if num_groups is not None:
        check_count(num_groups, "num_groups")
    return names
