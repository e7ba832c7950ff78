"""Layouts for everything: pieces, whose moments merge into the groups of each statistic.

Forward: moments of each piece (one pass over x), algebra on small arrays, and scale and shift of
each piece, which a last kernel applies (the second pass). Backward goes the same way:
sums of dy and dy * (x - mean) over each piece, algebra, and a kernel that writes dx.
"""

import dataclasses
import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from numbanorm.core.exchange import Exchange
from numbanorm.core.groups import Groups, Segments, group_of_pieces, number_groups, segments
from numbanorm.core.layouts.base import (
    Arrangement,
    Gradients,
    Instances,
    Job,
    Layout,
    Saved,
    Statistic,
    Statistics,
    n_folded,
)
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.kernels import algebra
from numbanorm.kernels.access import DRESIDUAL, HAS_RESIDUAL
from numbanorm.kernels.apply import apply_columns, apply_rows
from numbanorm.kernels.modes import PieceTiles
from numbanorm.kernels.reduce import reduce_columns, reduce_rows
from numbanorm.numba_ext.threads import call, run

# The mixture of a single statistic.
ALONE = np.ones((2, 1))


def merge_groups(
    parts: Float64, groups: Groups, of_parts: Segments, center: bool, ddof: int, work: int = 0
) -> Float64:
    """Return count, mean, variance, m2 and the mean's rest of all groups, (5, G).

    ``parts`` are count, mean, m2 and the mean's rest of P parts, (4, P). The variance is m2 /
    (count - ``ddof``), or the mean square if not ``center``; the mean is 0 then.
    """
    merged = np.empty((5, groups.total))
    run(
        algebra.merge_pieces, work,
        parts, *of_parts, groups.bounds, center, ddof, merged,
    )  # fmt: skip
    return merged


