"""Layouts for a weight for each element of a group: a row, or a column, is a group.

It fits in a cache, so that its statistics and its output are one pass over memory together.
"""

import dataclasses
import functools
import math
from typing import Any, Self

import numpy as np

from numbanorm.core.groups import Groups, Segments, number_groups, segments
from numbanorm.core.layouts.base import (
    Arrangement,
    Gradients,
    Job,
    Saved,
    largest_divisor,
)
from numbanorm.core.layouts.pieces import merge_groups
from numbanorm.core.layouts.whole import WholeGroups, axes_around
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.kernels.element_columns import backward_element_columns, forward_element_columns
from numbanorm.kernels.element_parts import apply_element_parts, reduce_element_parts
from numbanorm.kernels.element_rows import backward_element_rows, forward_element_rows
from numbanorm.kernels.modes import ColumnTiles, ElementTiles, PieceTiles
from numbanorm.kernels.reduce import reduce_rows
from numbanorm.numba_ext.threads import run


@dataclasses.dataclass(frozen=True, eq=False)
class Elements(WholeGroups):
    """Weights of elements, in the type of x.

    Attributes
    ----------
    weights : tuple of int
        Shape of the weights as the kernels see them.
    n_parts : int
        Each part of x has its own sums of the parameters' gradients, which takes room and time.
    """

    weights: Axes
    n_parts: int

    def parameters(self, job: Job) -> Array:
        """Return weight and bias of each element in the order of memory, (2, ...)."""
        parameters = self.weight_and_bias(job, job.recipe.arithmetic)
        if not self.in_order:
            axes = 0, *(axis + 1 for axis in self.order)
            parameters = parameters.reshape(2, *self.geometry.param_grid).transpose(axes)
        return np.ascontiguousarray(parameters).reshape(2, *self.weights)

    @functools.cached_property
    def _parts_shape(self) -> Axes:
        return 2, self.n_parts, math.prod(self.weights)

    def _new_gradients(self, saved: Saved) -> Float64:
        """Return memory for the gradients of each part, (2, T, F), or (2, T, 0) if not needed."""
        if saved.recipe.has_weight or saved.recipe.has_bias:
            return np.zeros(self._parts_shape)
        return np.zeros((2, self.tuning.tasks, 0))

    def _sum_gradients(self, parts: Float64, saved: Saved) -> Gradients:
        """Return the gradients of weight and bias, if there are any, from those of all parts."""
        if not (saved.recipe.has_weight or saved.recipe.has_bias):
            return Gradients(parts[0], parts[1])
        return self._in_order(parts if self.n_parts == 1 else _sum(parts))

    def _in_order(self, sums: Array) -> Gradients:
        """Return the gradients of weight and bias in the parameters' shape."""
        geometry = self.geometry
        if not self.in_order:
            sums = sums.reshape(2, *(geometry.param_grid[axis] for axis in self.order))
            sums = sums.transpose(0, *(axis + 1 for axis in self.inverse_order))
        return self.in_parameter_shape(sums)


@np.errstate(all="ignore")  # NaN and Inf are the user's, and reach what they should
def _sum(parts: Float64, axis: int = 1) -> Float64:
    total: Float64 = parts.sum(axis)
    return total


@functools.lru_cache(maxsize=4)
def _constant(value: int, n: int, dtype: Any) -> Array:
    """Return a read-only array of one value."""
    array = np.full(n, value, dtype)
    array.flags.writeable = False
    return array


def _has_element_weights(axes: Arrangement) -> bool:
    """Tell whether each element of a group has a weight of its own."""
    return axes.single and bool(axes.features) and set(axes.features) == set(axes.reduced)


def _are_columns(axes: Arrangement) -> bool:
    """Tell whether groups are columns: the reduced axes are next to each other, but not last."""
    _, reduced, after = axes_around(axes.wide, axes.reduced)
    return not axes.masked and bool(after) and len(reduced) == len(axes.reduced)


