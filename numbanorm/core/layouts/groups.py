"""Layouts for groups of a few rows, or columns, each with a weight, that fit in a cache."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from numbanorm.core.groups import group_of_pieces
from numbanorm.core.layouts.base import Arrangement, Gradients, Job, Saved, n_folded
from numbanorm.core.layouts.whole import WholeGroups, axes_around
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.kernels.access import HAS_RESIDUAL
from numbanorm.kernels.algebra import feature_gradients
from numbanorm.kernels.group_columns import backward_group_columns, forward_group_columns
from numbanorm.kernels.group_rows import group_rows
from numbanorm.kernels.modes import ColumnTiles, GroupTiles
from numbanorm.numba_ext.threads import call, run


@dataclasses.dataclass(frozen=True, eq=False)
class GroupsWithWeights(WholeGroups):
    """Groups of pieces, or of spans of columns, each with a weight.

    Attributes
    ----------
    grid : tuple of int
        All axes, with size 1 along those within a piece, or a column.
    """

    grid: Axes

    @functools.cached_property
    def features(self) -> NDArray[np.uint32]:
        """The number of the weight of each piece, (P,)."""
        shape = self.geometry.param_grid if self.affine else (1,) * len(self.grid)
        found = group_of_pieces(self.grid, self.order, shape)
        found.flags.writeable = False  # one type for kernels, whether it is a view or not
        return found

    @functools.cached_property
    def _has_own_features(self) -> bool:
        """Whether each piece has a weight of its own, in this order."""
        n = len(self.features)
        return self.parameter_view == (n,) and bool((self.features == np.arange(n)).all())

    @functools.cached_property
    def n_bytes(self) -> int:
        """Bytes of the table, which is made at once."""
        return self.features.nbytes

    def parameters(self, job: Job) -> Array:
        """Return weight and bias of each feature, in float64."""
        return self.feature_parameters(job)

    def _gradients(self, sums: Float64) -> Gradients:
        """Return the gradients of weight and bias from the sums of each piece, (2, P)."""
        if self._has_own_features:
            sums += 0.0  # as sums are, which are never -0.0
            gradients = sums[::-1]
        else:
            gradients = np.zeros((2, *self.parameter_view))
            call(feature_gradients, self.features, sums, gradients)
        return self.in_parameter_shape(gradients)


class _Axes(NamedTuple):
    """The axes of groups; ``span`` elements next to each other are a column."""

    before: list[int]
    rows: list[int]
    run: list[int]
    after: list[int]
    columns: list[int]
    span: int
    grid: Axes


def _group_axes(axes: Arrangement) -> _Axes | None:
    """Return the axes of groups that are handled at once, or None if they are scattered."""
    if not axes.single or 0 in axes.geometry.shape:
        return None
    before, rows, after = axes_around(axes.columns or axes.outer, axes.reduced)
    scattered = axes.outer if axes.columns else after
    if set(scattered) & set(axes.reduced) or (axes.columns and after):
        return None
    result = _Axes(before, rows, axes.run, after, axes.columns, 1, axes.grid(axes.run))
    inner, size, t = axes.geometry.inner(axes.affine), axes.size, axes.tuning
    one_weight = after and not set(rows) - set(inner)
    length, n_rows = size(axes.run), size(rows)
    many = n_rows >= t.many_rows or length <= t.row_over_rows * n_rows
    if not axes.columns and one_weight and length < t.short_row and many:
        # As columns, across the rows: a row would take longer to start than to run.
        grid = tuple(1 if axis in rows else n for axis, n in enumerate(result.grid))
        return _Axes(before, axes.run, rows, [], after + axes.run, size(axes.run), grid)
    return result


class GroupRows(GroupsWithWeights):
    """(A, R, B, L): the R rows of each of A * B groups have a weight each."""

    has_room_for_dy = True

    @classmethod
    def fit(cls, axes: Arrangement) -> Self | None:
        """Take groups of rows that fit in a cache."""
        group = _group_axes(axes)
        if group is None or group.columns:
            return None
        length, t = axes.size(group.run), axes.tuning
        a, r, b = axes.size(group.before), axes.size(group.rows), axes.size(group.after)
        if r == 1:
            a, b = a * b, 1
        size = r * length
        if size > t.slab:
            return None
        block = max(1, t.group_block // size if b == 1 else t.row_run // length)
        tiles = GroupTiles(block, block * size <= t.overlap)
        return cls(axes.geometry, axes.order, axes.affine, (a, r, b, length), tiles, t, group.grid)

    def forward_tiles(self, use_batch_stats: bool) -> GroupTiles:
        """Return how forward cuts x: where it only writes, in the order of memory."""
        tiles: GroupTiles = self.tiles
        if use_batch_stats or self.view[2] == 1:
            return tiles
        return GroupTiles(min(self.view[2], self.tuning.apply_width), False)

    def run_forward(
        self, x: Array, mask: Array | None, parameters: Array, job: Job, streamed: bool,
        groups: Float64, y: Array,
    ) -> Array:  # fmt: skip
        """Write y; return the parameters."""
        run(
            group_rows, y.size,
            None, x, mask, job.fused, self.features, parameters, (*job.mode,),
            (*self.forward_tiles(job.mode.use_batch_stats),), streamed, groups, y, None,
        )  # fmt: skip
        return parameters

    def backward(
        self, dy: Array, x: Array, saved: Saved, fused: Any, streamed: bool, dx: Array
    ) -> Gradients:
        """Write dx, with the sums of each row in the same kernel."""
        found, sums = saved.statistics, np.empty((2, len(self.features)))
        if saved.recipe.keeps_dy:
            # Without a residual it is in dx, whose lines are in a cache then.
            streamed = streamed and fused[HAS_RESIDUAL]
        run(
            group_rows, dy.size,
            dy, x, saved.mask, fused, self.features, found.parameters, (*saved.mode,),
            (*self.tiles,), streamed, found.groups, dx, sums,
        )  # fmt: skip
        return self._gradients(sums)


class GroupColumns(GroupsWithWeights):
    """(A, L, C): some columns next to each other are a group.

    With few columns, some rows of L are seen as one.
    """

    @classmethod
    def fit(cls, axes: Arrangement) -> Self | None:
        """Take groups of columns that fit in a cache."""
        group = _group_axes(axes)
        if group is None or not group.columns:
            return None
        length, t = axes.size(group.run), axes.tuning
        before = axes.outer if axes.columns else group.before
        a, r, c = axes.size(before), axes.size(group.rows), axes.size(group.columns)
        # Narrow rows are slow to read, as each is in another page of memory.
        narrow = max(t.column_width, min(t.column_block, t.long_task // length))
        width = t.column_block if a > 1 else narrow
        width = min(c, r * max(1, width // r))
        if length * width > t.slab:
            return None
        fold = n_folded(length, c, t) if width == c else 1
        tiles = ColumnTiles(width * fold, group.span)
        view = a, length // fold, fold * c
        return cls(axes.geometry, axes.order, axes.affine, view, tiles, t, group.grid)

    def forward_tiles(self, use_batch_stats: bool) -> ColumnTiles:
        """Return how forward cuts x: where it only writes, in long runs of memory."""
        tiles: ColumnTiles = self.tiles
        if use_batch_stats or tiles.width == self.view[2]:
            return tiles
        n_spans, n_groups = len(self.features) // self.view[0], self.n_groups // self.view[0]
        size = n_spans * tiles.span // n_groups
        n_columns, t = math.prod(self.view[::2]), self.tuning
        width = size * max(1, min(t.apply_width, n_columns // t.apply_tasks) // size)
        return ColumnTiles(min(width, self.view[2]), tiles.span)

    def streams(self, use_batch_stats: bool = True) -> bool:
        """Tell whether parts of rows are long enough: the lines at their ends are written twice."""
        least = min(self.view[-1], self.tuning.stream_parts_from)
        width = self.forward_tiles(use_batch_stats).width
        return bool(width >= max(self.tuning.stream_from, least))

    def run_forward(
        self, x: Array, mask: Array | None, parameters: Array, job: Job, streamed: bool,
        groups: Float64, y: Array,
    ) -> Array:  # fmt: skip
        """Write y; return the parameters."""
        run(
            forward_group_columns, y.size,
            x, mask, job.fused, self.features, parameters, (*job.mode,),
            (*self.forward_tiles(job.mode.use_batch_stats),), streamed, groups, y,
        )  # fmt: skip
        return parameters

    def backward(
        self, dy: Array, x: Array, saved: Saved, fused: Any, streamed: bool, dx: Array
    ) -> Gradients:
        """Write dx, with the sums of each span of columns in the same kernel."""
        found, sums = saved.statistics, np.empty((2, len(self.features)))
        run(
            backward_group_columns, dy.size,
            dy, x, saved.mask, fused, self.features, found.parameters, (*saved.mode,),
            (*self.tiles,), streamed, found.groups, dx, sums,
        )  # fmt: skip
        return self._gradients(sums)
