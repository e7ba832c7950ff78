"""Which group of each statistic a piece is in: tables, as segments that kernels read."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from numbanorm.core.types import Axes


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
    """Return a table of groups (S, P) as segments, which are as long as can be."""
    table = of_piece.astype(np.int64)
    steps = table[:, 1:] - table[:, :-1]
    step = steps[:, 0] if steps.size else np.zeros(len(of_piece), np.int64)
    # The pieces are a grid: a table whose step breaks at the end of an axis breaks at all its ends.
    ends = np.flatnonzero((steps != step[:, None]).any(0) | ((step != 0) & (step != 1)).any())
    length = int(ends[0]) + 1 if ends.size else max(1, of_piece.shape[1])
    first = np.ascontiguousarray(table[:, ::length])
    result = Segments(first, step.copy() if length > 1 else np.zeros_like(step))
    for array in result:
        array.flags.writeable = False
    return result


def group_of_pieces(grid: Axes, order: Axes, shape: Axes, first: int = 0) -> NDArray[np.uint32]:
    """Return the group of each piece of a grid, numbered in this order of its axes, (P,).

    The groups are numbered from ``first`` on, in the C order of their kept axes: ``shape`` has the
    sizes of these, and 1 for the reduced ones.
    """
    n = math.prod(shape)
    numbers = np.arange(first, first + n, dtype=np.uint32).reshape(shape)
    return np.broadcast_to(numbers, grid).transpose(order).ravel()


class Groups(NamedTuple):
    """The groups of some statistics, numbered through all of them.

    Attributes
    ----------
    shapes, slices : tuple
        For each statistic, the shape of its groups as it broadcasts to x, and where they stand.
    bounds : (S + 1,) array of int64
        The first group of each statistic, and G, the number of all.
    """

    shapes: tuple[Axes, ...]
    slices: tuple[slice, ...]
    bounds: NDArray[np.int64]

    @property
    def total(self) -> int:
        """The number of groups of all statistics."""
        return int(self.bounds[-1])

    def table(self, grid: Axes, order: Axes) -> NDArray[np.uint32]:
        """Return the group of each piece of a grid in each statistic, (S, P)."""
        return np.stack(
            [
                group_of_pieces(grid, order, shape, place.start)
                for shape, place in zip(self.shapes, self.slices, strict=True)
            ]
        )


def number_groups(shapes: Iterable[Axes]) -> Groups:
    """Return the groups of statistics, from the sizes of their kept axes, and 1 for the others."""
    shapes = tuple(shapes)
    bounds = np.cumsum([0, *map(math.prod, shapes)])
    bounds.flags.writeable = False
    slices = tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(bounds))
    return Groups(shapes, slices, bounds)
