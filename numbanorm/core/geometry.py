"""Shape algebra: over which axes of x the statistics are, and which ones parameters span.

A :class:`Geometry` says what a layer normalises over, for one shape of x. It knows the axes that
each statistic reduces, and the axes that the parameters span. An axis that every statistic
reduces and no parameter spans is *inner*: its elements share their statistics and parameters,
and make up a *piece*. In (N, C, H, W) with channel parameters a piece is an instance, H x W.

How kernels see x then, for one order of the axes in memory, is a layout of
:mod:`numbanorm.core.layouts`.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from numbanorm.core.types import Array, Axes


class AllBut(NamedTuple):
    """All axes but these, for an x of any rank."""

    axes: Axes


def axis_tuple(axes: int | Iterable[int], name: str) -> Axes:
    """Return an int or a sequence of ints as a tuple."""
    result = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    if any(isinstance(axis, bool) or not hasattr(axis, "__index__") for axis in result):
        raise TypeError(f"{name}: an int or a tuple of ints is needed, got {axes!r}")
    if len(set(result)) < len(result):
        raise ValueError(f"{name}: each axis may stand once, got {axes!r}")
    return tuple(axis.__index__() for axis in result)


def normalize_axes(axes: int | Iterable[int] | AllBut, ndim: int, name: str = "axes") -> Axes:
    """Return sorted non-negative axes of an array of ``ndim`` axes."""
    if isinstance(axes, AllBut):
        kept = normalize_axes(axes.axes, ndim, name)
        return tuple(axis for axis in range(ndim) if axis not in kept)
    result = []
    for index in axis_tuple(axes, name):
        if not -ndim <= index < ndim:
            raise ValueError(
                f"{name}: axis {index} is out of range for x with {ndim} axes; "
                f"from {-ndim} to {ndim - 1} would do"
            )
        result.append(index % ndim)
    if len(set(result)) < len(result):
        raise ValueError(f"{name}: each axis may stand once, got {axes!r} for {ndim} axes")
    return tuple(sorted(result))


def normalize_features(features: Axes | None, axes: Axes, ndim: int) -> Axes:
    """Return the axes that parameters span, for statistics over these axes.

    By default they are the kept ones where axis 0 is reduced, else the reduced ones.
    """
    if features is not None:
        return normalize_axes(features, ndim, "feature_axes")
    return normalize_axes(AllBut(axes), ndim) if 0 in axes else axes


def memory_order(x: Array, shape: Axes) -> Axes | None:
    """Return the axes of x from the slowest to the fastest in memory, or None if x has gaps.

    The axes are those of ``shape``, in which an axis of x may be two.
    """
    if x.flags.c_contiguous:
        return tuple(range(len(shape)))
    x = x.reshape(shape)
    order = sorted(range(x.ndim), key=lambda axis: (x.strides[axis] == 0, -x.strides[axis], axis))
    return tuple(order) if x.transpose(order).flags.c_contiguous else None


class Geometry:
    """What is reduced and what has parameters, for one shape of x.

    Attributes
    ----------
    shape : tuple of int
        The shape of x; where there are groups, their axis is split into (groups, size / groups).
    reductions : tuple of tuple of int
        For each statistic, the axes of ``shape`` that it reduces.
    features : tuple of int
        The axes of ``shape`` that the parameters span.
    param_shape : tuple of int
        The parameters' shape (one axis where ``shape`` has two for the groups).
    running_shape : tuple of int
        The shape of running statistics: the kept axes of the ``tracked`` reduction, but axis 0.
    param_grid, running_grid : tuple of int
        Both shapes again, as they broadcast to ``shape``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        reductions: tuple[Axes, ...],
        features: Axes,
        param_shape: tuple[int, ...],
        running_shape: tuple[int, ...],
        tracked: int,
        instance_axes: Axes,
    ) -> None:
        axes = range(len(shape))
        self.shape = shape
        self.reductions = reductions
        self.features = features
        self.param_shape = param_shape
        self.param_grid = tuple(shape[axis] if axis in features else 1 for axis in axes)
        self.tracked = tracked
        self.instance_axes = instance_axes
        kept = [axis for axis in axes if axis not in reductions[tracked] and axis != 0]
        self.running_shape = running_shape
        self.running_grid = tuple(shape[axis] if axis in kept else 1 for axis in axes)
        self.group_size = math.prod(shape[axis] for axis in reductions[tracked])
        # Whether each element is a group of its own in every statistic.
        reduced = {axis for axes in reductions for axis in axes}
        self.single_values = all(shape[axis] == 1 for axis in reduced)

    def inner(self, affine: bool) -> Axes:
        """Return the axes that every statistic reduces and no parameter spans."""
        outside = set(self.instance_axes) | set(self.features if affine else ())
        for reduced in self.reductions:
            outside |= set(range(len(self.shape))) - set(reduced)
        return tuple(axis for axis in range(len(self.shape)) if axis not in outside)

    def kept_sizes(self, reduced: Axes) -> Axes:
        """Return the shape of x with size 1 where an axis is reduced."""
        return tuple(1 if axis in reduced else n for axis, n in enumerate(self.shape))


def _split(axes: Iterable[int], axis: int, both: bool = True) -> Axes:
    """Return axes numbered anew after ``axis`` became two; itself is then both or the second."""
    result: list[int] = []
    for a in axes:
        result += [a] if a < axis else [a + 1] if a > axis else [a, a + 1] if both else [a + 1]
    return tuple(result)


@functools.lru_cache(maxsize=4096)
def geometry(
    shape: tuple[int, ...],
    reductions: tuple[Axes, ...],
    features: Axes,
    *,
    groups: int = 1,
    group_axis: int = 1,
    grouped: tuple[bool, ...] = (True,),
    tracked: int = 0,
    instance_axes: Axes = (),
) -> Geometry:
    """Return the geometry of statistics over ``reductions`` of an x of this shape.

    With ``groups``, ``group_axis`` is split into (groups, size / groups); a reduction that is
    ``grouped`` stays inside a group. ``tracked`` is the reduction with running statistics; no
    piece spans ``instance_axes``, whose every index has an instance of its own.
    """
    param_shape = tuple(shape[axis] for axis in features)
    kept = [axis for axis in range(1, len(shape)) if axis not in reductions[tracked]]
    running_shape = tuple(shape[axis] for axis in kept)
    if groups > 1:
        size = shape[group_axis]
        if size % groups:
            raise ValueError(
                f"groups: a divisor of {size}, the size of axis {group_axis} of x, is needed, "
                f"got {groups}; or an x of which it is one"
            )
        shape = (*shape[:group_axis], groups, size // groups, *shape[group_axis + 1 :])
        features, instance_axes = _split(features, group_axis), _split(instance_axes, group_axis)
        if grouped[tracked] and group_axis in reductions[tracked]:
            running_shape = (groups, *running_shape)
        reductions = tuple(
            _split(axes, group_axis, both=not inside)
            for axes, inside in zip(reductions, grouped, strict=True)
        )
    return Geometry(shape, reductions, features, param_shape, running_shape, tracked, instance_axes)
