"""The one forward and the one backward of all methods.

A :class:`~numbanorm.core.geometry.Geometry` says over which axes. A first kernel takes the moments of
the smallest pieces of x; algebra on small arrays merges them into the groups of each statistic,
mixes those and makes one multiplier and one offset for each piece; a last kernel applies them.
Backward is the same road: sums of dy and of dy * (x - mean) over each piece, algebra, and a
kernel that writes dx = a * dy + r * ((x - m) * b + c). Where all there is is one statistic, and its
groups fit in cache, one kernel does all of this, and sums up some groups while it writes others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numbanorm.core.checks import empty_array, float_array, output_array
from numbanorm.core.geometry import Geometry, Plan, memory_order
from numbanorm.core.pieces import merge_pieces, piece_moments, work
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.kernels import algebra, apply, columns, element_columns, group_rows, reduce, rows
from numbanorm.numba_ext.threads import call, run
from numbanorm.tuning import tuning


class Instances(NamedTuple):
    """Moments of the instances, which sample variances were made of."""

    n: NDArray[np.int64]
    mean: Float64
    m2: Float64


class Statistic(NamedTuple):
    """One mean and variance over ``axes``, with size 1 there and the other axes of x.

    ``n`` has the number of elements of each, or is None where they do not come from x.
    """

    axes: Axes
    n: NDArray[np.int64] | None
    mean: Float64
    var: Float64


# The mixture of a single statistic.
ALONE = np.ones((2, 1))


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
    # Weight and bias (2, ...): of each feature for pieces, of each element for elements.
    parameters: Array
    has_weight: bool
    has_bias: bool
    # How many elements, mean and variance of each group (3 or more, G), in the order of plan.groups
    # for pieces, else as in memory.
    of_groups: Float64
    fixed: bool  # whether the tracked statistic does not come from x
    of_pieces: Float64  # mean, var and rstd that normalise each piece (3, P)
    mixture: Float64 | None  # weights of the statistics' means and variances (2, S)
    sample_variance: bool
    instances: Instances | None  # what sample variances were made of

    def __init__(
        self,
        x: Array,
        y: Array,
        geometry: Geometry,
        affine: tuple[bool, bool],
        eps: float | None,
        mixture: Float64 | None,
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
        if plan.by_group:
            n, mean, var = (plan.to_grid(values) for values in self.of_groups)
        else:
            n, mean, var = self.of_groups[:3, plan.groups.slices[k]].reshape(
                3, *plan.groups.shapes[k]
            )
        fixed = self.fixed and k == geometry.tracked
        return Statistic(geometry.reductions[k], None if fixed else n.astype(np.int64), mean, var)

    @property
    def batch(self) -> Statistic:
        """The statistic that has running averages."""
        return self.statistic(self.geometry.tracked)

    @property
    def tracked(self) -> tuple[Float64, int, int]:
        """Count, mean and variance of groups, and from where to where they are that statistic's.

        There they are in the C order of its kept axes.
        """
        plan = self.plan
        if not plan.by_group:
            where = plan.groups.slices[self.geometry.tracked]
            return self.of_groups, where.start, where.stop
        in_order = self.of_groups
        if not plan.in_order:
            in_order = np.stack([plan.to_grid(values).ravel() for values in self.of_groups])
        return in_order, 0, in_order.shape[1]


def normalize(
    x: Array,
    y: Array,
    geometry: Geometry,
    weight: Array | None,
    bias: Array | None,
    eps: float | None,
    *,
    fixed: tuple[Array, Array] | None = None,
    mixture: Float64 | None = None,
    center: bool = True,
    sample_variance: bool = False,
    mask: Array | None = None,
    in_place: bool = False,
) -> Saved:
    """Write y, the normalised x; return what backward needs.

    Parameters
    ----------
    x, y : array of float32 or float64
        As :func:`~numbanorm.core.checks.float_array` and :func:`~numbanorm.core.checks.output_array`
        return them.
    geometry : Geometry
        Made for the shape of x.
    weight, bias : array, optional
        Of shape ``geometry.param_shape``.
    eps : float or None
        Added to the variance; None means the machine epsilon of x's type.
    fixed : (mean, var), optional
        Running statistics, which take the place of the tracked statistic.
    mixture : array (2, S), optional
        Weights of the means and of the variances of several statistics.
    center : bool
        Whether the mean is subtracted; if not, the variance is the mean square.
    sample_variance : bool
        Whether the variance of an instance (or, where those are single values, of each group)
        is divided by n - 1 instead of n.
    mask : array of bool, optional
        True where an element counts, as :func:`~numbanorm.core.checks.bool_mask` returns it.
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
    streamed = _is_streamed(saved, in_place and unset is None, target)
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
    mixture: Float64 | None = None,
    center: bool = True,
    sample_variance: bool = False,
    instances: Instances | None = None,
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
        _, n, mean, var = statistics[0]
        saved.of_groups = plan.from_grid(1.0 if n is None else n, mean, var)
        saved.parameters = _parameters(saved, weight, None, x.dtype)
        return saved
    saved.of_groups = np.empty((3, plan.groups.total))
    for where, (_, n, mean, var) in zip(plan.groups.slices, statistics, strict=True):
        saved.of_groups[0, where] = 1.0 if n is None else n.ravel()
        saved.of_groups[1, where], saved.of_groups[2, where] = mean.ravel(), var.ravel()
    saved.parameters = _parameters(saved, weight, None, x.dtype)
    _coefficients(saved, x.dtype)
    return saved


