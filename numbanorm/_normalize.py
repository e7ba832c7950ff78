"""The one forward and the one backward of all methods.

A :class:`~numbanorm._axes.Geometry` says over which axes. A first kernel takes the moments of
the smallest pieces of x; algebra on small arrays merges them into the groups of each statistic,
mixes those and makes one multiplier and one offset for each piece; a last kernel applies them.
Backward is the same road: sums of dy and of dy * (x - mean) over each piece, algebra, and a
kernel that writes dx = a * dy + r * ((x - m) * b + c). Where all there is is one statistic, and its
groups fit in cache, one kernel does all of this, and sums up some groups while it writes others.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numbanorm import _kernels, _threads
from numbanorm._axes import TASKS, Array, Axes, Geometry, Plan, memory_order
from numbanorm._checks import float_array, output_array
from numbanorm._lines import cache_size
from numbanorm.moments import Moments, Parts, merge_pieces, piece_moments, work

Float64 = NDArray[np.float64]


class Statistic(NamedTuple):
    """One mean and variance over ``axes``, with size 1 there and the other axes of x.

    ``n`` has the number of elements of each, or is None where they do not come from x.
    """

    axes: Axes
    n: NDArray[np.int64] | None
    mean: Float64
    var: Float64


class Mixture(NamedTuple):
    """Softmax weights of the statistics' means and variances."""

    mean: Float64
    var: Float64


# Rows of fewer elements have too few whole lines to be written past the caches.
STREAM_FROM = 1 << 7
# And parts of rows: what comes next in memory is written much later.
STREAM_PARTS_FROM = 1 << 10

# The weights of a single statistic.
ALONE = Mixture(np.ones(1), np.ones(1))


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
    weight: Array  # of each feature for pieces, of each element for elements
    has_weight: bool
    has_bias: bool
    # Of each group: how many elements, mean and variance. The groups are in the order of
    # plan.groups for pieces, of the rows for elements.
    n: NDArray[np.int64]
    mean: Float64
    var: Float64
    fixed: bool  # whether the tracked statistic does not come from x
    pieces: tuple[Float64, Float64, Float64]  # mean, var and rstd that normalise each piece
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
        mask: Array | None = None,
        fused: bool = True,
        in_place: bool = False,
    ) -> None:
        self.geometry, self.shape, self.center = geometry, x.shape, center
        self.eps = float(np.finfo(x.dtype).eps) if eps is None else eps
        self.x_is_lost = in_place
        self.has_weight, self.has_bias = affine
        self.mixture, self.sample_variance = mixture, sample_variance
        # y gives the order in memory; x is copied if its own differs.
        order = memory_order(y, geometry.shape) or memory_order(x, geometry.shape)
        order = order or tuple(range(len(geometry.shape)))
        self.plan = geometry.plan(order, any(affine), fused, mask is not None)
        self.x = self.plan.to_view(x)
        self.mask = None if mask is None else self.plan.to_view(mask)
        self.instances = None
        self.fixed = False

    @property
    def ddof(self) -> int:
        """1 where the groups themselves, not the instances, have sample variances."""
        return int(self.sample_variance and self.plan.instance_size == 1)

    @property
    def statistics(self) -> list[Statistic]:
        """All statistics."""
        return [self.statistic(k) for k in range(len(self.geometry.reductions))]

    def statistic(self, k: int) -> Statistic:
        """Return statistic k."""
        geometry, plan = self.geometry, self.plan
        groups = (self.n, self.mean, self.var)
        if plan.by_group:
            n, mean, var = (plan.to_grid(array) for array in groups)
        else:
            where, shape = plan.groups.slices[k], plan.groups.shapes[k]
            n, mean, var = (array[where].reshape(shape) for array in groups)
        fixed = self.fixed and k == geometry.tracked
        return Statistic(geometry.reductions[k], None if fixed else n, mean, var)

    @property
    def batch(self) -> Statistic:
        """The statistic that has running averages."""
        return self.statistic(self.geometry.tracked)

    @property
    def tracked(self) -> tuple[NDArray[np.int64], Float64, Float64]:
        """Count, mean and variance of that, (G,), in the C order of its kept axes."""
        plan = self.plan
        if not plan.by_group:
            where = plan.groups.slices[self.geometry.tracked]
            return self.n[where], self.mean[where], self.var[where]
        if plan.in_order:
            return self.n.reshape(-1), self.mean.reshape(-1), self.var.reshape(-1)
        n, mean, var = (plan.to_grid(array).reshape(-1) for array in (self.n, self.mean, self.var))
        return n, mean, var