def _order_of_rows(axes: Arrangement) -> Axes:
    """Return the order of memory, or where the reduced axes do not come last, another one."""
    if axes.wide == axes.kept + axes.reduced:
        return axes.order
    reduced = axes.geometry.reductions[0]
    return (
        *(axis for axis in axes.order if axis not in reduced),
        *(axis for axis in range(len(axes.order)) if axis in reduced),
    )


class ElementParts(Elements):
    """(M, D): as ElementRows, where rows are so long that a part of each is a task.

    The weights are (D,).
    """

    @classmethod
    def fit(cls, axes: Arrangement) -> Self | None:
        """Take long groups of elements that each have a weight."""
        m, d, t = axes.size(axes.kept), axes.size(axes.reduced), axes.tuning
        if not _has_element_weights(axes) or _are_columns(axes) or d < t.long_row:
            return None
        if m * d > t.long_rows >= 8 * d:
            return None
        part = min(t.element_part, d)
        tiles, order = PieceTiles(part, 1), _order_of_rows(axes)
        return cls(axes.geometry, order, axes.affine, (m, d), tiles, t, (d,), -(-d // part))

    def streams(self, use_batch_stats: bool = True) -> bool:
        """Tell whether parts of rows are long enough: the lines at their ends are written twice."""
        return bool(self.tiles.part >= self.tuning.stream_parts_from)

    def parameters(self, job: Job) -> Any:
        """Return weight and bias of each element in the order of memory, (D,)."""
        dtype = job.recipe.arithmetic
        return tuple(
            unused if array is None else self._in_memory(array.astype(dtype, copy=False))
            for array, unused in zip((job.weight, job.bias), self._unused(dtype), strict=True)
        )

    def _unused(self, dtype: Any) -> tuple[Array, Array]:
        """Return the weight and the bias of a layer without."""
        return _constant(1, self.view[1], dtype), _constant(0, self.view[1], dtype)

    def _in_memory(self, array: Array) -> Array:
        """Return a read-only view of a parameter in the order of memory, or a copy."""
        if not self.in_order:
            array = array.reshape(self.geometry.param_grid).transpose(self.order)
        view = np.ascontiguousarray(array).reshape(self.weights)
        view.flags.writeable = False
        return view

    @functools.cached_property
    def _reduce_tiles(self) -> PieceTiles:
        return PieceTiles(min(self.tuning.row_part, self.view[1]), 1)

    @functools.cached_property
    def _groups(self) -> Groups:
        return number_groups(((self.view[0],),))

    @functools.cached_property
    def _segments(self) -> Segments:
        n_parts = -(-self.view[1] // max(self._reduce_tiles.part, 1))
        return segments(np.repeat(np.arange(self.view[0], dtype=np.uint32), n_parts)[None])

    def run_forward(
        self, x: Array, mask: Array | None, parameters: Any, job: Job, streamed: bool,
        groups: Float64, y: Array,
    ) -> Any:  # fmt: skip
        """Take moments of parts of rows, merge them, and write y; return copies of parameters.

        The kernel makes them, as it reads parameters anyway; backward reads the bias with an
        activation or a residual alone.
        """
        if job.mode.use_batch_stats:
            n_parts = -(-self.view[1] // self._reduce_tiles.part)
            moments = np.empty((4, self.view[0], n_parts, 1))
            run(
                reduce_rows, x.size,
                None, x, mask, None, None, (*self._reduce_tiles,), None, moments,
            )  # fmt: skip
            merged = merge_groups(
                moments.reshape(4, -1), self._groups, self._segments, job.mode.center, 0
            )
            groups[:] = merged[:3]
        kept = np.empty((1 if job.fused is None else 2, self.view[1]), job.recipe.arithmetic)
        run(
            apply_element_parts, y.size,
            None, x, None, job.fused, *parameters, (*job.mode,), (*self.tiles,), streamed, groups,
            groups, y, kept,
        )  # fmt: skip
        kept.flags.writeable = False
        return kept[0], kept[-1]

    def backward(
        self, dy: Array, x: Array, saved: Saved, fused: Any, streamed: bool, dx: Array
    ) -> Gradients:
        """Reduce parts of rows, with the gradients of parameters, and write dx."""
        found, recipe = saved.statistics, saved.recipe
        has_gradients = recipe.has_weight or recipe.has_bias
        (m, d), mode, tiles = self.view, (*recipe.mode,), (*self.tiles,)
        sums = np.empty((2, m, self.n_parts))
        gradients = np.empty((2, d if has_gradients else 0), recipe.gradient_dtype)
        run(
            reduce_element_parts, dy.size,
            dy, x, saved.mask, fused, *found.parameters, mode, tiles, found.groups, sums, gradients,
        )  # fmt: skip
        run(
            apply_element_parts, dy.size,
            dy, x, saved.mask, fused, *found.parameters, mode, tiles, streamed, found.groups,
            _sum(sums, 2), dx, np.empty((0, d), recipe.arithmetic),
        )  # fmt: skip
        return self._in_order(gradients) if has_gradients else Gradients(*gradients)


class ElementRows(Elements):
    """(M, D): row i is a group, and each of its D elements has a weight, or a few alike have one.

    The weights are (G, D / span), and rows i and i + G have the same: each of the M / G samples has
    G groups. The one case that needs a copy of x is that of groups that are neither rows nor
    columns.
    """

    @classmethod
    def fit(cls, axes: Arrangement) -> Self | None:
        """Take groups of elements that each have a weight, or rows that are short."""
        if not _has_element_weights(axes):
            return cls._fit_short_rows(axes)
        if _are_columns(axes):
            return None
        return cls._of_size(
            axes, _order_of_rows(axes), axes.size(axes.kept), axes.size(axes.reduced), 1, 1
        )

    @classmethod
    def _fit_short_rows(cls, axes: Arrangement) -> Self | None:
        """See a group of short rows as a row with a weight for each element, where it pays.

        The axes before the rows end with those of a group, and each row is a run of inner ones.
        """
        if not axes.single or axes.columns or 0 in axes.geometry.shape:
            return None
        t = axes.tuning
        _, rows, after = axes_around(axes.outer, axes.reduced)
        features = [axis for axis in axes.outer if axis in axes.geometry.features]
        start = len(axes.outer) - len(features)
        n_rows, length = axes.size(rows), axes.size(axes.run)
        n_samples, n_parameters = axes.size(axes.outer[:start]), axes.size(features)
        fits = set(rows) <= set(features) and axes.outer[start:] == features
        few = length >= t.tiny_row or n_rows < t.few_rows or n_samples < t.few_samples
        n_weights = n_parameters // n_rows
        room = n_samples * n_weights >= t.few_groups and n_parameters * length <= t.many_weights
        if after or not fits or few or not room:
            return None
        size, n_groups = n_rows * length, n_samples * n_weights
        return cls._of_size(axes, axes.order, n_groups, size, n_weights, length)

    @classmethod
    def _of_size(
        cls, axes: Arrangement, order: Axes, m: int, d: int, n_weights: int, span: int
    ) -> Self:
        t = axes.tuning
        block = max(1, t.group_block // max(d, 1))
        in_turn = largest_divisor(n_weights, t.run // max(d, 1))
        n_runs = n_weights // in_turn
        block = block if n_runs == 1 else largest_divisor(n_weights, block)
        # Samples of several rows are longer: fewer make a part. A power of 2 divides evenly among
        # threads.
        n_samples = m // n_weights
        several = 1 if m * d < t.long_task else min(n_samples, 2)
        n_tasks = min(max(n_samples // (64 if n_weights == 1 else 8), several), t.tasks)
        n_parts = 1 << (max(1, n_tasks // n_runs).bit_length() - 1)
        overlap = block * d <= t.overlap
        return cls(
            axes.geometry, order, axes.affine, (m, d), ElementTiles(in_turn, block, overlap), t,
            (n_weights, d // span), n_parts,
        )  # fmt: skip

    @functools.cached_property
    def _work(self) -> int:
        """How many elements the rows are worth, see ``row_work``."""
        (m, d), t = self.view, self.tuning
        return m * max(d, min(t.row_work, d * t.piece_work))

    def run_forward(
        self, x: Array, mask: Array | None, parameters: Array, job: Job, streamed: bool,
        groups: Float64, y: Array,
    ) -> Array:  # fmt: skip
        """Write y; return the parameters."""
        if streamed and self.weights[1] < self.view[1]:
            # Each thread needs the weights of all elements then: they are repeated once for all.
            parameters = np.repeat(parameters, self.view[1] // self.weights[1], axis=2)
        run(
            forward_element_rows, self._work,
            x, mask, job.fused, parameters, (*job.mode,), (*self.tiles,), streamed, groups, y,
        )  # fmt: skip
        return parameters

    def backward(
        self, dy: Array, x: Array, saved: Saved, fused: Any, streamed: bool, dx: Array
    ) -> Gradients:
        """Write dx, with the gradients of parameters in the same kernel."""
        found, parts = saved.statistics, self._new_gradients(saved)
        run(
            backward_element_rows, self._work,
            dy, x, saved.mask, fused, found.parameters, (*saved.mode,), (*self.tiles,),
            streamed, found.groups, dx, parts,
        )  # fmt: skip
        return self._sum_gradients(parts, saved)


class ElementColumns(Elements):
    """(A, D, B): each column is a group, and row i of its D has weight i. Not with a mask."""

    @classmethod
    def fit(cls, axes: Arrangement) -> Self | None:
        """Take groups of elements that are columns, each with a weight."""
        if not _has_element_weights(axes) or not _are_columns(axes):
            return None
        before, reduced, after = axes_around(axes.wide, axes.reduced)
        a, d, b, t = axes.size(before), axes.size(reduced), axes.size(after), axes.tuning
        width = max(64, min(t.column_run, max(t.cached_group // max(d, 1), a * b // t.tasks)))
        # All blocks of a row about as wide, in steps of a kernel's loops.
        n_blocks = max(1, -(-b // width))
        width = max(1, min(b, -(-b // (n_blocks * 64)) * 64))
        n_parts = 1 if a * d * b < t.long_task else min(a * -(-b // width), t.tasks)
        return cls(
            axes.geometry, axes.order, axes.affine, (a, d, b), ColumnTiles(width, 1), t,
            (d,), n_parts,
        )  # fmt: skip

    def streams(self, use_batch_stats: bool = True) -> bool:
        """Tell whether blocks are wide enough: they share lines, and narrow ones are mostly parts.

        Blocks of 196 columns took twice as long by streaming stores.
        """
        return bool(self.tiles.width >= 2 * self.tuning.stream_from)

    def run_forward(
        self, x: Array, mask: Array | None, parameters: Array, job: Job, streamed: bool,
        groups: Float64, y: Array,
    ) -> Array:  # fmt: skip
        """Write y; return the parameters."""
        run(
            forward_element_columns, y.size,
            x, job.fused, parameters, (*job.mode,), (*self.tiles,), streamed, groups, y,
        )  # fmt: skip
        return parameters

    def backward(
        self, dy: Array, x: Array, saved: Saved, fused: Any, streamed: bool, dx: Array
    ) -> Gradients:
        """Write dx, with the gradients of parameters in the same kernel."""
        found, parts = saved.statistics, self._new_gradients(saved)
        run(
            backward_element_columns, dy.size,
            dy, x, fused, found.parameters, (*saved.mode,), (*self.tiles,), streamed,
            found.groups, dx, parts,
        )  # fmt: skip
        return self._sum_gradients(parts, saved)