def _is_streamed(saved: Saved, in_place: bool, y: Array) -> bool:
    """Tell whether y, the view of an output, is written past the caches."""
    plan, size = saved.plan, tuning().cache_bytes
    # x, y, dy and dx fill a cache together. Forward and backward must agree: dx may have the memory
    # that y had, and what is in a cache takes twice as long to write past it.
    if size is None or y.nbytes < size // 4:
        return False
    # What is written at once must be a run in memory.
    t = tuning()
    width, least = plan.view[-1], t.stream_from
    if plan.columns and plan.elements:
        # Blocks share lines, and short runs are mostly parts of lines: those of 196 columns took
        # twice as long past the caches.
        width, least = plan.tiles.block, 2 * t.stream_from
    elif plan.columns:
        width, least = plan.tiles.block, max(least, min(width, t.stream_parts_from))
    return width >= least and not in_place


def _stream(plan: Plan, streamed: bool) -> bool | None:
    """Return what a kernel is told of that; those of rows are compiled for either, with None."""
    return streamed if plan.columns and not plan.elements else streamed or None


def _forward_groups(
    saved: Saved,
    weight: Array | None,
    bias: Array | None,
    fixed: tuple[Array, Array] | None,
    streamed: bool,
    y: Array,
) -> None:
    plan = saved.plan
    saved.of_groups = np.empty((3, plan.n_groups)) if fixed is None else _of_running(saved, fixed)
    saved.parameters = _parameters(saved, weight, bias, y.dtype)
    if streamed and plan.elements and plan.span > 1:
        # Each thread needs all of them then: once for all.
        saved.parameters = np.repeat(saved.parameters, plan.span, axis=2)
    kernel, args = rows.forward_elements, [saved.x, saved.mask]
    if not plan.elements:
        kernel = columns.forward_group_columns if plan.columns else group_rows.forward_groups
        args += [plan.features]
    elif plan.columns:
        kernel, args = element_columns.forward_element_columns, [saved.x]
    run(
        kernel, y.size,
        *args, saved.parameters, saved.eps, saved.center, fixed is None,
        *plan.cut, _stream(plan, streamed), saved.of_groups, y,
    )  # fmt: skip


def _of_running(saved: Saved, fixed: tuple[Array, Array]) -> Float64:
    """Return running statistics as those of the groups; a copy, as they may move on."""
    plan, (mean, var) = saved.plan, fixed
    if mean.shape == (plan.n_groups,):
        return np.array((plan.ones, mean, var), np.float64)
    return plan.from_grid(1.0, *(running.reshape(saved.geometry.running_grid) for running in fixed))


def _parameters(saved: Saved, weight: Array | None, bias: Array | None, dtype: Any) -> Array:
    """Return weight and bias (2, ...), of each element of a row in its type or of each feature.

    They are copies, as both may change before backward.
    """
    plan, geometry = saved.plan, saved.geometry
    shape = geometry.param_shape if plan.affine else (1,)
    weight = np.ones(shape) if weight is None else weight
    bias = np.zeros(shape) if bias is None else bias
    if not plan.elements:
        return np.array((weight, bias), np.float64).reshape(2, *plan.weights_shape)
    found = np.array((weight, bias), dtype)
    if not plan.in_order:
        found = found.reshape(2, *geometry.param_grid).transpose(0, *(i + 1 for i in plan.order))
    return np.ascontiguousarray(found).reshape(2, *plan.weights_shape)


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
            pieces = _with_sample_variance(saved, pieces)
            groups_of = plan.groups_of_instances
        saved.of_groups = merge_pieces(pieces, groups_of, saved.center, saved.ddof)
    else:
        saved.of_groups = np.empty((3, groups.total))
    if fixed is not None:
        # Copied: running statistics may move on before backward.
        where, shape = groups.slices[geometry.tracked], groups.shapes[geometry.tracked]
        saved.of_groups[0, where] = 1.0
        for values, running in zip(saved.of_groups[1:3], fixed, strict=True):
            values[where].reshape(shape)[...] = running.reshape(geometry.running_grid)
    saved.parameters = _parameters(saved, weight, bias, y.dtype)
    _apply(plan, saved.x, _coefficients(saved, y.dtype), streamed, y)