def normalize(
    x: Array,
    y: Array,
    geometry: Geometry,
    weight: Array | None,
    bias: Array | None,
    eps: float | None,
    *,
    fixed: tuple[Array, Array] | None = None,
    mixture: Mixture | None = None,
    center: bool = True,
    sample_variance: bool = False,
    mask: Array | None = None,
    in_place: bool = False,
) -> Saved:
    """Write y, the normalised x; return what backward needs.

    Parameters
    ----------
    x, y : array of float32 or float64
        As :func:`~numbanorm._checks.float_array` and :func:`~numbanorm._checks.output_array`
        return them.
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
    mask : array of bool, optional
        True where an element counts, as :func:`~numbanorm._checks.bool_mask` returns it.
    in_place : bool
        Whether y is x.
    """
    affine = weight is not None, bias is not None
    saved = Saved(
        x, y, geometry, affine, eps, mixture, center, sample_variance, mask, in_place=in_place
    )
    plan = saved.plan
    target, unset = plan.to_target(y)
    saved.fixed = fixed is not None
    streamed = _is_streamed(saved, in_place and unset is None, 1, target)
    if plan.by_group:
        _forward_groups(saved, weight, bias, fixed, streamed, target)
    else:
        _forward_pieces(saved, weight, bias, fixed, streamed, target)
    if unset is not None:
        unset[...] = target.reshape(unset.shape)
    return saved


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
    saved = Saved(
        x, dx, geometry, affine, eps, mixture, center, sample_variance, fused=share is None
    )
    saved.instances, saved.share, plan = instances, share, saved.plan
    saved.fixed = statistics[geometry.tracked].n is None
    if plan.by_group:
        (_, n, mean, var) = statistics[0]
        saved.n = plan.from_grid(np.ones_like(mean) if n is None else n, np.int64)
        saved.mean, saved.var = plan.from_grid(mean), plan.from_grid(var)
        saved.weight = _parameter(saved, weight, 1.0, x.dtype)
        return saved
    saved.n = np.ones(plan.groups.total, np.int64)
    saved.mean, saved.var = np.empty((2, plan.groups.total))
    for where, (_, n, mean, var) in zip(plan.groups.slices, statistics, strict=True):
        if n is not None:
            saved.n[where] = n.ravel()
        saved.mean[where], saved.var[where] = mean.ravel(), var.ravel()
    saved.weight = _feature_parameter(saved, weight, 1.0)
    _coefficients(saved, saved.weight, x.dtype)
    return saved


def _is_streamed(saved: Saved, in_place: bool, n_read: int, y: Array) -> bool:
    """Tell whether y, the view of an output, is written past the caches.

    It is made of so many arrays of its size.
    """
    plan, size = saved.plan, cache_size()
    # A step has other arrays yet: long before y alone fills a cache, it drives out what is needed.
    if size is None or (n_read + 1) * y.nbytes < size // 4:
        return False
    # Where x is read once there is nothing to be kept in a cache, and no gain.
    once = saved.fixed and len(saved.geometry.reductions) == 1
    # What is written at once must be a run in memory. For pieces that are rows it was not faster.
    in_runs = plan.by_group
    if plan.columns:
        in_runs = not plan.elements and plan.tiles.block >= min(plan.view[-1], STREAM_PARTS_FROM)
    return in_runs and not in_place and not once and y.shape[-1] >= STREAM_FROM


def _stream(plan: Plan, streamed: bool) -> tuple[bool | None, ...]:
    """Return what a kernel is told of that; those of rows are compiled for either, with None."""
    if plan.columns:
        return () if plan.elements else (streamed,)
    return (streamed or None,) if plan.by_group else ()


