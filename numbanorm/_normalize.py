"""The one forward and the one backward of all methods.

A :class:`~numbanorm._axes.Geometry` says over which axes. A first kernel takes the moments of
the smallest pieces of x; algebra on small arrays merges them into the statistics, mixes those
and makes one multiplier and one offset for each piece; a second kernel applies them. Backward
is the same road: sums of dy and of dy * (x - mean) over each piece, algebra, and a kernel that
writes dx = a * dy + r * ((x - m) * b + c). Rows with a weight for each element have kernels of
their own, which do all of it while a row is in cache.

Small arrays are *grids*: they have the axes of x, with size 1 where a piece is not divided.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numbanorm import _kernels, _threads
from numbanorm._axes import TASKS, Array, Axes, Geometry, Plan, memory_order
from numbanorm._checks import bool_mask, float_array, output_array, same_memory
from numbanorm.moments import Grids, Moments, merge, piece_moments

Float64 = NDArray[np.float64]


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

    # Adds an array up, in place, over processes that share the statistics.
    share: Callable[[Float64], object] | None = None

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
    sample_variance: bool
    instances: Moments | None  # what sample variances were made of

    def __init__(
        self,
        x: Array,
        y: Array,
        geometry: Geometry,
        affine: tuple[bool, bool],
        eps: float | None,
        mixture: Mixture | None,
        center: bool,
        sample_variance: bool,
        fused: bool = True,
    ) -> None:
        self.geometry, self.shape, self.center = geometry, x.shape, center
        self.eps = float(np.finfo(x.dtype).eps) if eps is None else eps
        self.x_is_lost = same_memory(x, y)
        self.has_weight, self.has_bias = affine
        self.mixture, self.sample_variance = mixture, sample_variance
        # y gives the order in memory; x is copied if its own differs.
        x_split = x.reshape(geometry.shape)
        order = memory_order(y.reshape(geometry.shape)) or memory_order(x_split)
        self.plan = geometry.plan(order or tuple(range(x_split.ndim)), any(affine), fused)
        self.x = self.plan.to_view(x_split)
        self.mask = None
        self.instances = None

    @property
    def ddof(self) -> int:
        """1 where the groups themselves, not the instances, have sample variances."""
        return int(self.sample_variance and self.plan.instance_size == 1)

    @property
    def batch(self) -> Statistic:
        """The statistic that has running averages."""
        return self.statistics[self.geometry.tracked]


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
        As :func:`~numbanorm._checks.float_array` returns it.
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
        Whether the variance of an instance (or, where those are single values, of each group)
        is divided by n - 1 instead of n.
    mask, out : array, optional
        True where an element counts; where y is written.
    """
    counts = bool_mask(mask, x.shape)
    y = output_array(out, x, x)
    affine = weight is not None, bias is not None
    saved = Saved(x, y, geometry, affine, eps, mixture, center, sample_variance)
    plan = saved.plan
    if counts is not None:
        saved.mask = plan.to_view(counts.reshape(geometry.shape))
    target, unset = plan.to_target(y.reshape(geometry.shape))
    known: Known = None
    if fixed is not None:
        # Copies: running statistics may move on before backward.
        mean, var = (np.array(a, np.float64).reshape(geometry.running_grid) for a in fixed)
        known = mean, var
    if plan.elements:
        _forward_elements(saved, weight, bias, known, target)
    else:
        _forward_pieces(saved, weight, bias, known, target)
    if unset is not None:
        unset[...] = target.reshape(unset.shape)
    return y, saved


Known = tuple[Float64, Float64] | None