@np.errstate(all="ignore")  # NaN and Inf are the user's, and reach what they should
def _with_sample_variance(saved: Saved, parts: Float64) -> Float64:
    """Return the instances as pieces, with n - 1 instead of n in their variances."""
    count, mean, _, rest, m2 = merge_pieces(parts, saved.plan.instances_of_parts)
    (shape,) = saved.plan.instances.shapes
    n = count.astype(np.int64)
    saved.instances = Instances(n.reshape(shape), mean.reshape(shape), m2.reshape(shape))
    return np.stack((count, mean, rest, m2 * (count / np.maximum(count - 1, 1))))


def _mixture(saved: Saved) -> Float64:
    return ALONE if saved.mixture is None else saved.mixture


def _coefficients(saved: Saved, dtype: Any) -> Array:
    """Mix the statistics; return m, s and t of each piece, (3, A, B)."""
    plan = saved.plan
    n_pieces = plan.groups.of_piece.shape[1]
    saved.of_pieces, found = np.empty((3, n_pieces)), np.empty((3, n_pieces), dtype)
    run(
        algebra.coefficients, n_pieces * tuning().piece_work,
        *plan.segments, saved.of_groups, _mixture(saved), saved.eps,
        saved.parameters, saved.of_pieces, found,
    )  # fmt: skip
    return found.reshape(3, *plan.pieces)


def _apply(plan: Plan, x: Array, by: Array, streamed: bool, y: Array) -> None:
    """Write y = (x - m) * s + t; ``by`` has m, s and t of each piece, (3, A, B)."""
    kernel = apply.apply_columns if plan.columns else apply.apply_rows
    _, part, block = plan.tiles
    run(kernel, y.size, x, part, block, by, _stream(plan, streamed), y)


# Gradients of weight, bias, and of the logits of the means and of the variances.
Parameters = tuple[Float64 | None, Float64 | None, Float64 | None, Float64 | None]


def backward(
    dy: ArrayLike,
    saved: Saved,
    out: Array | None = None,
    empty: Callable[[Array], Array] = empty_array,
) -> tuple[Array, Float64 | None, Float64 | None, Float64 | None, Float64 | None]:
    """Return dx and what :func:`differentiate` does, once dy, saved and out are found to fit.

    Without ``out`` dx is what ``empty`` returns for dy.
    """
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
    dx, in_place = output_array(out, gradient, saved.x, empty=empty)
    return dx, *differentiate(gradient, saved, dx, in_place)


def differentiate(dy: Array, saved: Saved, dx: Array, in_place: bool) -> Parameters:
    """Write dx, which is dy if ``in_place``; return the gradients of all parameters, in float64."""
    plan = saved.plan
    target, unset = plan.to_target(dx)
    streamed = _is_streamed(saved, in_place and unset is None, target)
    write = (
        _backward_elements if plan.elements
        else _backward_groups if plan.by_group
        else _backward_pieces
    )  # fmt: skip
    dweight, dbias, dmixture = write(saved, plan.to_view(dy), streamed, target)
    if unset is not None:
        unset[...] = target.reshape(unset.shape)
    if saved.mixture is None:
        dmean_weight = dvar_weight = None
    elif dmixture is None:  # of a single statistic
        dmean_weight, dvar_weight = np.zeros_like(saved.mixture)
    else:
        dmean_weight, dvar_weight = dmixture
    return (
        dweight if saved.has_weight else None,
        dbias if saved.has_bias else None,
        dmean_weight,
        dvar_weight,
    )


# Gradients of weight and bias, and of a mixture's logits (2, S) where there are several statistics.
Found = tuple[Float64, Float64, Float64 | None]


