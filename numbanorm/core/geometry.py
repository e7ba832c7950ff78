"""Shape algebra: from axes of any array to the plain two to four axes of a kernel.

A :class:`Geometry` says what a layer normalises over, for one shape of x. It knows the axes that
each statistic reduces, and the axes that the parameters span. An axis that every statistic
reduces and no parameter spans is *inner*: its elements share their statistics and parameters,
and make up a *piece*. In (N, C, H, W) with channel parameters a piece is an instance, H x W.

A :class:`Plan` is a geometry for one order of the axes in memory. The kernels see the last run
of inner axes as one axis of length L; all that stands before or after it counts pieces:

    rows      (P, L)         the inner axes come last            N, C, (H, W)
    columns   (A, L, C)      other axes follow the inner ones    N, (H, W), C
    elements  (M, D)         a row is a group of a single statistic, with a weight for each element,
                             or one for a few next to each other
              (A, D, B)      a column is, and a row of it has a weight
    groups    (A, R, B, L)   R rows are a group of a single statistic, and fit in cache
              (A, L, C)      some columns are

It is made once for a shape and kept.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numbanorm.core.types import Array, Axes
from numbanorm.tuning import Tuning, tuning


class AllBut(NamedTuple):
    """All axes but these, for an x of any rank."""

    axes: Axes


def axis_tuple(axes: int | Iterable[int], name: str) -> Axes:
    """Return an int or a sequence of ints as a tuple."""
    found = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    if any(isinstance(axis, bool) or not hasattr(axis, "__index__") for axis in found):
        raise TypeError(f"{name}: an int or a tuple of ints is needed, got {axes!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"{name}: each axis may stand once, got {axes!r}")
    return tuple(axis.__index__() for axis in found)


def normalize_axes(axes: int | Iterable[int] | AllBut, ndim: int, name: str = "axes") -> Axes:
    """Return sorted non-negative axes of an array of ``ndim`` axes."""
    if isinstance(axes, AllBut):
        kept = normalize_axes(axes.axes, ndim, name)
        return tuple(axis for axis in range(ndim) if axis not in kept)
    found = []
    for index in axis_tuple(axes, name):
        if not -ndim <= index < ndim:
            raise ValueError(
                f"{name}: axis {index} is out of range for x with {ndim} axes; "
                f"from {-ndim} to {ndim - 1} would do"
            )
        found.append(index % ndim)
    if len(set(found)) < len(found):
        raise ValueError(f"{name}: each axis may stand once, got {axes!r} for {ndim} axes")
    return tuple(sorted(found))


def memory_order(x: Array, shape: Axes) -> Axes | None:
    """Return the axes of x from the slowest to the fastest in memory, or None if x has gaps.

    The axes are those of ``shape``, in which an axis of x may be two.
    """
    if x.flags.c_contiguous:
        return tuple(range(len(shape)))
    x = x.reshape(shape)
    order = sorted(range(x.ndim), key=lambda axis: (x.strides[axis] == 0, -x.strides[axis], axis))
    return tuple(order) if x.transpose(order).flags.c_contiguous else None


class Tiles(NamedTuple):
    """How a kernel cuts its work: ``n_parts`` parts of ``part`` elements along L.

    ``block`` is the number of parts in a task (rows), or of columns in a task (columns).
    """

    n_parts: int
    part: int
    block: int


class Segments(NamedTuple):
    """A table of groups, for pieces in segments of one length.

    In a segment all pieces are in one group, or each is in the next one: ``step`` is 0 or 1.

    Attributes
    ----------
    first : (S, n) array of int64
        The group of the first piece of each of n segments in each of S statistics.
    step : (S,) array of int64
        From one piece to the next.
    """

    first: NDArray[np.int64]
    step: NDArray[np.int64]


def segments(of_piece: NDArray[np.uint32]) -> Segments:
    """Return a table (S, P) as segments, which are as long as can be."""
    table = of_piece.astype(np.int64)
    steps = table[:, 1:] - table[:, :-1]
    step = steps[:, 0] if steps.size else np.zeros(len(of_piece), np.int64)
    # The pieces are those of a grid: how a table goes on at the end of one axis it does at all.
    ends = np.flatnonzero((steps != step[:, None]).any(0) | ((step != 0) & (step != 1)).any())
    length = int(ends[0]) + 1 if ends.size else max(1, of_piece.shape[1])
    first = np.ascontiguousarray(table[:, ::length])
    found = Segments(first, step.copy() if length > 1 else np.zeros_like(step))
    for array in found:
        array.flags.writeable = False
    return found


class Groups(NamedTuple):
    """Which group of each statistic a piece is in, as a table.

    The groups are numbered through all statistics; those of one statistic are in the C order of
    its kept axes.

    Attributes
    ----------
    of_piece : (S, P) array of uint32
        The group of each of P pieces in each of S statistics.
    segments : Segments
        The same.
    bounds : (S + 1,) array of int64
        The first group of each statistic, and G, the number of all.
    shapes, slices : tuple
        For each statistic, the shape of its groups as it broadcasts to x, and where they stand.
    """

    of_piece: NDArray[np.uint32]
    segments: Segments
    bounds: NDArray[np.int64]
    shapes: tuple[Axes, ...]
    slices: tuple[slice, ...]

    @property
    def total(self) -> int:
        """The number of groups of all statistics."""
        return int(self.bounds[-1])


def groups(grid: Axes, order: Axes, kept_sizes: Iterable[Axes]) -> Groups:
    """Return the groups of the pieces of a grid, which are numbered in this order of its axes.

    ``kept_sizes`` has the sizes of the kept axes of each statistic, and 1 for the reduced ones.
    """
    first, of_piece, shapes, slices = 0, [], tuple(kept_sizes), []
    for shape in shapes:
        n = math.prod(shape)
        # Unsigned, as a kernel would ask of each whether it counts from the end.
        numbers = np.arange(first, first + n, dtype=np.uint32).reshape(shape)
        of_piece.append(np.broadcast_to(numbers, grid).transpose(order).ravel())
        slices.append(slice(first, first + n))
        first += n
    table = np.stack(of_piece)
    table.flags.writeable = False
    bounds = np.array([0, *(where.stop for where in slices)])
    return Groups(table, segments(table), bounds, shapes, tuple(slices))


class Plan:
    """A geometry for one order of the axes in memory.

    Attributes
    ----------
    order : tuple of int
        The axes from the slowest to the fastest in memory; kernels work in this order.
    view : tuple of int
        (P, L) for rows, (A, L, C) for columns, (M, D) or (A, D, B) for elements, (A, R, B, L) or
        (A, L, C) for groups.
    elements : bool
        Whether each row, or column, is a group with a weight for each element.
    by_group : bool
        Whether whole groups are handled at once.
    span : int
        This many elements, or columns, next to each other share a parameter.
    weights_shape : tuple of int
        Shape of the weights, as the kernels see them: (F,) of each feature, (D,) of each element
        for (A, D, B), or (G, D / span) for (M, D), if those of row i are those of row i + G.
    tiles : Tiles
        How the kernels cut the view.
    run : int
        Rows (M, D) of a sample that are handled for all samples in turn: all G, or a part of them.
    instance, instance_size : tuple of int, int
        The inner axes, which pieces may divide, and the number of elements in them.
    fold : int
        With few columns, this many rows of L are seen as one, to make long rows.
    """

    def __init__(
        self, geometry: "Geometry", order: Axes, affine: bool, fused: bool, masked: bool
    ) -> None:
        self.geometry, self.affine, self.tuning = geometry, affine, tuning()
        shape, reduced = geometry.shape, geometry.reductions[0]
        wide = [axis for axis in order if shape[axis] != 1]
        kept = [axis for axis in wide if axis not in reduced]
        features = [axis for axis in geometry.features if shape[axis] != 1] if affine else []
        single = len(geometry.reductions) == 1 and not geometry.apart
        single = single and fused and self.tuning.whole_groups
        per_element = single and bool(features) and set(features) == set(wide) - set(kept)
        reduced_wide = [axis for axis in wide if axis in reduced]
        trailing = wide == kept + reduced_wide
        first, n_axes = wide.index(reduced_wide[0]) if reduced_wide else 0, len(reduced_wide)
        in_columns = not masked and wide[first : first + n_axes] == reduced_wide
        if per_element and not trailing and not in_columns:
            # The one case that needs a copy of x: a group must be a row or a column.
            order = tuple(a for a in order if a not in reduced) + tuple(
                a for a in range(len(shape)) if a in reduced
            )
        self.order = order
        self.inverse_order = tuple(int(axis) for axis in np.argsort(order))
        self.in_order = order == self.inverse_order == tuple(range(len(shape)))
        self.elements = per_element
        self.by_group = per_element
        self.weights_shape: tuple[int, ...] = (math.prod(geometry.param_grid) if affine else 1,)
        self.fold = self.span = 1
        self.instance = geometry.inner(affine)
        self.instance_size = self._size(self.instance)
        self.view: tuple[int, ...]
        if per_element:
            self.grid = geometry.kept_sizes(reduced)
            if trailing or not in_columns:
                self._see_element_rows(self._size(kept), self._size(reduced), 1)
            else:
                self._see_element_columns(wide[:first], reduced, wide[first + n_axes :])
            return
        inner = set(self.instance)
        end = len(wide)
        while end > 0 and wide[end - 1] not in inner:
            end -= 1
        start = end
        while start > 0 and wide[start - 1] in inner:
            start -= 1
        if start == end:  # nothing is inner: each element is a piece
            start = end = len(wide)
        outer, run, columns = wide[:start], wide[start:end], wide[end:]
        self.grid = tuple(1 if axis in run else n for axis, n in enumerate(shape))
        self.by_group = single and 0 not in shape and self._see_groups(outer, run, columns)
        if not self.by_group:
            self._see_pieces(outer, run, columns)

    def _size(self, axes: Iterable[int]) -> int:
        """Return the number of elements along some axes."""
        return math.prod(self.geometry.shape[axis] for axis in axes)

    def _see_element_rows(self, m: int, d: int, n_weights: int) -> None:
        self.view, self.weights_shape = (m, d), (n_weights, d // self.span)
        block, self.run = (
            max(1, self.tuning.group_block // max(d, 1)),
            _divisor(n_weights, self.tuning.run // max(d, 1)),
        )
        n_runs = n_weights // self.run
        self.tiles = Tiles(1, d, block if n_runs == 1 else _divisor(n_weights, block))
        # Each part of the samples has its own sums of the parameters' gradients, which takes room
        # and time. Samples of several rows are longer, so that fewer make a part. Powers of 2 are
        # shared out evenly.
        n_samples = m // n_weights
        several = 1 if m * d < self.tuning.long_task else min(n_samples, 2)
        n_tasks = min(max(n_samples // (64 if n_weights == 1 else 8), several), self.tuning.tasks)
        n_parts = max(1, n_tasks // n_runs)
        self.gradient_parts = 1 << (n_parts.bit_length() - 1), n_weights * d // self.span

    def _see_element_columns(
        self, outer: Iterable[int], reduced: Iterable[int], within: Iterable[int]
    ) -> None:
        a, d, b = self._size(outer), self._size(reduced), self._size(within)
        self.view, self.weights_shape = (a, d, b), (d,)
        width = max(
            64,
            min(
                self.tuning.column_run,
                max(self.tuning.cached_group // max(d, 1), a * b // self.tuning.tasks),
            ),
        )
        # All blocks of a row about as wide, in steps of a kernel's loops.
        n_blocks = max(1, -(-b // width))
        width = max(1, min(b, -(-b // (n_blocks * 64)) * 64))
        self.tiles = Tiles(1, d, width)
        # Each part has its own sums of the parameters' gradients.
        n_parts = (
            1 if a * d * b < self.tuning.long_task else min(a * -(-b // width), self.tuning.tasks)
        )
        self.gradient_parts = n_parts, d

    def _see_pieces(self, outer: list[int], run: list[int], columns: list[int]) -> None:
        a, length, c = self._size(outer), self._size(run), self._size(columns)
        if not columns:
            self.view = (a, length)
            n_parts = max(1, -(-length // self.tuning.row_part))
            part = max(1, -(-length // n_parts))
            self.tiles = Tiles(
                n_parts, part, max(1, self.tuning.task // part) if n_parts == 1 else 1
            )
            return
        self.fold = _fold(length, c)
        length, c = length // self.fold, c * self.fold
        self.view = (a, length, c)
        block = min(max(c, 1), self.tuning.column_block)
        n_tasks = max(1, a * -(-c // block))
        n_parts = max(
            min(
                -(-self.tuning.tasks // n_tasks),
                max(1, length * block // self.tuning.long_task),
                length // self.tuning.least_rows,
            ),
            -(-length // self.tuning.column_part),
            1,
        )
        part = max(1, -(-length // n_parts))
        self.tiles = Tiles(max(1, -(-length // part)), part, block)

    def _see_groups(self, outer: list[int], run: list[int], columns: list[int]) -> bool:
        """Handle whole groups at once where they fit in cache; tell whether they do.

        The axes are ``outer``, then the ``run`` of inner ones, then ``columns``.
        """
        size, reduced = self._size, self.geometry.reductions[0]
        before, rows, after = _around(columns or outer, reduced)
        scattered = any(axis in reduced for axis in (outer if columns else after))
        if scattered or (columns and after):
            return False
        span, grid = 1, self.grid
        one_weight = after and not set(rows) - set(self.instance)
        if (
            not columns
            and one_weight
            and size(run) < self.tuning.short_row
            and size(rows) >= self.tuning.many_rows
        ):
            # Across the rows: each would take longer to start than to run.
            span, grid = size(run), tuple(1 if axis in rows else n for axis, n in enumerate(grid))
            outer, rows, run, columns = before, run, rows, after + run
        length = size(run)
        if columns:
            a, r, c = size(outer), size(rows), size(columns)
            # Narrow rows are slow to read, as each is on a memory page of its own.
            narrow = max(
                self.tuning.column_width,
                min(self.tuning.column_block, self.tuning.long_task // length),
            )
            width = self.tuning.column_block if a > 1 else narrow
            width = min(c, r * max(1, width // r))
            if length * width > self.tuning.slab:
                return False
            self.fold = _fold(length, c) if width == c else 1
            self.view = (a, length // self.fold, self.fold * c)
            self.tiles = Tiles(1, length, width * self.fold)
        else:
            a, r, b = size(before), size(rows), size(after)
            if b == 1 and self._see_group_rows(outer, rows, run):
                return True
            if r == 1:
                a, b = a * b, 1
            d = r * length
            if d > self.tuning.slab:
                return False
            self.view = (a, r, b, length)
            self.tiles = Tiles(
                1,
                length,
                max(1, self.tuning.group_block // d if b == 1 else self.tuning.row_run // length),
            )
        self.span, self.grid = span, grid
        return True

    def _see_group_rows(self, outer: list[int], rows: list[int], run: list[int]) -> bool:
        """See a group of short rows as a row with a weight for each element; tell whether it pays.

        The axes ``outer`` end with the ``rows`` of a group, and each row is a ``run``.
        """
        features = [axis for axis in outer if axis in self.geometry.features]
        start = len(outer) - len(features)
        n_rows, length = self._size(rows), self._size(run)
        n_samples, n_parameters = self._size(outer[:start]), self._size(features)
        fits = set(rows) <= set(features) and outer[start:] == features
        few = (
            length >= self.tuning.tiny_row
            or n_rows < self.tuning.few_rows
            or n_samples < self.tuning.few_samples
        )
        n_weights = n_parameters // n_rows
        room = (
            n_samples * n_weights >= self.tuning.few_groups
            and n_parameters * length <= self.tuning.many_weights
        )
        if not fits or few or not room:
            return False
        self.elements, self.span = True, length
        self._see_element_rows(n_samples * n_weights, n_rows * length, n_weights)
        return True

    @functools.cached_property
    def cut(self) -> tuple[int, ...]:
        """How the kernels of whole groups cut the view."""
        block = self.tiles.block
        if self.columns:
            return (block,) if self.elements else (block, self.span)
        size = math.prod(self.view) // max(self.n_groups, 1)
        beside = block * size <= self.tuning.overlap
        return (self.run, block, beside) if self.elements else (block, beside)

    @property
    def columns(self) -> bool:
        """Whether pieces, or groups, are columns of the view."""
        return len(self.view) == 3

    @functools.cached_property
    def parts(self) -> tuple[int, int, int]:
        """Shape (A, K, B) of what a kernel returns: K parts of each of A * B pieces."""
        columns = self.view[2] // self.fold if self.columns else 1
        return self.view[0], self.tiles.n_parts, columns

    @functools.cached_property
    def pieces(self) -> tuple[int, int]:
        """Shape (A, B) of a value for each piece."""
        a, _, b = self.parts
        return a, b

    @functools.cached_property
    def groups(self) -> Groups:
        """The groups of each statistic."""
        return self._groups(self.geometry.reductions)

    @functools.cached_property
    def instances(self) -> Groups:
        """The instances, which pieces may divide."""
        return self._groups((self.instance,))

    @functools.cached_property
    def groups_of_instances(self) -> Groups:
        """The groups of each statistic, with instances for pieces."""
        (grid,) = self.instances.shapes
        sizes = map(self.geometry.kept_sizes, self.geometry.reductions)
        return groups(grid, tuple(range(len(grid))), sizes)

    @functools.cached_property
    def groups_of_parts(self) -> Groups:
        """The groups of each statistic, with the K parts of a piece for pieces."""
        return self.of_parts(self.groups)

    @functools.cached_property
    def instances_of_parts(self) -> Groups:
        """The instances, with the K parts of a piece for pieces."""
        return self.of_parts(self.instances)

    def of_parts(self, groups: Groups) -> Groups:
        """Return the groups of the K parts of each piece."""
        a, k, b = self.parts
        n = len(groups.of_piece)
        of_piece = groups.of_piece.reshape(n, a, 1, b)
        of_part = np.broadcast_to(of_piece, (n, a, k, b)).reshape(n, a * k * b)
        of_part.flags.writeable = False
        return groups._replace(of_piece=of_part, segments=segments(of_part))

    def _groups(self, reductions: Iterable[Axes]) -> Groups:
        return groups(self.grid, self.order, map(self.geometry.kept_sizes, reductions))

    @functools.cached_property
    def segments(self) -> Segments:
        """The groups of each statistic, the weight and the instance of each piece."""
        return segments(
            np.stack((*self.groups.of_piece, self.features, self.instances.of_piece[0]))
        )

    @functools.cached_property
    def features(self) -> NDArray[np.uint32]:
        """The number of the weight of each piece, (P,)."""
        shape = self.geometry.param_grid if self.affine else (1,) * len(self.grid)
        numbers: NDArray[np.uint32] = groups(self.grid, self.order, (shape,)).of_piece[0]
        return numbers

    def to_view(self, x: Array) -> Array:
        """Return x as the kernels see it: read-only, and copied only if its order differs."""
        if not x.flags.c_contiguous or not self.in_order:
            x = np.ascontiguousarray(x.reshape(self.geometry.shape).transpose(self.order))
        view = x.reshape(self.view)
        # Read-only arrays are a type of their own for Numba: with all inputs of that type,
        # there is one machine code for them and for those that the user may write to.
        view.flags.writeable = False
        return view

    def to_target(self, y: Array) -> tuple[Array, Array | None]:
        """Return where the kernels write y, and if that is not y itself, y as it is to be set."""
        if self.in_order and y.flags.c_contiguous and y.flags.aligned:
            return y.reshape(self.view), None
        in_memory = y.reshape(self.geometry.shape).transpose(self.order)
        if in_memory.flags.c_contiguous and in_memory.flags.aligned:
            return in_memory.reshape(self.view), None
        return np.empty(self.view, y.dtype), in_memory

    @functools.cached_property
    def groups_in_memory(self) -> tuple[int, ...]:
        """The kept axes in memory order, and 1 for the reduced ones."""
        sizes = self.geometry.kept_sizes(self.geometry.reductions[0])
        return tuple(sizes[axis] for axis in self.order)

    @functools.cached_property
    def n_groups(self) -> int:
        """The number of groups of the first statistic."""
        return math.prod(self.groups_in_memory)

    @functools.cached_property
    def ones(self) -> NDArray[np.float64]:
        """1 for each group."""
        return np.ones(self.n_groups)

    def to_grid(self, groups: Array) -> Array:
        """Return a value for each group with the axes of x (reduced ones 1)."""
        return groups.reshape(self.groups_in_memory).transpose(self.inverse_order)

    def from_grid(self, *values: Any) -> NDArray[np.float64]:
        """Return n arrays that broadcast to x, a value for each group, as the kernels see them.

        They are one array (n, G).
        """
        groups = np.empty((len(values), *self.groups_in_memory))
        for own, value in zip(groups, values, strict=True):
            own.transpose(self.inverse_order)[...] = value
        return groups.reshape(len(values), self.n_groups)


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
        apart: Axes,
    ) -> None:
        axes = range(len(shape))
        self.shape = shape
        self.reductions = reductions
        self.features = features
        self.param_shape = param_shape
        self.param_grid = tuple(shape[axis] if axis in features else 1 for axis in axes)
        self.tracked = tracked
        self.apart = apart
        kept = [axis for axis in axes if axis not in reductions[tracked] and axis != 0]
        self.running_shape = running_shape
        self.running_grid = tuple(shape[axis] if axis in kept else 1 for axis in axes)
        self.group_size = math.prod(shape[axis] for axis in reductions[tracked])
        self._plans: dict[tuple[Axes, bool, bool, bool, Tuning], Plan] = {}

    def inner(self, affine: bool) -> Axes:
        """Return the axes that every statistic reduces and no parameter spans."""
        outside = set(self.apart) | set(self.features if affine else ())
        for reduced in self.reductions:
            outside |= set(range(len(self.shape))) - set(reduced)
        return tuple(axis for axis in range(len(self.shape)) if axis not in outside)

    def kept_sizes(self, reduced: Axes) -> Axes:
        """Return the shape of x with size 1 where an axis is reduced."""
        return tuple(1 if axis in reduced else n for axis, n in enumerate(self.shape))

    def plan(self, order: Axes, affine: bool, fused: bool = True, masked: bool = False) -> Plan:
        """Return the plan for axes of this order in memory, with or without parameters.

        If not ``fused``, it is one for pieces, also where whole groups could be handled at once.
        """
        key = order, affine, fused, masked, tuning()
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = Plan(self, order, affine, fused, masked)
        return plan


def _divisor(n: int, most: int) -> int:
    """Return the largest divisor of n that is not above ``most``, or 1."""
    return max(k for k in range(1, max(min(n, most), 1) + 1) if n % k == 0)


def _fold(length: int, n_columns: int) -> int:
    """Return how many rows are seen as one: short ones cost more to start than to run."""
    return _divisor(length, min(tuning().column_fold // max(n_columns, 1), length // 16))


def _around(axes: list[int], reduced: Axes) -> tuple[list[int], list[int], list[int]]:
    """Return the axes before the first run of reduced ones, that run, and what follows it."""
    start = next((i for i, axis in enumerate(axes) if axis in reduced), len(axes))
    end = next((i for i in range(start, len(axes)) if axes[i] not in reduced), len(axes))
    return axes[:start], axes[start:end], axes[end:]


def _split(axes: Iterable[int], axis: int, both: bool = True) -> Axes:
    """Return axes numbered anew after ``axis`` became two; itself is then both or the second."""
    found: list[int] = []
    for a in axes:
        found += [a] if a < axis else [a + 1] if a > axis else [a, a + 1] if both else [a + 1]
    return tuple(found)


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
    apart: Axes = (),
) -> Geometry:
    """Return the geometry of statistics over ``reductions`` of an x of this shape.

    With ``groups``, ``group_axis`` is split into (groups, size / groups); a reduction that is
    ``grouped`` stays inside a group. ``tracked`` is the reduction with running statistics; no
    piece spans the axes ``apart``.
    """
    param_shape = tuple(shape[axis] for axis in features)
    kept = [axis for axis in range(1, len(shape)) if axis not in reductions[tracked]]
    running_shape = tuple(shape[axis] for axis in kept)
    if groups > 1:
        size = shape[group_axis]
        if size % groups:
            raise ValueError(
                f"x: axis {group_axis} of size {size} cannot be split into {groups} groups; "
                f"a multiple of {groups} would do"
            )
        shape = (*shape[:group_axis], groups, size // groups, *shape[group_axis + 1 :])
        features, apart = _split(features, group_axis), _split(apart, group_axis)
        if grouped[tracked] and group_axis in reductions[tracked]:
            running_shape = (groups, *running_shape)
        reductions = tuple(
            _split(axes, group_axis, both=not inside)
            for axes, inside in zip(reductions, grouped, strict=True)
        )
    return Geometry(shape, reductions, features, param_shape, running_shape, tracked, apart)