def merge_stacked(gathered: Float64, center: bool = True, ddof: int = 0) -> Float64:
    """Return what :func:`merge_groups` does of the same groups in n processes, (n, 4, G)."""
    n, _, n_groups = gathered.shape
    parts = np.ascontiguousarray(gathered.swapaxes(0, 1)).reshape(4, n * n_groups)
    table = np.tile(np.arange(n_groups, dtype=np.uint32), n)[None]
    return merge_groups(parts, number_groups(((n_groups,),)), segments(table), center, ddof)


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces(Layout):
    """Pieces in a grid: all axes, with size 1 along those within a piece.

    Attributes
    ----------
    grid : tuple of int
        Its sizes.
    parts : (A, K, B)
        Shape of what a kernel returns: K parts of each of A * B pieces.
    """

    grid: Axes
    parts: tuple[int, int, int]

    # -- Tables ------------------------------------------------------------------------------------

    @functools.cached_property
    def groups(self) -> Groups:
        """The groups of each statistic."""
        return number_groups(map(self.geometry.kept_sizes, self.geometry.reductions))

    @functools.cached_property
    def segments(self) -> Segments:
        """The groups of each statistic, the weight and the instance of each piece."""
        shape = self.geometry.param_grid if self.affine else (1,) * len(self.grid)
        feature = group_of_pieces(self.grid, self.order, shape)
        instance = group_of_pieces(self.grid, self.order, self._instance_grid)
        return segments(np.stack((*self.groups.table(self.grid, self.order), feature, instance)))

    @functools.cached_property
    def part_segments(self) -> Segments:
        """The groups of each statistic, with the K parts of a piece for pieces."""
        return segments(self._of_parts(self.groups.table(self.grid, self.order)))

    @functools.cached_property
    def _instances(self) -> tuple[Groups, Segments, Segments]:
        """The instances as groups, with parts for pieces; and the statistics' groups of them."""
        instances = number_groups((self._instance_grid,))
        of_parts = segments(self._of_parts(instances.table(self.grid, self.order)))
        (grid,) = instances.shapes
        return instances, of_parts, segments(self.groups.table(grid, tuple(range(len(grid)))))

    @functools.cached_property
    def _instance_grid(self) -> Axes:
        return self.geometry.kept_sizes(self.geometry.inner(self.affine))

    @property
    def _instance_size(self) -> int:
        inner = self.geometry.inner(self.affine)
        return math.prod(self.geometry.shape[axis] for axis in inner)

    def _of_parts(self, table: NDArray[np.uint32]) -> NDArray[np.uint32]:
        a, k, b = self.parts
        n = len(table)
        return np.broadcast_to(table.reshape(n, a, 1, b), (n, a, k, b)).reshape(n, a * k * b)

    @property
    def n_pieces(self) -> int:
        """The number of pieces."""
        return self.parts[0] * self.parts[2]

    @functools.cached_property
    def n_bytes(self) -> int:
        """Bytes of the tables, which are made at once, but for those of sample variances."""
        tables = *self.segments, *self.part_segments
        return sum(table.nbytes for table in tables) * (2 if self.geometry.instance_axes else 1)

    def ddof(self, sample_variance: bool) -> int:
        """Return 1 where the groups themselves, not the instances, have sample variances."""
        return int(sample_variance and self._instance_size == 1)

    def _work(self, n_pieces: int, n_statistics: int) -> int:
        """Return how many elements sums over pieces are worth: a statistic is a task."""
        return n_pieces * n_statistics * self.tuning.piece_work if n_statistics > 1 else 0

    # -- Forward -----------------------------------------------------------------------------------

    def reduce(self, x: Array, mask: Array | None) -> Float64:
        """Return count, mean, m2 and the mean's rest of all parts of pieces, (4, A * K * B)."""
        moments = np.empty((4, *self.parts))
        self._reduce(None, x, mask, None, None, None, moments)
        return moments.reshape(4, -1)

    def merge(
        self, parts: Float64, groups: Groups, of_parts: Segments, center: bool = True, ddof: int = 0
    ) -> Float64:
        """Return what :func:`merge_groups` does of ``parts``, as from :meth:`reduce`."""
        work = self._work(parts.shape[1], len(groups.shapes))
        return merge_groups(parts, groups, of_parts, center, ddof, work)

    def forward(
        self, x: Array, mask: Array | None, job: Job, streamed: bool, y: Array
    ) -> Statistics:
        """Take moments, merge and mix them, and write y."""
        mode, sample_variance, instances = job.mode, job.recipe.sample_variance, None
        if mode.use_batch_stats or len(self.geometry.reductions) > 1:
            parts, of_parts = self.reduce(x, mask), self.part_segments
            if sample_variance and self._instance_size > 1:
                instances, parts = self._with_sample_variance(parts)
                of_parts = self._instances[2]
            ddof = self.ddof(sample_variance)
            # What processes share is merged once more, and needs its means for that.
            center = mode.center or job.exchange is not None
            groups = self.merge(parts, self.groups, of_parts, center, ddof)
            if job.exchange is not None:
                self._share(groups, job.exchange, mode.center, ddof)
        else:
            groups = np.empty((3, self.groups.total))
        if job.running is not None:
            # Copied: running statistics may move on before backward.
            place = self.groups.slices[self.geometry.tracked]
            shape, grid = self.groups.shapes[self.geometry.tracked], self.geometry.running_grid
            groups[0, place] = 1.0
            for values, running in zip(groups[1:3], job.running, strict=True):
                values[place].reshape(shape)[...] = running.reshape(grid)
        parameters = self.feature_parameters(job)
        pieces, coef = self._coefficients(groups, parameters, job)
        self._apply(None, x, None, job.fused, None, coef, False, streamed, y)
        return Statistics(parameters, groups, pieces, instances)

    def _share(self, groups: Float64, exchange: Exchange, center: bool, ddof: int) -> None:
        """Make the tracked statistic that of all processes' x together."""
        geometry = self.geometry
        place = self.groups.slices[geometry.tracked]
        moments = np.delete(groups[:, place], 2, axis=0)
        sizes, gathered = exchange.gather(moments, geometry.running_shape, geometry.group_size)
        if exchange.several and sizes.sum() == 1:
            raise ValueError(
                "x: more than one value per channel is needed in training, got one in process "
                f"{int(sizes.argmax())} and none in the others"
            )
        groups[:, place] = merge_stacked(gathered, center, ddof)

    @np.errstate(all="ignore")  # NaN and Inf are the user's, and reach what they should
    def _with_sample_variance(self, parts: Float64) -> tuple[Instances, Float64]:
        """Return the instances, and their moments (4, I) with sample variances, to be merged."""
        instances, of_parts, _ = self._instances
        (shape,) = instances.shapes
        count, mean, _, m2, rest = self.merge(parts, instances, of_parts)
        n = count.astype(np.int64)
        result = Instances(n.reshape(shape), mean.reshape(shape), m2.reshape(shape))
        return result, np.stack((count, mean, m2 * (count / np.maximum(count - 1, 1)), rest))

    def _coefficients(
        self, groups: Float64, parameters: Array, job: Job | Saved
    ) -> tuple[Float64, Array]:
        """Mix statistics; return mean, variance, rstd of each piece, and its m, s, t, (3, P)."""
        shape = 3, self.n_pieces
        pieces, coef = np.empty(shape), np.empty(shape, job.recipe.arithmetic)
        mixture = ALONE if job.mixture is None else job.mixture
        run(
            algebra.coefficients, self.n_pieces * self.tuning.piece_work,
            *self.segments, groups, mixture, job.mode.eps, parameters, pieces, coef,
        )  # fmt: skip
        return pieces, coef

    # -- Backward ----------------------------------------------------------------------------------

    def backward(
        self, dy: Array, x: Array, saved: Saved, fused: Any, streamed: bool, dx: Array
    ) -> Gradients:
        """Sum up dy and dy * (x - mean), and write dx."""
        found, n = saved.statistics, self.n_pieces
        assert found.pieces is not None
        mixture = ALONE if saved.mixture is None else saved.mixture
        forward = None
        if fused is not None:
            _, forward = self._coefficients(found.groups, found.parameters, saved)
        sums = self._gradient_sums(dy, x, saved, fused, forward)
        if saved.recipe.keeps_dy:
            # Made once, it is dresidual, or in the place where dx will be.
            dy, streamed = fused[DRESIDUAL], streamed and fused[HAS_RESIDUAL]
            fused, forward = None, None
        dgroups, dmixture = np.zeros((2, self.groups.total)), np.zeros(mixture.shape)
        dparameters = np.zeros((2, *self.parameter_view))
        run(
            algebra.group_gradients, self._work(n, len(self.groups.shapes)),
            sums, *self.segments, self.groups.bounds, found.groups,
            self.ddof(saved.recipe.sample_variance), mixture, found.parameters, found.pieces,
            dgroups, dmixture, dparameters,
        )  # fmt: skip
        if saved.exchange is not None:
            place, shape = self.groups.slices[self.geometry.tracked], self.geometry.running_shape
            dgroups[:, place] = saved.exchange.gather(dgroups[:, place], shape, 0)[1].sum(0)
        given = -1 if saved.mode.use_batch_stats else self.geometry.tracked
        instances = None
        if found.instances is not None:
            instances = np.stack((found.instances.n.ravel(), found.instances.mean.ravel()))
        coef: Array = np.empty((5, n), saved.recipe.arithmetic)
        run(
            algebra.gradient_coefficients, n * self.tuning.piece_work,
            *self.segments, found.groups, dgroups, saved.mode.center, given, instances,
            found.parameters, found.pieces, coef,
        )  # fmt: skip
        is_scale = given >= 0 and len(self.geometry.reductions) == 1
        if is_scale and forward is None:
            # dx = a * dy: the first field of Gradient is the second of ScaleShift.
            zero = np.zeros_like(coef[0])
            shift = np.stack((zero, coef[0], zero))
            self._apply(None, dy, None, None, None, shift, False, streamed, dx)
        else:
            self._apply(dy, x, saved.mask, fused, forward, coef, is_scale, streamed, dx)
        return self.in_parameter_shape(dparameters, dmixture)

    def _gradient_sums(
        self, dy: Array, x: Array, saved: Saved, fused: Any, forward: Array | None
    ) -> Float64:
        """Return the sums of dy and of dy * (x - mean) over each piece, (2, P)."""
        sums = np.empty((2, *self.parts))
        self._reduce(dy, x, saved.mask, fused, forward, saved.statistics.pieces, sums)
        if self.parts[1] > 1:
            merged = np.zeros((2, self.parts[0], self.parts[2]))
            call(algebra.add_parts, sums, merged)
            return merged.reshape(2, -1)
        return sums.reshape(2, -1)

    # -- Kernels -----------------------------------------------------------------------------------

    def _reduce(
        self, dy: Array | None, x: Array, mask: Array | None, fused: Any, forward: Array | None,
        pieces: Float64 | None, out: Float64,
    ) -> None:  # fmt: skip
        a, _, b = self.parts
        stats, of_forward = (
            None if values is None else values.reshape(3, a, b) for values in (pieces, forward)
        )
        run(self._kernels[0], x.size, dy, x, mask, fused, of_forward, (*self.tiles,), stats, out)

    def _apply(
        self, dy: Array | None, x: Array, mask: Array | None, fused: Any, forward: Array | None,
        coef: Array, is_scale: bool, streamed: bool, y: Array,
    ) -> None:  # fmt: skip
        a, _, b = self.parts
        of_pieces = coef.reshape(len(coef), a, b)
        of_forward = None if forward is None else forward.reshape(3, a, b)
        run(
            self._kernels[1], y.size,
            dy, x, mask, fused, of_forward, (*self.tiles,), of_pieces, is_scale, streamed, y,
        )  # fmt: skip

    @property
    @abstractmethod
    def _kernels(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """What reduces, and what applies."""

    # -- Statistics --------------------------------------------------------------------------------

    def restore(self, statistics: list[Statistic], job: Job) -> Statistics:
        """Mix the statistics anew."""
        groups = np.empty((3, self.groups.total))
        for place, (_, n, mean, var) in zip(self.groups.slices, statistics, strict=True):
            groups[0, place] = 1.0 if n is None else n.ravel()
            groups[1, place], groups[2, place] = mean.ravel(), var.ravel()
        parameters = self.feature_parameters(job)
        return Statistics(parameters, groups, self._coefficients(groups, parameters, job)[0])

    def statistic(self, groups: Float64, k: int) -> Any:
        """Return a slice of the groups."""
        return groups[:3, self.groups.slices[k]].reshape(3, *self.groups.shapes[k])

    def tracked(self, groups: Float64) -> tuple[Float64, int, int]:
        """Return a slice of the groups."""
        place = self.groups.slices[self.geometry.tracked]
        return groups, place.start, place.stop


class PieceRows(Pieces):
    """(P, L): piece p is the contiguous row p, as the inner axes come last: N, C, (H, W)."""

    has_room_for_dy = True

    @classmethod
    def fit(cls, axes: Arrangement) -> Self | None:
        """Take what has no columns."""
        if axes.columns:
            return None
        n, length, t = axes.size(axes.outer), axes.size(axes.run), axes.tuning
        n_parts = max(1, -(-length // t.row_part))
        part = max(1, -(-length // n_parts))
        tiles = PieceTiles(part, max(1, t.task // part) if n_parts == 1 else 1)
        return cls(
            axes.geometry, axes.order, axes.affine, (n, length), tiles, t,
            axes.grid(axes.run), (n, n_parts, 1),
        )  # fmt: skip

    @property
    def _kernels(self) -> tuple[Callable[..., None], Callable[..., None]]:
        return reduce_rows, apply_rows


class PieceColumns(Pieces):
    """(A, L, C): piece (a, c) is a column, as other axes follow the inner ones: N, (H, W), C.

    With few columns, some rows of L are seen as one.
    """

    @classmethod
    def fit(cls, axes: Arrangement) -> Self | None:
        """Take everything."""
        a, length, n, t = (
            axes.size(axes.outer), axes.size(axes.run), axes.size(axes.columns), axes.tuning
        )  # fmt: skip
        fold = n_folded(length, n, t)
        length, c = length // fold, n * fold
        block = min(max(c, 1), t.column_block)
        n_tasks = max(1, a * -(-c // block))
        n_parts = max(
            min(
                -(-t.tasks // n_tasks),
                max(1, length * block // t.long_task),
                length // t.least_rows,
            ),
            -(-length // t.column_part),
            1,
        )
        part = max(1, -(-length // n_parts))
        n_parts = max(1, -(-length // part))
        return cls(
            axes.geometry, axes.order, axes.affine, (a, length, c), PieceTiles(part, block), t,
            axes.grid(axes.run), (a, n_parts, n),
        )  # fmt: skip

    def streams(self, use_batch_stats: bool = True) -> bool:
        """Tell whether parts of rows are long enough: the lines at their ends are written twice."""
        least = min(self.view[-1], self.tuning.stream_parts_from)
        return bool(self.tiles.block >= max(self.tuning.stream_from, least))

    @property
    def _kernels(self) -> tuple[Callable[..., None], Callable[..., None]]:
        return reduce_columns, apply_columns