def _forward_groups(
    saved: Saved,
    weight: Array | None,
    bias: Array | None,
    fixed: tuple[Array, Array] | None,
    streamed: bool,
    y: Array,
) -> None:
    plan, shape = saved.plan, saved.plan.groups_shape
    saved.weight = _parameter(saved, weight, 1.0, y.dtype)
    if fixed is None:
        saved.n, (saved.mean, saved.var) = np.empty(shape, np.int64), np.empty((2, *shape))
    else:
        mean, var = (running.reshape(saved.geometry.running_grid) for running in fixed)
        saved.n = np.ones(shape, np.int64)
        saved.mean, saved.var = plan.from_grid(mean), plan.from_grid(var)
    parameters = saved.weight, _parameter(saved, bias, 0.0, y.dtype)
    rest = (
        saved.eps, saved.center, fixed is None, *plan.cut, *_stream(plan, streamed),
        saved.n, saved.mean, saved.var, y,
    )  # fmt: skip
    args: tuple[Any, ...]
    if not plan.elements:
        kernel = _kernels.forward_group_columns if plan.columns else _kernels.forward_groups
        args = saved.mask, plan.features
    elif plan.columns:
        kernel, args = _kernels.forward_element_columns, ()
    else:
        kernel, args = _kernels.forward_elements, (saved.mask,)
    _threads.run(kernel, y.size, saved.x, *args, *parameters, *rest)


def _parameter(saved: Saved, value: Array | None, default: float, dtype: Any) -> Array:
    """Return a parameter (or its default) for each element of a row, or for each feature."""
    if not saved.plan.elements:
        return _feature_parameter(saved, value, default)
    plan = saved.plan
    if value is None:
        return np.full(plan.weights_shape, default, dtype)
    if not plan.in_order:
        value = value.reshape(saved.geometry.param_grid).transpose(plan.order)
    if plan.span > 1:
        return np.repeat(value.astype(dtype, copy=False), plan.span).reshape(plan.weights_shape)
    return np.array(value, dtype, order="C").reshape(plan.weights_shape)


def _forward_pieces(
    saved: Saved,
    weight: Array | None,
    bias: Array | None,
    fixed: tuple[Array, Array] | None,
    streamed: bool,
    y: Array,
) -> None:
    geometry, plan = saved.geometry, saved.plan
    groups = plan.groups
    if fixed is None or len(geometry.reductions) > 1:
        pieces, groups_of = piece_moments(plan, saved.x, saved.mask), plan.groups_of_parts
        if saved.sample_variance and plan.instance_size > 1:
            instances, _ = merge_pieces(pieces, plan.instances_of_parts)
            pieces, groups_of = _with_sample_variance(saved, instances), plan.groups_of_instances
        merged, saved.var = merge_pieces(pieces, groups_of, saved.center, saved.ddof)
        saved.n, saved.mean, *_ = merged
    else:
        saved.n = np.empty(groups.total, np.int64)
        saved.mean, saved.var = np.empty((2, groups.total))
    if fixed is not None:
        # Copied: running statistics may move on before backward.
        where, shape = groups.slices[geometry.tracked], groups.shapes[geometry.tracked]
        saved.n[where] = 1
        for array, running in zip((saved.mean, saved.var), fixed, strict=True):
            array[where].reshape(shape)[...] = running.reshape(geometry.running_grid)
    saved.weight = _feature_parameter(saved, weight, 1.0)
    m, s, t = _coefficients(saved, _feature_parameter(saved, bias, 0.0), y.dtype)
    _apply(plan, saved.x, m, s, t, streamed, y)


@np.errstate(all="ignore")  # NaN and Inf are the user's, and reach what they should
def _with_sample_variance(saved: Saved, instances: Parts) -> Parts:
    """Return the instances as pieces, with n - 1 instead of n in their variances."""
    count, mean, rest, m2 = instances
    (shape,) = saved.plan.instances.shapes
    saved.instances = Moments(count.reshape(shape), mean.reshape(shape), m2.reshape(shape))
    return count, mean, rest, m2 * (count / np.maximum(count - 1, 1))


