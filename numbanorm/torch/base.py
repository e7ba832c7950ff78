"""What the layers have in common: whether numbanorm can do it, and running statistics."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from numbanorm.core.layouts import Saved, Statistic
from numbanorm.core.running import track
from numbanorm.recalibrate import Pool
from numbanorm.torch import private
from numbanorm.torch.memory import as_array


def can_take(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether numbanorm can do it: float32 or float64 on the CPU, one type for all."""
    dtype = x.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return False
    tensors = x, *others
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype is dtype and t.layout is torch.strided):
            return False
    # PyTorch's own code has forward-mode derivatives.
    return not private.has_tangent(tensors)


class TrackingLayer(nn.Module):
    """Running statistics, and what :func:`numbanorm.recalibrate` asks of a layer."""

    training: bool
    num_features: int
    momentum: float | None
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    sample_variance = False
    _pool: Pool | None = None
    # Whether num_batches_tracked is what its name says.
    _counts = True

    @property
    def tracks(self) -> bool:
        """Whether the layer has running statistics."""
        return self.running_mean is not None

    def begin_pooling(self, pool: Pool) -> bool:
        """Go to training mode and collect statistics; return the mode of before."""
        before = self.training
        self._pool, self.training = pool, True
        return before

    def end_pooling(self, state: bool) -> None:
        """Go back to the mode of before."""
        del self._pool
        self.training = state

    @torch.no_grad()
    def adopt_pool(self, pool: Pool) -> None:
        """Take the pooled statistics as running statistics."""
        mean, var, known = pool.statistics()
        self.running_mean.copy_(torch.from_numpy(np.where(known, mean, 0)))
        self.running_var.copy_(torch.from_numpy(np.where(known, var, 1)))
        self.num_batches_tracked.fill_(pool.n_forwards)

    def _momentum(self, n_before: Any) -> Any:
        """Return the weight of a new value after so many."""
        return 1 / (n_before + 1) if self.momentum is None else self.momentum

    def _track(self, statistics: Tensor | Saved, samples: int | None = None) -> None:
        """Move the running statistics towards those of a batch, or the mean of its samples'.

        ``statistics`` are what was saved, or (4, C), or (4, samples * C).
        """
        if isinstance(statistics, Saved):
            if self._pool is not None:
                self._pool.add(statistics)
                return
            buffers = self.running_mean, self.running_var, self.num_batches_tracked
            mean, var, n_batches = map(as_array, buffers)
            momentum = float(self._momentum(n_batches))
            if not self._counts:
                n_batches = n_batches.copy()
            track(statistics, mean, var, n_batches, momentum)
            torch.autograd.graph.increment_version(buffers)
            return
        if self._pool is not None:
            shape = (4, *([] if samples is None else [samples]), self.num_features)
            mean, _, var, n = as_array(statistics).reshape(shape)
            batch = Statistic((0,) if samples is None else (), n.astype(np.int64), mean, var)
            ddof = 0 if self.sample_variance else 1
            self._pool.add_statistic(batch, (self.num_features,), ddof)
            return
        momentum = self._momentum(self.num_batches_tracked.to(self.running_mean.dtype))
        if self._counts:
            self.num_batches_tracked.add_(1)
        moved = statistics[:2].detach()
        if samples is not None:
            moved = moved.reshape(2, samples, -1).mean(1)
        mean, var = moved.to(self.running_mean.dtype)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)

    def _not_pooling(self) -> None:
        if self._pool is not None:
            raise TypeError(
                "recalibrate: x and the layer need to be float32 or float64 on the CPU, "
                f"and x of a shape that {self} trains with"
            )