@np.errstate(all="ignore")
def restore(
    x: Array,
    dx: Array,
    geometry: Geometry,
    weight: Array | None,
    has_bias: bool,
    eps: float | None,
    statistics: list[Statistic],
    *,
    mixture: Mixture | None = None,
    center: bool = True,
    sample_variance: bool = False,
    instances: Moments | None = None,
    share: Callable[[Float64], object] | None = None,
) -> Saved:
    """Return what :func:`normalize` saved, from x and the statistics that it found.

    ``dx`` is where backward is to write; ``instances`` goes with ``sample_variance``. With
    ``share`` the statistics are those of several processes, and backward adds up over them.
    """
    affine = weight is not None, has_bias
    fused = share is None
    saved = Saved(x, dx, geometry, affine, eps, mixture, center, sample_variance, fused)
    saved.statistics, saved.instances, saved.share = statistics, instances, share
    if saved.plan.elements:
        (_, n, mean, var) = statistics[0]
        count = saved.plan.from_grid(np.ones_like(mean) if n is None else n, np.int64)
        saved.rows = count, saved.plan.from_grid(mean), saved.plan.from_grid(var)
        saved.weight = _element_parameter(saved, weight, 1.0, x.dtype)
    else:
        _settle(saved, weight)
    return saved


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
    saved: Saved, weight: Array | None, bias: Array | None, fixed: Known, y: Array
) -> None:
    geometry, plan = saved.geometry, saved.plan
    pieces: Grids | None = None
    if fixed is None or len(geometry.reductions) > 1:
        pieces = piece_moments(plan, saved.x, saved.mask)
    if saved.sample_variance and plan.instance_size > 1 and pieces is not None:
        count, mean, rest, m2 = merge(pieces, plan.instance)
        saved.instances = Moments(count, mean, m2)
        pieces = count, mean, rest, m2 * (count / np.maximum(count - 1, 1))
    saved.statistics = []
    for k, axes in enumerate(geometry.reductions):
        if fixed is not None and k == geometry.tracked:
            saved.statistics.append(Statistic(axes, None, *fixed))
            continue
        assert pieces is not None
        count, mean, _, m2 = merge(pieces, axes)
        var = m2 / np.maximum(count - saved.ddof, 1)
        if not saved.center:
            var += mean * mean
            mean = np.zeros_like(mean)
        saved.statistics.append(Statistic(axes, count, mean, var))
    _settle(saved, weight)
    scale = saved.rstd if saved.weight is None else saved.rstd * saved.weight
    rounded = saved.mean.astype(y.dtype)
    shift = (rounded - saved.mean) * scale
    if bias is not None:
        shift = shift + _grid(bias, geometry)
    _apply(plan, saved.x, rounded, scale, shift, y)


def _settle(saved: Saved, weight: Array | None) -> None:
    """Mix the statistics to what normalises each piece."""
    saved.mean, saved.var = _mix(saved.statistics, saved.mixture)
    saved.rstd = _rstd(saved)
    saved.weight = None if weight is None else _grid(weight, saved.geometry)


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
    if not isinstance(saved, Saved):
        raise TypeError(
            f"saved: the second result of a forward is needed, got {type(saved).__name__}"
        )
    if saved.x_is_lost:
        raise RuntimeError(
            "backward: forward wrote y over x (out=x), so x is gone; "
            "call forward with another out, or without"
        )
    gradient = float_array(dy, "dy")
    if gradient.shape != saved.shape:
        raise ValueError(f"dy: the shape of x, {saved.shape}, is needed, got {gradient.shape}")
    gradient = gradient.astype(saved.x.dtype, copy=False)
    dx = output_array(out, gradient, gradient, saved.x)
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
    # Where neither statistics nor weight differ between pieces, their sums are all that counts.
    varies = np.broadcast_shapes(saved.mean.shape, saved.geometry.param_grid)
    common = tuple(axis for axis, n in enumerate(varies) if n == 1)
    grids = (plan.to_grid(array.sum(1)) for array in parts)
    s0, s1 = (np.sum(grid, common, keepdims=True) for grid in grids)
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
    slope, offset = np.zeros(1), np.zeros(1)
    for k, (axes, count, mean, var) in enumerate(saved.statistics):
        if saved.mixture is not None:
            dp[k] = p[k] * np.sum(dmean * (mean - saved.mean))
            dq[k] = q[k] * np.sum(dvar * (var - saved.var))
        if count is None:
            continue
        sums = p[k] * dmean.sum(axes, keepdims=True), q[k] * dvar.sum(axes, keepdims=True)
        if saved.share is not None:
            for values in sums:
                saved.share(values)
        if saved.center:
            offset = offset + sums[0] / np.maximum(count, 1)
        dsquare = sums[1] * 2 / np.maximum(count - saved.ddof, 1)
        if saved.instances is None:
            slope = slope + dsquare
            offset = offset + dsquare * (rounded - mean)
        else:
            # var_k is the mean of factor * (x - own mean)**2 + (own mean - mean_k)**2.
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
    # r only keeps b and c in range: any number does where rstd is 0.
    r = np.where(r == 0, 1, r)
    b, c = slope / r, offset / r
    kernel = _kernels.backward_columns if plan.columns else _kernels.backward_rows
    _, part, block = plan.tiles
    arrays = (plan.from_grid(values, dx.dtype) for values in (a, r, m, b, c))
    in_place = np.may_share_memory(dy, dx)
    _threads.run(kernel, dy.size, dy, saved.x, saved.mask, part, block, *arrays, in_place, dx)