def _backward_elements(saved: Saved, dy: Array, streamed: bool, dx: Array) -> Found:
    plan, geometry = saved.plan, saved.geometry
    affine = saved.has_weight or saved.has_bias
    blocks = np.zeros((2, *(plan.gradient_parts if affine else (tuning().tasks, 0))))
    args: list[Array | None] = [dy, saved.x]
    if plan.columns:
        kernel, cut = element_columns.backward_element_columns, plan.cut
    else:
        kernel, cut = rows.backward_elements, (plan.run,)
        args.append(saved.mask)
    run(
        kernel, dy.size,
        *args, saved.parameters, saved.eps, saved.center, not saved.fixed, affine,
        *cut, _stream(plan, streamed), saved.of_groups, dx, blocks,
    )  # fmt: skip
    if not affine:
        return blocks[0], blocks[1], None
    found = blocks[:, 0] if blocks.shape[1] == 1 else _sum(blocks)
    if not plan.in_order:
        found = found.reshape(2, *(geometry.param_grid[axis] for axis in plan.order))
        found = found.transpose(0, *(i + 1 for i in plan.inverse_order))
    found = found.reshape(2, *geometry.param_shape)
    return found[0], found[1], None


@np.errstate(all="ignore")  # as above
def _sum(blocks: Float64) -> Float64:
    total: Float64 = blocks.sum(1)
    return total


def _backward_groups(saved: Saved, dy: Array, streamed: bool, dx: Array) -> Found:
    plan = saved.plan
    sums = np.empty((2, len(plan.features)))
    kernel = columns.backward_group_columns if plan.columns else group_rows.backward_groups
    run(
        kernel, dy.size,
        dy, saved.x, saved.mask, plan.features, saved.parameters, saved.eps, saved.center,
        not saved.fixed, *plan.cut, _stream(plan, streamed), saved.of_groups, dx, sums,
    )  # fmt: skip
    found = np.zeros((2, *plan.weights_shape))
    call(algebra.feature_gradients, plan.features, sums, found)
    if plan.affine:
        found = found.reshape(2, *saved.geometry.param_shape)
    return found[0], found[1], None


def _gradient_sums(saved: Saved, dy: Array) -> Float64:
    """Return the sums of dy and of dy * (x - mean) over each piece, (2, P)."""
    plan = saved.plan
    kernel = reduce.gradient_sums_columns if plan.columns else reduce.gradient_sums_rows
    _, part, block = plan.tiles
    sums, of_pieces = np.empty((2, *plan.parts)), saved.of_pieces.reshape(3, *plan.pieces)
    run(kernel, dy.size, dy, saved.x, saved.mask, part, block, of_pieces, sums)
    if plan.parts[1] == 1:
        return sums.reshape(2, -1)
    found = np.zeros((2, *plan.pieces))
    call(algebra.add_parts, sums, found)
    return found.reshape(2, -1)


def _backward_pieces(saved: Saved, dy: Array, streamed: bool, dx: Array) -> Found:
    geometry, plan, groups = saved.geometry, saved.plan, saved.plan.groups
    sums, mixture = _gradient_sums(saved, dy), _mixture(saved)
    dstatistics, dmixture = np.zeros((2, groups.total)), np.zeros(mixture.shape)
    found = np.zeros((2, *plan.weights_shape))
    run(
        algebra.group_gradients, work(groups),
        sums, *plan.segments, groups.bounds, saved.of_groups, saved.ddof,
        mixture, saved.parameters, saved.of_pieces, dstatistics, dmixture, found,
    )  # fmt: skip
    if saved.share is not None:
        saved.share(dstatistics)
    n_pieces = sums.shape[1]
    by: Array = np.empty((5, n_pieces), dx.dtype)
    own = None
    if saved.instances is not None:
        count, mean = saved.instances.n, saved.instances.mean
        own = np.stack((np.ravel(count), mean.ravel()))
    run(
        algebra.gradient_coefficients, n_pieces * tuning().piece_work,
        *plan.segments, saved.of_groups, dstatistics, saved.center,
        geometry.tracked if saved.fixed else -1, own, saved.parameters, saved.of_pieces, by,
    )  # fmt: skip
    by = by.reshape(5, *plan.pieces)
    if saved.fixed and len(groups.slices) == 1:
        zero = np.zeros_like(by[0])
        _apply(plan, dy, np.stack((zero, by[0], zero)), streamed, dx)
    else:
        kernel = apply.backward_columns if plan.columns else apply.backward_rows
        _, part, block = plan.tiles
        run(
            kernel, dy.size,
            dy, saved.x, saved.mask, part, block, by, _stream(plan, streamed), dx,
        )  # fmt: skip
    if plan.affine:
        found = found.reshape(2, *geometry.param_shape)
    return found[0], found[1], dmixture
