"""What layouts have in common whose kernels handle whole groups of a single statistic at once."""

import dataclasses
import functools
import math
from abc import abstractmethod
from typing import Any

import numpy as np

from numbanorm.core.layouts.base import Job, Layout, Statistic, Statistics
from numbanorm.core.types import Array, Axes, Float64


@dataclasses.dataclass(frozen=True, eq=False)
class WholeGroups(Layout):
    """Groups in the order of memory, each read once and written at once."""

    @abstractmethod
    def parameters(self, job: Job) -> Array:
        """Return copies of weight and bias as the kernels see them, (2, ...)."""

    @abstractmethod
    def run_forward(
        self, x: Array, mask: Array | None, parameters: Array, job: Job, streamed: bool,
        groups: Float64, y: Array,
    ) -> Array:  # fmt: skip
        """Write y, and statistics to ``groups``; return the parameters that it was done with."""

    def forward(
        self, x: Array, mask: Array | None, job: Job, streamed: bool, y: Array
    ) -> Statistics:
        """Take statistics, or the given ones, and write y."""
        if job.running is None:
            groups: Float64 = np.empty((3, self.n_groups))
        elif job.running[0].shape == (self.n_groups,):
            # Copied: running statistics may move on before backward.
            groups = np.array((self._ones, *job.running), np.float64)
        else:
            grid = self.geometry.running_grid
            groups = self._from_grid(1.0, *(running.reshape(grid) for running in job.running))
        parameters = self.run_forward(x, mask, self.parameters(job), job, streamed, groups, y)
        return Statistics(parameters, groups)

    def restore(self, statistics: list[Statistic], job: Job) -> Statistics:
        """Bring the statistics into the order of memory."""
        _, n, mean, var = statistics[0]
        groups = self._from_grid(1.0 if n is None else n, mean, var)
        return Statistics(self.parameters(job), groups)

    def statistic(self, groups: Float64, k: int) -> Any:
        """Return all groups: there is one statistic."""
        in_memory = groups.reshape(3, *self._groups_in_memory)
        return in_memory.transpose(0, *(axis + 1 for axis in self.inverse_order))

    def tracked(self, groups: Float64) -> tuple[Float64, int, int]:
        """Return all groups: there is one statistic."""
        if not self.in_order:
            groups = np.ascontiguousarray(self.statistic(groups, 0)).reshape(3, -1)
        return groups, 0, groups.shape[1]

    @functools.cached_property
    def _groups_in_memory(self) -> Axes:
        """The kept axes in memory order, and 1 for the reduced ones."""
        sizes = self.geometry.kept_sizes(self.geometry.reductions[0])
        return tuple(sizes[axis] for axis in self.order)

    @functools.cached_property
    def n_groups(self) -> int:
        """The number of groups."""
        return math.prod(self._groups_in_memory)

    @functools.cached_property
    def _ones(self) -> Float64:
        return np.ones(self.n_groups)

    def _from_grid(self, *values: Any) -> Float64:
        """Return arrays that broadcast to x, a value for each group, in memory order, (n, G)."""
        groups = np.empty((len(values), *self._groups_in_memory))
        for array, value in zip(groups, values, strict=True):
            array.transpose(self.inverse_order)[...] = value
        return groups.reshape(len(values), self.n_groups)


def axes_around(axes: list[int], reduced: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Return the axes before the first run of reduced ones, that run, and what follows it."""
    start = next((i for i, axis in enumerate(axes) if axis in reduced), len(axes))
    end = next((i for i in range(start, len(axes)) if axes[i] not in reduced), len(axes))
    return axes[:start], axes[start:end], axes[end:]