def _feature_parameter(saved: Saved, value: Array | None, default: float) -> Float64:
    """Return a copy of a parameter (or its default), which may change before backward."""
    if value is None:
        return np.full(math.prod(saved.geometry.param_grid) if saved.plan.affine else 1, default)
    return np.array(value, np.float64, order="C").reshape(-1)


def _coefficients(saved: Saved, bias: Float64, dtype: Any) -> tuple[Array, Array, Array]:
    """Mix the statistics; return m, s and t of each piece."""
    plan = saved.plan
    mean, var, rstd = np.empty((3, plan.groups.of_piece.shape[1]))
    saved.pieces = mean, var, rstd
    found = np.empty((3, len(mean)), dtype)
    _threads.run(
        _kernels.coefficients, len(mean) * _kernels.PIECE,
        plan.groups.of_piece, plan.features, saved.n, saved.mean, saved.var,
        *(saved.mixture or ALONE), saved.eps, saved.weight, bias, mean, var, rstd, *found,
    )  # fmt: skip
    m, s, t = found.reshape(3, *plan.pieces)
    return m, s, t


def _apply(plan: Plan, x: Array, m: Array, s: Array, t: Array, streamed: bool, y: Array) -> None:
    """Write y = (x - m) * s + t."""
    kernel = _kernels.apply_columns if plan.columns else _kernels.apply_rows
    _, part, block = plan.tiles
    _threads.run(kernel, y.size, x, part, block, m, s, t, *_stream(plan, streamed), y)


Parameters = tuple[Float64 | None, Float64 | None, Float64, Float64]


def backward(
    dy: ArrayLike, saved: Saved, out: Array | None = None
) -> tuple[Array, Float64 | None, Float64 | None, Float64, Float64]:
    """Return dx and what :func:`differentiate` does, once dy, saved and out are found to fit."""
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
    if gradient.dtype != saved.x.dtype:
        with np.errstate(over="ignore"):
            gradient = gradient.astype(saved.x.dtype)
    dx, in_place = output_array(out, gradient, saved.x)
    return dx, *differentiate(gradient, saved, dx, in_place)


def differentiate(dy: Array, saved: Saved, dx: Array, in_place: bool) -> Parameters:
    """Write dx, which is dy if ``in_place``; return the gradients of all parameters, in float64."""
    plan = saved.plan
    target, unset = plan.to_target(dx)
    streamed = _is_streamed(saved, in_place and unset is None, 2, target)
    write = (
        _backward_elements if plan.elements
        else _backward_groups if plan.by_group
        else _backward_pieces
    )  # fmt: skip
    parameters = write(saved, plan.to_view(dy), streamed, target)
    if unset is not None:
        unset[...] = target.reshape(unset.shape)
    return parameters


def _backward_elements(saved: Saved, dy: Array, streamed: bool, dx: Array) -> Parameters:
    plan, geometry = saved.plan, saved.geometry
    affine = saved.has_weight or saved.has_bias
    dweight, dbias = np.zeros((2, *(plan.gradient_parts if affine else (TASKS, 0))))
    rest = saved.n, saved.mean, saved.var, dx, dweight, dbias
    options = saved.eps, saved.center, not saved.fixed, affine
    if plan.columns:
        _threads.run(
            _kernels.backward_element_columns, dy.size,
            dy, saved.x, saved.weight, *options, *plan.cut, *rest,
        )  # fmt: skip
    else:
        _threads.run(
            _kernels.backward_elements, dy.size,
            dy, saved.x, saved.mask, saved.weight, *options, *_stream(plan, streamed), *rest,
        )  # fmt: skip

    def unfold(blocks: Array) -> Array:
        total: Array = blocks[0] if len(blocks) == 1 else _sum(blocks)
        if plan.in_order:
            return total.reshape(geometry.param_shape)
        in_memory = total.reshape([geometry.param_grid[axis] for axis in plan.order])
        return in_memory.transpose(plan.inverse_order).reshape(geometry.param_shape)

    return (
        unfold(dweight) if saved.has_weight else None,
        unfold(dbias) if saved.has_bias else None,
        np.zeros(1),
        np.zeros(1),
    )


