"""Statistics of several processes: BatchNorm's, and the sums that its gradient needs."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

import numbanorm
from numbanorm.core.layouts import Statistic
from numbanorm.core.types import Array
from numbanorm.moments import Moments
from numbanorm.torch import private


def name_of_group(process_group: object) -> str:
    """Return the name of the process group (None: the world), or "" for a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = process_group or dist.group.WORLD
    return private.name_of_group(group) if dist.get_world_size(group) > 1 else ""


def shared_statistic(x: Array, mask: Array | None, process_group: str) -> Statistic:
    """Return BatchNorm's statistic of all processes' x, which may differ in size."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    local = numbanorm.moments(x, axes, mask=mask)
    count = np.broadcast_to(local.count, local.mean.shape)
    packed = torch.from_numpy(np.stack([count, local.mean, local.m2, local._rest]))
    group = private.process_group(process_group)
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    arrays = (tensor.numpy() for tensor in gathered)
    moments = Moments.merge(Moments._of(n.astype(np.int64), *rest) for n, *rest in arrays)
    n = np.asarray(moments.count)
    if n.max() == 1:
        raise ValueError(
            f"x: more than one value per channel is needed in training, got shape {x.shape}, "
            "and no value in the other processes"
        )
    grid = [1, -1, *[1] * (x.ndim - 2)]
    mean, var = moments.mean.reshape(grid), moments.var().reshape(grid)
    return Statistic(axes, n.reshape(grid), mean, var)


def all_reduce(process_group: str) -> Callable[[Array], object]:
    """Return a function that adds an array up over processes, in place."""
    group = private.process_group(process_group)
    return lambda sums: dist.all_reduce(torch.from_numpy(sums), group=group)
