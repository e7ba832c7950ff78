"""Processes of ``torch.distributed`` that share BatchNorm's statistics."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from numbanorm.core.exchange import Exchange, Processes
from numbanorm.core.types import Array, Float64
from numbanorm.torch import private


def name_of_group(process_group: object) -> str:
    """Return the name of the process group (None: the world), or "" for a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = process_group or dist.group.WORLD
    return private.name_of_group(group) if dist.get_world_size(group) > 1 else ""


class ProcessGroup(Processes):
    """The processes of a group of ``torch.distributed``, by its name."""

    def __init__(self, name: str) -> None:
        self._group = private.process_group(name)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(dist.get_world_size(self._group))

    def gather(self, values: Float64) -> Float64:
        """Return the arrays of all processes."""
        sent = torch.from_numpy(np.ascontiguousarray(values))
        gathered = np.empty((self.count, *values.shape))
        dist.all_gather(list(torch.from_numpy(gathered)), sent, group=self._group)
        return gathered

    def gather_objects(self, value: Any) -> list[Any]:
        """Return a small object of each process."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found


def exchange(process_group: str, x: Array) -> Exchange | None:
    """Return what shares BatchNorm's statistics of x in a process group, or None without one."""
    if not process_group:
        return None
    return Exchange(ProcessGroup(process_group), x.shape[1:2], several=True)
