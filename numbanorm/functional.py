"""Every method as functions of arrays, without state; ``import numbanorm.functional as F``.

Each method has three functions: ``batch_norm(...)`` returns y, ``batch_norm_forward(...)``
returns y and what backward needs, ``batch_norm_backward(dy, saved)`` returns the gradients.
They all are one thing, :func:`normalize`: a :class:`~numbanorm._axes.Geometry` says over which
axes, kernels take the moments of the smallest pieces of x, algebra on small arrays makes of them
one multiplier and one offset for each piece, and a second kernel applies those.
"""

import math
import numbers
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.special import softmax

from numbanorm import _kernels, _threads
from numbanorm._axes import (
    TASKS,
    Array,
    Axes,
    Geometry,
    Plan,
    axis_tuple,
    geometry,
    memory_order,
    normalize_axes,
)
from numbanorm.moments import Grids, Moments, bool_mask, float_array, merge, piece_moments

__all__ = [
    "Gradients",
    "SwitchableGradients",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "switchable_norm",
    "switchable_norm_backward",
    "switchable_norm_forward",
]

Float64 = NDArray[np.float64]

STATISTICS = ("in", "ln", "bn", "gn")


class Gradients(NamedTuple):
    """Gradients of the loss; None where there is no such parameter."""

    dx: Array
    dweight: Array | None
    dbias: Array | None


class SwitchableGradients(NamedTuple):
    """Gradients of the loss; None where there is no such parameter."""

    dx: Array
    dweight: Array | None
    dbias: Array | None
    dmean_weight: Array
    dvar_weight: Array


class Statistic(NamedTuple):
    """One mean and variance, as grids; ``n`` elements each, None where they do not come from x."""

    axes: Axes
    n: NDArray[np.int64] | None
    mean: Float64
    var: Float64


class Mixture(NamedTuple):
    """Softmax weights of the statistics' means and variances."""

    mean: Float64
    var: Float64


class Saved:
    """What backward needs of one forward; opaque to users."""

    geometry: Geometry
    plan: Plan
    shape: tuple[int, ...]  # of x, before an axis was split into groups
    x: Array  # views, in the plan's order
    mask: Array | None
    x_is_lost: bool
    center: bool
    eps: float
    statistics: list[Statistic]
    weight: Array | None  # a grid for pieces, (D,) for elements
    has_weight: bool
    has_bias: bool
    rows: tuple[NDArray[np.int64], Float64, Float64]  # elements: count, mean, var of each row
    mean: Float64  # pieces: what normalises, as grids
    rstd: Float64
    var: Float64
    mixture: Mixture | None
    instances: Moments | None  # where their sample variances are mixed

    @property
    def batch(self) -> Statistic:
        """The statistic that has running averages."""
        return self.statistics[self.geometry.tracked]


# ---------------------------------------------------------------------------------------------
# The one forward and the one backward
# ---------------------------------------------------------------------------------------------


