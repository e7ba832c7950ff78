"""What the layers have in common: what is PyTorch's to do, and running statistics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from numbanorm.core.layouts import Saved, Statistic
from numbanorm.core.running import track
from numbanorm.recalibrate import Pool
from numbanorm.torch import private
from numbanorm.torch.memory import as_array


def can_take(x: Tensor, shape: Sequence[int], *others: Tensor | None) -> bool:
    """Tell whether numbanorm can do it; else it is for PyTorch's own forward, or the definition.

    It takes plain tensors with data of their own: dense, on the CPU, float32 or float64, one type
    for all, and others than x of one shape. What is to run elsewhere is PyTorch's.
    """
    dtype = x.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return False
    if private.is_exported() or x.is_nested:
        return False
    has_data = not torch.compiler.is_compiling()
    for t in (x, *others):
        if t is not None and not (
            (type(t) is Tensor or type(t) is nn.Parameter)
            and t.is_cpu
            and t.dtype is dtype
            and t.layout is torch.strided
            and not (has_data and t.is_neg())
            and (t is x or t.shape == shape)
        ):
            return False
    return True


class Layer(nn.Module):
    """One node for :mod:`torch.fx`, as layers of PyTorch are."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer, or note the call."""
        proxy = args[0] if args else kwargs.get("input")
        if not isinstance(proxy, torch.fx.Proxy):
            return super().__call__(*args, **kwargs)
        tracer = proxy.tracer

        def note(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, note, args, kwargs)


class TrackingLayer(Layer):
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

    @property
    def is_odd(self) -> bool:
        """Whether its state is one that only PyTorch has a rule, or an error, for."""
        n, tracks = self.num_batches_tracked, self.running_mean is not None
        if (self.running_var is not None) != tracks:
            return True
        counts = type(n) is Tensor and n.dtype is torch.int64 and n.is_cpu and tracks
        return not (n is None or counts)

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
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.fill_(pool.n_forwards)

    def _momentum(self, n_before: Any) -> Any:
        """Return the weight of a new value after so many, or after an unknown number: None."""
        if self.momentum is not None:
            return self.momentum
        return 0.0 if n_before is None else 1 / (n_before + 1)

    def _track(self, statistics: Tensor | Saved, samples: int | None = None) -> None:
        """Move the running statistics towards those of a batch, or the mean of its samples'.

        ``statistics`` are what was saved, or (4, C), or (4, samples * C).
        """
        if isinstance(statistics, Saved):
            if self._pool is not None:
                self._pool.add(statistics)
                return
            running, n = (self.running_mean, self.running_var), self.num_batches_tracked
            mean, var = map(as_array, running)
            n_batches = np.array(0) if n is None else as_array(n)
            momentum = float(self._momentum(None if n is None else n_batches))
            if not self._counts:
                n_batches = n_batches.copy()
            track(statistics, mean, var, n_batches, momentum)
            torch.autograd.graph.increment_version(running if n is None else [*running, n])
            return
        if self._pool is not None:
            shape = (4, *([] if samples is None else [samples]), self.num_features)
            mean, _, var, n = as_array(statistics).reshape(shape)
            batch = Statistic((0,) if samples is None else (), n.astype(np.int64), mean, var)
            ddof = 0 if self.sample_variance else 1
            self._pool.add_statistic(batch, (self.num_features,), ddof)
            return
        n, dtype = self.num_batches_tracked, self.running_mean.dtype
        momentum = self._momentum(None if n is None else n.to(dtype))
        moved = statistics.detach()
        if samples is not None:
            moved = moved.reshape(4, samples, -1).mean(1)
        known = moved[3] > 0  # a channel that got nothing is left alone
        if self._counts and n is not None:
            n.add_(known.any())
        mean, var = moved[:2].to(dtype)
        weight = known.to(dtype) * momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(var, weight)

    def _not_pooling(self) -> None:
        if self._pool is not None:
            raise TypeError(
                "recalibrate: x and the layer need to be float32 or float64 on the CPU, "
                f"and x of a shape that {self} trains with"
            )
