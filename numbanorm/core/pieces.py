"""Moments of pieces, and how they merge into those of groups."""

import numpy as np

from numbanorm.core.geometry import Groups, Plan
from numbanorm.core.types import Array, Float64
from numbanorm.kernels import algebra, reduce
from numbanorm.numba_ext.threads import run
from numbanorm.tuning import tuning


def piece_moments(plan: Plan, x: Array, mask: Array | None) -> Float64:
    """Return count, mean, its rest and m2 of all parts of pieces of x, (4, A * K * B).

    ``x`` and ``mask`` are views of the plan.
    """
    kernel = reduce.moments_columns if plan.columns else reduce.moments_rows
    _, part, block = plan.tiles
    found = np.empty((4, *plan.parts))
    run(kernel, x.size, x, mask, part, block, found)
    return found.reshape(4, -1)


def work(groups: Groups) -> int:
    """Return how many elements the sums over pieces are worth: a statistic is a task."""
    of_piece = groups.of_piece
    return of_piece.size * tuning().piece_work if len(of_piece) > 1 else 0


def merge_pieces(parts: Float64, groups: Groups, center: bool = True, ddof: int = 0) -> Float64:
    """Return count, mean, variance, the mean's rest and m2 of all groups, (5, G).

    The variance is m2 / (count - ``ddof``), or the mean square if not ``center``; the mean is 0
    then. ``parts`` are as from :func:`piece_moments`.
    """
    merged = np.empty((5, groups.total))
    run(
        algebra.merge_pieces, work(groups),
        parts, *groups.segments, groups.bounds, center, ddof, merged,
    )  # fmt: skip
    return merged