@np.errstate(all="ignore")  # NaN and Inf are the user's; they reach y as they should
def normalize(
    x: Array,
    geometry: Geometry,
    weight: Array | None,
    bias: Array | None,
    eps: float | None,
    *,
    fixed: tuple[Array, Array] | None = None,
    mixture: Mixture | None = None,
    center: bool = True,
    sample_variance: bool = False,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Normalise x; return y and what backward needs.

    Parameters
    ----------
    x : array of float32 or float64
        As :func:`~numbanorm.moments.float_array` returns it.
    geometry : Geometry
        Made for the shape of x.
    weight, bias : array, optional
        Of shape ``geometry.param_shape``.
    eps : float or None
        Added to the variance; None means the machine epsilon of x's type.
    fixed : (mean, var), optional
        Running statistics, which take the place of the tracked statistic.
    mixture : Mixture, optional
        Needed where the geometry has several statistics.
    center : bool
        Whether the mean is subtracted; if not, the variance is the mean square.
    sample_variance : bool
        Whether the variance of an instance is divided by n - 1 instead of n.
    mask, out : array, optional
        True where an element counts; where y is written.
    """
    counts = bool_mask(mask, x.shape)
    y = _output(out, x, x)
    saved = Saved()
    saved.geometry, saved.shape, saved.center = geometry, x.shape, center
    saved.eps = float(np.finfo(x.dtype).eps) if eps is None else eps
    saved.x_is_lost = _same_memory(x, y)
    saved.has_weight, saved.has_bias = weight is not None, bias is not None
    saved.mixture = mixture
    # y gives the order in memory; x is copied if its own differs.
    y_split = y.reshape(geometry.shape)
    x_split = x.reshape(geometry.shape)
    order = memory_order(y_split) or memory_order(x_split) or tuple(range(x_split.ndim))
    plan = saved.plan = geometry.plan(order, weight is not None or bias is not None)
    saved.x = plan.to_view(x_split)
    saved.mask = None if counts is None else plan.to_view(counts.reshape(geometry.shape))
    target, unset = plan.to_target(y_split)
    known: Known = None
    if fixed is not None:
        mean, var = (np.asarray(a, np.float64).reshape(geometry.running_grid) for a in fixed)
        known = mean, var
    if plan.elements:
        _forward_elements(saved, weight, bias, known, target)
    else:
        _forward_pieces(saved, weight, bias, known, sample_variance, target)
    if unset is not None:
        unset[...] = target.reshape(unset.shape)
    return y, saved


Known = tuple[Float64, Float64] | None


def _forward_elements(
    saved: Saved, weight: Array | None, bias: Array | None, fixed: Known, y: Array
) -> None:
    plan, m = saved.plan, saved.plan.view[0]
    saved.weight = _element_parameter(saved, weight, 1.0, y.dtype)
    if fixed is None:
        saved.rows = np.empty(m, np.int64), np.empty(m), np.empty(m)
    else:
        mean, var = fixed
        saved.rows = np.ones(m, np.int64), plan.from_grid(mean), plan.from_grid(var)
    _threads.run(
        _kernels.forward_elements, y.size,
        saved.x, saved.mask, saved.weight, _element_parameter(saved, bias, 0.0, y.dtype),
        saved.eps, saved.center, fixed is None, plan.tiles.block, np.may_share_memory(saved.x, y),
        *saved.rows, y,
    )  # fmt: skip
    axes = saved.geometry.reductions[0]
    count, mean, var = (plan.to_grid(row) for row in saved.rows)
    saved.statistics = [Statistic(axes, count if fixed is None else None, mean, var)]


def _element_parameter(saved: Saved, value: Array | None, default: float, dtype: Any) -> Array:
    """Return a parameter (or its default) for each element of a row."""
    d = saved.plan.view[1]
    if value is None:
        return np.full(d, default, dtype)
    grid = value.reshape(saved.geometry.param_grid).transpose(saved.plan.order)
    return np.array(grid, dtype, order="C").reshape(d)


def _forward_pieces(
    saved: Saved,
    weight: Array | None,
    bias: Array | None,
    fixed: Known,
    sample_variance: bool,
    y: Array,
) -> None:
    geometry, plan = saved.geometry, saved.plan
    pieces: Grids | None = None
    if fixed is None or len(geometry.reductions) > 1:
        pieces = piece_moments(plan, saved.x, saved.mask)
    saved.instances = None
    if sample_variance and pieces is not None:
        count, mean, m2 = pieces
        saved.instances = Moments(count, mean, m2)
        pieces = count, mean, m2 * (count / np.maximum(count - 1, 1))
    saved.statistics = []
    for k, axes in enumerate(geometry.reductions):
        if fixed is not None and k == geometry.tracked:
            saved.statistics.append(Statistic(axes, None, *fixed))
            continue
        assert pieces is not None
        count, mean, m2 = merge(pieces, axes)
        var = m2 / np.maximum(count, 1)
        if not saved.center:
            var += mean * mean
            mean = np.zeros_like(mean)
        saved.statistics.append(Statistic(axes, count, mean, var))
    saved.mean, saved.var = _mix(saved.statistics, saved.mixture)
    saved.rstd = _rstd(saved)
    saved.weight = None if weight is None else _grid(weight, geometry)
    scale = saved.rstd if saved.weight is None else saved.rstd * saved.weight
    rounded = saved.mean.astype(y.dtype)
    shift = (rounded - saved.mean) * scale
    if bias is not None:
        shift = shift + _grid(bias, geometry)
    _apply(plan, saved.x, rounded, scale, shift, y)


def _grid(parameter: Array, geometry: Geometry) -> Float64:
    """Return a copy of a parameter, which may change before backward, as it broadcasts to x."""
    return np.array(parameter, np.float64).reshape(geometry.param_grid)


def _mix(statistics: list[Statistic], mixture: Mixture | None) -> tuple[Float64, Float64]:
    """Return the weighted means and variances; exact where the statistics are equal."""
    first = statistics[0]
    mean, var = first.mean, first.var
    if mixture is not None:
        # Softmax weights need not sum to 1 in floating point: mix the differences.
        for p, q, statistic in zip(*mixture, statistics, strict=True):
            mean = mean + p * (statistic.mean - first.mean)
            var = var + q * (statistic.var - first.var)
    return mean, var


def _rstd(saved: Saved) -> Float64:
    """Return 1 / sqrt(var + eps), and 0 for an empty group or where var + eps is 0."""
    v = saved.var + saved.eps
    known: Any = v != 0
    if saved.mask is not None and all(s.n is not None for s in saved.statistics):
        known = known & (sum(s.n for s in saved.statistics if s.n is not None) > 0)
    rstd: Float64 = np.divide(1.0, np.sqrt(v), out=np.zeros_like(v), where=known)
    return rstd


def _apply(plan: Plan, x: Array, m: Array, s: Array, t: Array, y: Array) -> None:
    """Write y = (x - m) * s + t, with grids m, s and t."""
    kernel = _kernels.apply_columns if plan.columns else _kernels.apply_rows
    _, part, block = plan.tiles
    coefficients = (plan.from_grid(values, y.dtype) for values in (m, s, t))
    in_place = np.may_share_memory(x, y)
    _threads.run(kernel, y.size, x, part, block, *coefficients, in_place, y)


@np.errstate(all="ignore")
def backward(
    dy: ArrayLike, saved: Saved, out: Array | None = None
) -> tuple[Array, Float64 | None, Float64 | None, Float64, Float64]:
    """Return dx and the gradients of weight, bias and of both kinds of logits, in float64."""
    if saved.x_is_lost:
        raise RuntimeError(
            "backward: forward wrote y over x (out=x), so x is gone; "
            "call forward with another out, or without"
        )
    gradient = float_array(dy, "dy")
    if gradient.shape != saved.shape:
        raise ValueError(f"dy: the shape of x, {saved.shape}, is needed, got {gradient.shape}")
    gradient = gradient.astype(saved.x.dtype, copy=False)
    dx = _output(out, gradient, gradient, saved.x)
    plan, shape = saved.plan, saved.geometry.shape
    dy_view = plan.to_view(gradient.reshape(shape))
    target, unset = plan.to_target(dx.reshape(shape))
    differentiate = _backward_elements if plan.elements else _backward_pieces
    parameters = differentiate(saved, dy_view, target)
    if unset is not None:
        unset[...] = target.reshape(unset.shape)
    return dx, *parameters


Parameters = tuple[Float64 | None, Float64 | None, Float64, Float64]


def _backward_elements(saved: Saved, dy: Array, dx: Array) -> Parameters:
    plan, geometry = saved.plan, saved.geometry
    affine = saved.has_weight or saved.has_bias
    dweight, dbias = np.zeros((2, *(plan.gradient_parts if affine else (TASKS, 0))))
    live = saved.statistics[0].n is not None
    _threads.run(
        _kernels.backward_elements, dy.size,
        dy, saved.x, saved.mask, saved.weight, saved.eps, saved.center, live, affine,
        np.may_share_memory(dy, dx), *saved.rows, dx, dweight, dbias,
    )  # fmt: skip

    def unfold(blocks: Array) -> Array:
        total: Array = blocks.sum(0)
        in_memory = total.reshape([geometry.param_grid[axis] for axis in plan.order])
        return in_memory.transpose(plan.inverse_order).reshape(geometry.param_shape)

    return (
        unfold(dweight) if saved.has_weight else None,
        unfold(dbias) if saved.has_bias else None,
        np.zeros(1),
        np.zeros(1),
    )


def _gradient_sums(saved: Saved, dy: Array) -> tuple[Float64, Float64]:
    """Return the sums of dy and of dy * (x - mean) over each piece, as grids."""
    plan = saved.plan
    kernel = _kernels.gradient_sums_columns if plan.columns else _kernels.gradient_sums_rows
    _, part, block = plan.tiles
    parts = np.empty(plan.parts), np.empty(plan.parts)
    mean = plan.from_grid(saved.mean)
    _threads.run(kernel, dy.size, dy, saved.x, saved.mask, part, block, mean, *parts)
    s0, s1 = (plan.to_grid(plan.by_part(array).sum(1)) for array in parts)
    return s0, s1


def _backward_pieces(saved: Saved, dy: Array, dx: Array) -> Parameters:
    geometry, plan = saved.geometry, saved.plan
    s0, s1 = _gradient_sums(saved, dy)
    rstd = saved.rstd
    others = tuple(a for a in range(len(geometry.shape)) if a not in geometry.features)
    dweight = (rstd * s1).sum(others).reshape(geometry.param_shape) if saved.has_weight else None
    dbias = s0.sum(others).reshape(geometry.param_shape) if saved.has_bias else None
    scale = rstd if saved.weight is None else rstd * saved.weight
    dmean, dvar = -scale * s0, -0.5 * scale * rstd * rstd * s1

    n_statistics = len(saved.statistics)
    p, q = (np.ones(1), np.ones(1)) if saved.mixture is None else saved.mixture
    dp, dq = np.zeros(n_statistics), np.zeros(n_statistics)
    rounded = saved.mean.astype(dx.dtype)
    slope, offset = np.zeros_like(rstd), np.zeros_like(rstd)
    for k, (axes, count, mean, var) in enumerate(saved.statistics):
        dp[k] = p[k] * np.sum(dmean * (mean - saved.mean))
        dq[k] = q[k] * np.sum(dvar * (var - saved.var))
        if count is None:
            continue
        n = np.maximum(count, 1)
        if saved.center:
            offset = offset + (p[k] * dmean).sum(axes, keepdims=True) / n
        dsquare = (q[k] * dvar).sum(axes, keepdims=True) * (2 / n)
        if saved.instances is None:
            slope = slope + dsquare
            offset = offset + dsquare * (rounded - mean)
        else:
            # d var_k / dx of sample variances: see Norm's SwitchableNorm.from_official.
            own = saved.instances
            factor = own.count / np.maximum(np.subtract(own.count, 1), 1)
            slope = slope + dsquare * factor
            offset = offset + dsquare * (factor * (rounded - own.mean) + (own.mean - mean))
    if all(statistic.n is None for statistic in saved.statistics):
        zero = np.zeros((1,) * len(geometry.shape))
        _apply(plan, dy, zero, scale, zero, dx)
    else:
        _apply_gradient(saved, dy, (scale, rstd, rounded, slope, offset), dx)
    return dweight, dbias, dp, dq


def _apply_gradient(saved: Saved, dy: Array, coefficients: Any, dx: Array) -> None:
    """Write dx = a * dy + r * ((x - m) * b + c), b and c being slope and offset over r."""
    plan = saved.plan
    a, r, m, slope, offset = coefficients
    known = r != 0
    zeros = np.zeros(plan.grid)
    b, c = (np.divide(v, r, out=zeros.copy(), where=known) for v in (slope, offset))
    kernel = _kernels.backward_columns if plan.columns else _kernels.backward_rows
    _, part, block = plan.tiles
    arrays = (plan.from_grid(values, dx.dtype) for values in (a, r, m, b, c))
    in_place = np.may_share_memory(dy, dx)
    _threads.run(kernel, dy.size, dy, saved.x, saved.mask, part, block, *arrays, in_place, dx)


def _same_memory(x: Array, y: Array) -> bool:
    return x.__array_interface__["data"] == y.__array_interface__["data"] and x.strides == y.strides


def _output(out: Array | None, like: Array, *inputs: Array) -> Array:
    """Return ``out``, or a new array like ``like``; ``inputs`` must not overlap it in part."""
    if out is None:
        return np.empty(like.shape, like.dtype)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: a numpy.ndarray is needed, got {type(out).__name__}")
    if out.dtype != like.dtype:
        raise TypeError(f"out: dtype {like.dtype} is needed, got {out.dtype}")
    if out.shape != like.shape:
        raise ValueError(f"out: shape {like.shape} is needed, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: an array that may be written to is needed, got a read-only one")
    if any(stride == 0 and n > 1 for stride, n in zip(out.strides, out.shape, strict=True)):
        raise ValueError(
            "out: an array with memory for each element is needed, got a broadcast one"
        )
    for x in inputs:
        if _same_memory(x, out) or not np.may_share_memory(x, out):
            continue
        try:
            overlap = np.shares_memory(x, out, max_work=10_000)  # type: ignore[arg-type] # stub: -1, 0
        except np.exceptions.TooHardError:
            overlap = True
        if overlap:
            raise ValueError(
                "out: the input itself or memory of its own is needed, got a partial overlap"
            )
    return out


# ---------------------------------------------------------------------------------------------
# Checks and running statistics, shared with the layers
# ---------------------------------------------------------------------------------------------


def check_eps(eps: float) -> float:
    """Return eps as a float; it must be finite and not negative."""
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"eps: a number is needed, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: a finite number of at least 0 is needed, got {eps!r}")
    return float(eps)


def check_momentum(momentum: float | None) -> float | None:
    """Return momentum as a float, or None; it must be from 0 to 1."""
    if momentum is None:
        return None
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
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


def check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the type of parameters; float32 or float64."""
    found = np.dtype(dtype)
    if found not in (np.float32, np.float64):
        raise TypeError(f"dtype: float32 or float64 is needed, got {found}")
    return found


def parameter(value: ArrayLike | None, name: str, shape: tuple[int, ...]) -> Array | None:
    """Return a parameter as a float array of this shape, or None."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: an array of float32 or float64 is needed, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name}: shape {shape} is needed for this x, got {array.shape}")
    return array


def check_channel_axis(axis: int) -> int:
    """Return a channel axis as an int; axis 0 is the batch."""
    (found,) = axis_tuple((axis,), "axis")
    if found == 0:
        raise ValueError("axis: axis 0 is the batch, so that 1 or -1 would do, got 0")
    return found


def channel_axis(x: Array, axis: int) -> int:
    """Return the channel axis of x as a number from 1 on."""
    if x.ndim < 2:
        raise ValueError(f"x: a batch axis and a channel axis are needed, got shape {x.shape}")
    (channel,) = normalize_axes(check_channel_axis(axis), x.ndim, "axis")
    return check_channel_axis(channel)


def trailing_geometry(x: Array, normalized_shape: tuple[int, ...]) -> Geometry:
    """Return the geometry of statistics over trailing axes of these sizes."""
    n = len(normalized_shape)
    if x.shape[max(x.ndim - n, 0) :] != normalized_shape:
        raise ValueError(
            f"x: a shape that ends in normalized_shape {normalized_shape} is needed, got {x.shape}"
        )
    axes = tuple(range(x.ndim - n, x.ndim))
    return geometry(x.shape, (axes,), axes)


def channel_geometry(
    x: Array, channel: int, over: tuple[str, ...], num_groups: int | None = None
) -> Geometry:
    """Return the geometry of the statistics in ``over`` of an x with channels."""
    everything = range(x.ndim)
    reductions = {
        "in": tuple(a for a in everything if a not in (0, channel)),
        "ln": tuple(a for a in everything if a != 0),
        "bn": tuple(a for a in everything if a != channel),
        "gn": tuple(a for a in everything if a != 0),
    }
    return geometry(
        x.shape,
        tuple(reductions[name] for name in over),
        (channel,),
        groups=num_groups or 1,
        group_axis=channel,
        grouped=tuple(name == "gn" for name in over),
        tracked=over.index("bn") if "bn" in over else 0,
    )


def require_several(geometry: Geometry) -> None:
    """Raise if a group of the tracked statistic is a single value, whose variance says nothing."""
    if geometry.group_size == 1:
        raise ValueError(
            f"x: more than one value per channel is needed in training, got shape {geometry.shape}"
        )


class Running(NamedTuple):
    """What a batch gives to running statistics, of their shape; ``known`` is False if nothing."""

    mean: Float64
    var: Float64
    known: NDArray[np.bool_]


def batch_statistics(saved: Saved) -> Running:
    """Return the batch's means and unbiased variances, averaged over axis 0 where it is kept."""
    axes, count, mean, var = saved.batch
    assert count is not None
    shape = saved.geometry.running_shape
    unbiased = var * (count / np.maximum(count - 1, 1))
    known: NDArray[np.bool_] = count > 0
    if 0 not in axes:
        n = np.maximum(known.sum(0, keepdims=True), 1)
        mean = np.where(known, mean, 0).sum(0, keepdims=True) / n
        unbiased = np.where(known, unbiased, 0).sum(0, keepdims=True) / n
        known = np.any(known, 0, keepdims=True)
    return Running(mean.reshape(shape), unbiased.reshape(shape), known.reshape(shape))


def update_running(
    running_mean: Array, running_var: Array, batch: Running, momentum: float
) -> None:
    """Move running statistics towards the batch's; ``momentum`` weights the batch."""
    for running, value in ((running_mean, batch.mean), (running_var, batch.var)):
        moved = (1 - momentum) * running + momentum * value
        np.copyto(running, moved, where=batch.known, casting="same_kind")


def _running(
    running_mean: Array | None, running_var: Array | None, shape: tuple[int, ...], writeable: bool
) -> tuple[Array, Array] | None:
    """Return both running statistics, checked, or None if there is neither."""
    if running_mean is None and running_var is None:
        return None
    checked = []
    for value, name in ((running_mean, "running_mean"), (running_var, "running_var")):
        if value is None:
            raise ValueError(f"{name}: both running statistics or neither are needed, got None")
        array = parameter(value, name, shape)
        assert array is not None
        if writeable and not (isinstance(value, np.ndarray) and value.flags.writeable):
            raise ValueError(f"{name}: an array that may be updated in place is needed")
        checked.append(array)
    return checked[0], checked[1]


def _with_running(
    x: Array,
    geometry: Geometry,
    running: tuple[Array, Array] | None,
    training: bool,
    momentum: float,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    mask: ArrayLike | None,
    out: Array | None,
    mixture: Mixture | None = None,
) -> tuple[Array, Saved]:
    """Normalise with the batch's statistics and track them, or with the running ones."""
    factor = check_momentum(momentum)
    if factor is None:
        raise ValueError("momentum: a number from 0 to 1 is needed here, got None")
    y, saved = normalize(
        x,
        geometry,
        parameter(weight, "weight", geometry.param_shape),
        parameter(bias, "bias", geometry.param_shape),
        check_eps(eps),
        fixed=None if training else running,
        mixture=mixture,
        mask=mask,
        out=out,
    )
    if training and running is not None:
        update_running(*running, batch_statistics(saved), factor)
    return y, saved


def norm_backward(dy: ArrayLike, saved: Saved, *, out: Array | None = None) -> Gradients:
    """Return the gradients of a forward with respect to x, weight and bias.

    Parameters
    ----------
    dy : array of the shape of x
        The gradient of the loss with respect to y; another float type is converted.
    saved : Saved
        The second result of the method's ``_forward``.
    out : array, optional
        Where dx is written; it may be ``dy``.

    Returns
    -------
    Gradients
        ``(dx, dweight, dbias)``, the last two in float64 and of the parameters' shape.

    Raises
    ------
    TypeError, ValueError
        If dy or out does not fit.
    RuntimeError
        If the forward wrote y over x.
    """
    return Gradients(*backward(dy, saved, out)[:3])


def batch_norm_forward(
    x: ArrayLike,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`batch_norm` and what :func:`batch_norm_backward` needs."""
    array = float_array(x, "x")
    geometry = channel_geometry(array, channel_axis(array, axis), ("bn",))
    running = _running(running_mean, running_var, geometry.running_shape, training)
    if training:
        require_several(geometry)
    elif running is None:
        raise ValueError("running_mean: running statistics are needed in evaluation, got None")
    return _with_running(array, geometry, running, training, momentum, weight, bias, eps, mask, out)


def batch_norm(
    x: ArrayLike,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each channel over the batch: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        N samples of C channels; with ``axis=-1``, (N, ..., C).
    running_mean, running_var : array (C,), optional
        Averages over batches; updated in place in training, used instead of the batch's
        statistics in evaluation. The variance is the unbiased one.
    weight, bias : array (C,), optional
        Scale and shift.
    training : bool
        Whether the batch's own statistics are used.
    momentum : float
        Weight of the new value in the running statistics.
    eps : float
        Added to the (biased) variance.
    axis : int
        The channel axis.
    mask : array of bool, optional
        Broadcasts to x; True where an element counts in the statistics.
    out : array, optional
        Where y is written; it may be ``x``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, if evaluation has no running statistics, or if training has
        a single value per channel.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.batch_norm(np.array([[1.0, 5.0], [3.0, 5.0]]), None, None, training=True, eps=0.0)
    array([[-1.,  0.],
           [ 1.,  0.]])
    """
    return batch_norm_forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps,
        axis=axis, mask=mask, out=out,
    )[0]  # fmt: skip


def instance_norm_forward(
    x: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`instance_norm` and what :func:`instance_norm_backward` needs."""
    array = float_array(x, "x")
    geometry = channel_geometry(array, channel_axis(array, axis), ("in",))
    running = _running(running_mean, running_var, geometry.running_shape, use_input_stats)
    if use_input_stats:
        require_several(geometry)
    elif running is None:
        raise ValueError("running_mean: needed where use_input_stats is False, got None")
    return _with_running(
        array, geometry, running, use_input_stats, momentum, weight, bias, eps, mask, out
    )


def instance_norm(
    x: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each channel of each sample: the statistics span neither samples nor channels.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        With ``axis=-1``, (N, ..., C).
    running_mean, running_var : array (C,), optional
        Averages over samples and batches; updated in place if ``use_input_stats``, else used.
    weight, bias : array (C,), optional
        Scale and shift.
    use_input_stats : bool
        Whether the statistics are those of x.
    momentum, eps, axis, mask, out
        As in :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or if an instance is a single value.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    return instance_norm_forward(
        x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps,
        axis=axis, mask=mask, out=out,
    )[0]  # fmt: skip


def group_norm_forward(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`group_norm` and what :func:`group_norm_backward` needs."""
    array = float_array(x, "x")
    groups = check_count(num_groups, "num_groups")
    geometry = channel_geometry(array, channel_axis(array, axis), ("gn",), groups)
    return _with_running(array, geometry, None, True, 0.0, weight, bias, eps, mask, out)


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each sample over groups of neighbouring channels.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        With ``axis=-1``, (N, ..., C).
    num_groups : int
        A divisor of C.
    weight, bias : array (C,), optional
        Scale and shift.
    eps, axis, mask, out
        As in :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Wu and He, "Group Normalization", arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    return group_norm_forward(x, num_groups, weight, bias, eps, axis=axis, mask=mask, out=out)[0]


def layer_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`layer_norm` and what :func:`layer_norm_backward` needs."""
    array = float_array(x, "x")
    geometry = trailing_geometry(array, check_shape(normalized_shape, "normalized_shape"))
    return _with_running(array, geometry, None, True, 0.0, weight, bias, eps, mask, out)


def layer_norm(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each sample over its trailing axes, with a weight for each element of them.

    Parameters
    ----------
    x : array of float32 or float64, (..., *normalized_shape)
        Any number of axes may stand before the normalised ones.
    normalized_shape : int or sequence of int
        The sizes of the trailing axes.
    weight, bias : array of shape normalized_shape, optional
        Scale and shift.
    eps, mask, out
        As in :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    return layer_norm_forward(x, normalized_shape, weight, bias, eps, mask=mask, out=out)[0]


def rms_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`rms_norm` and what :func:`rms_norm_backward` needs."""
    array = float_array(x, "x")
    geometry = trailing_geometry(array, check_shape(normalized_shape, "normalized_shape"))
    return normalize(
        array,
        geometry,
        parameter(weight, "weight", geometry.param_shape),
        None,
        None if eps is None else check_eps(eps),
        center=False,
        mask=mask,
        out=out,
    )


def rms_norm(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Divide each sample by its root mean square: y = x / sqrt(mean(x**2) + eps) * weight.

    Parameters
    ----------
    x : array of float32 or float64, (..., *normalized_shape)
        Any number of axes may stand before the normalised ones.
    normalized_shape : int or sequence of int
        The sizes of the trailing axes.
    weight : array of shape normalized_shape, optional
        Scale.
    eps : float, optional
        By default the machine epsilon of x's type, as in PyTorch.
    mask, out
        As in :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.rms_norm(np.array([[3.0, 3.0, -3.0]]), 3, eps=0.0)
    array([[ 1.,  1., -1.]])
    """
    return rms_norm_forward(x, normalized_shape, weight, eps, mask=mask, out=out)[0]


def check_over(over: Iterable[str], num_groups: int | None) -> tuple[str, ...]:
    """Return the names of the statistics; "gn" and num_groups need each other."""
    names = (over,) if isinstance(over, str) else tuple(over)
    if not names or len(set(names)) < len(names) or not set(names) <= set(STATISTICS):
        raise ValueError(f"over: one or more of {STATISTICS}, each once, are needed, got {over!r}")
    if "gn" in names and num_groups is None:
        raise ValueError("num_groups: the number of groups is needed for 'gn', got None")
    if num_groups is not None:
        if "gn" not in names:
            raise ValueError(f"num_groups: it goes with 'gn' in over, got over={names!r}")
        check_count(num_groups, "num_groups")
    return names


def mix(mean_weight: ArrayLike, var_weight: ArrayLike, n: int) -> Mixture:
    """Return the softmax weights of ``n`` statistics from their logits."""
    logits = [
        parameter(value, name, (n,))
        for value, name in ((mean_weight, "mean_weight"), (var_weight, "var_weight"))
    ]
    return Mixture(*(softmax(np.asarray(values, np.float64)) for values in logits))


def switchable_norm_forward(
    x: ArrayLike,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    over: Iterable[str] = ("in", "ln", "bn"),
    num_groups: int | None = None,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`switchable_norm` and what :func:`switchable_norm_backward` needs."""
    array = float_array(x, "x")
    names = check_over(over, num_groups)
    geometry = channel_geometry(array, channel_axis(array, axis), names, num_groups)
    running = _running(running_mean, running_var, geometry.running_shape, training)
    if running is not None and "bn" not in names:
        raise ValueError(f"running_mean: it goes with 'bn' in over, got over={names!r}")
    if running is None and "bn" in names and not training:
        raise ValueError("running_mean: 'bn' needs running statistics in evaluation, got None")
    return _with_running(
        array, geometry, running, training, momentum, weight, bias, eps, mask, out,
        mix(mean_weight, var_weight, len(names)),
    )  # fmt: skip


def switchable_norm(
    x: ArrayLike,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    over: Iterable[str] = ("in", "ln", "bn"),
    num_groups: int | None = None,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise with learned mixtures of instance, layer, batch and group statistics.

    mean = sum of softmax(mean_weight)[k] * mean_k and var = sum of softmax(var_weight)[k] * var_k
    over the statistics k; y = (x - mean) / sqrt(var + eps) * weight + bias.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        With ``axis=-1``, (N, ..., C).
    mean_weight, var_weight : array (K,)
        A logit for each statistic, in the order of ``over``.
    weight, bias : array (C,), optional
        Scale and shift.
    running_mean, running_var : array (C,), optional
        Averages of the batch statistics; updated in place in training, used in evaluation.
    training, momentum, eps, axis, mask, out
        As in :func:`batch_norm`.
    over : sequence of str
        Any choice of "in", "ln", "bn" and "gn", in any order.
    num_groups : int, optional
        The number of groups for "gn".

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Luo, Ren, Peng, Zhang, Li, "Differentiable Learning-to-Normalize via Switchable
    Normalization", arXiv:1806.10779.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> x = np.array([[[1.0, 3.0]], [[3.0, 5.0]]])
    >>> F.switchable_norm(x, [0.0, 0.0], [0.0, 0.0], over=("in", "ln"), eps=0.0)[:, 0]
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    return switchable_norm_forward(
        x, mean_weight, var_weight, weight, bias, running_mean, running_var, training, momentum,
        eps, over=over, num_groups=num_groups, axis=axis, mask=mask, out=out,
    )[0]  # fmt: skip


def switchable_norm_backward(
    dy: ArrayLike, saved: Saved, *, out: Array | None = None
) -> SwitchableGradients:
    """Return the gradients of :func:`switchable_norm_forward`.

    Parameters
    ----------
    dy, saved, out
        As in :func:`batch_norm_backward`.

    Returns
    -------
    SwitchableGradients
        ``(dx, dweight, dbias, dmean_weight, dvar_weight)``, all but dx in float64.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in :func:`batch_norm_backward`.
    """
    return SwitchableGradients(*backward(dy, saved, out))


batch_norm_backward = norm_backward
layer_norm_backward = norm_backward
instance_norm_backward = norm_backward
group_norm_backward = norm_backward
rms_norm_backward = norm_backward