@np.errstate(all="ignore")  # as above
def _sum(blocks: Array) -> Array:
    total: Array = blocks.sum(0)
    return total


def _backward_groups(saved: Saved, dy: Array, streamed: bool, dx: Array) -> Parameters:
    plan, geometry = saved.plan, saved.geometry
    s0, s1 = np.empty((2, len(plan.features)))
    kernel = _kernels.backward_group_columns if plan.columns else _kernels.backward_groups
    _threads.run(
        kernel, dy.size,
        dy, saved.x, saved.mask, plan.features, saved.weight, saved.eps, saved.center,
        not saved.fixed, *plan.cut, *_stream(plan, streamed),
        saved.n, saved.mean, saved.var, dx, s0, s1,
    )  # fmt: skip
    dweight, dbias = np.empty((2, len(saved.weight)))
    _kernels.feature_gradients(plan.features, s0, s1, dbias, dweight)
    return (
        dweight.reshape(geometry.param_shape) if saved.has_weight else None,
        dbias.reshape(geometry.param_shape) if saved.has_bias else None,
        np.zeros(1),
        np.zeros(1),
    )


def _gradient_sums(saved: Saved, dy: Array) -> Float64:
    """Return the sums of dy and of dy * (x - mean) over each piece, (2, P)."""
    plan = saved.plan
    kernel = _kernels.gradient_sums_columns if plan.columns else _kernels.gradient_sums_rows
    _, part, block = plan.tiles
    sums, mean = np.empty((2, *plan.parts)), saved.pieces[0].reshape(plan.pieces)
    _threads.run(kernel, dy.size, dy, saved.x, saved.mask, part, block, mean, *sums)
    if plan.parts[1] > 1:
        with np.errstate(invalid="ignore"):
            sums = sums.sum(2)
    return sums.reshape(2, -1)


def _backward_pieces(saved: Saved, dy: Array, streamed: bool, dx: Array) -> Parameters:
    geometry, plan, groups = saved.geometry, saved.plan, saved.plan.groups
    sums = _gradient_sums(saved, dy)
    p, q = saved.mixture or ALONE
    mean, var, rstd = saved.pieces
    dmean, dvar = np.zeros((2, groups.total))
    dp, dq = np.zeros((2, len(p)))
    dweight, dbias = np.zeros((2, len(saved.weight)))
    _threads.run(
        _kernels.group_gradients, work(groups),
        *sums, groups.of_piece, groups.bounds, plan.features, saved.n, saved.mean, saved.var,
        saved.ddof, p, q, saved.weight, mean, var, rstd, dmean, dvar, dp, dq, dweight, dbias,
    )  # fmt: skip
    if saved.share is not None:
        saved.share(dmean)
        saved.share(dvar)
    coefficients = np.empty((5, len(rstd)), dx.dtype)
    own: tuple[Any, Any, Any] = None, None, None
    if saved.instances is not None:
        count, mean_of_instance = saved.instances.count, saved.instances.mean
        own = plan.instances.of_piece[0], np.ravel(count), mean_of_instance.ravel()
    _threads.run(
        _kernels.gradient_coefficients, len(mean) * _kernels.PIECE,
        groups.of_piece, plan.features, saved.mean, dmean, dvar, saved.center,
        geometry.tracked if saved.fixed else -1, *own, saved.weight, mean, rstd, *coefficients,
    )  # fmt: skip
    of_pieces = coefficients.reshape(5, *plan.pieces)
    if saved.fixed and len(groups.slices) == 1:
        zero = np.zeros_like(of_pieces[0])
        _apply(plan, dy, zero, of_pieces[0], zero, streamed, dx)
    else:
        kernel = _kernels.backward_columns if plan.columns else _kernels.backward_rows
        _, part, block = plan.tiles
        _threads.run(
            kernel, dy.size,
            dy, saved.x, saved.mask, part, block, *of_pieces, *_stream(plan, streamed), dx,
        )  # fmt: skip
    return (
        dweight.reshape(geometry.param_shape) if saved.has_weight else None,
        dbias.reshape(geometry.param_shape) if saved.has_bias else None,
        dp,
        dq,
    )
