"""What the layers have in common: one forward, and running statistics."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from numbanorm.core.checks import ActivationLike, check_activation
from numbanorm.core.layouts import Saved, Statistic
from numbanorm.core.running import track
from numbanorm.core.types import Array
from numbanorm.recalibrate import Pool
from numbanorm.torch import private
from numbanorm.torch.autograd import direct_call, operator, run
from numbanorm.torch.definition import definition, finish
from numbanorm.torch.memo import Memo, Running
from numbanorm.torch.memory import DTYPES, HALVES, as_array
from numbanorm.torch.method import N_GRADIENTS, Inputs, Method, tracked_part


def can_take(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether numbanorm can do it; else it is for PyTorch's own code, or the definition.

    It takes plain tensors with data of their own: dense, on the CPU, of a type of float, which is
    one for all; with x of 16 bits all others may be of float32. What is to run elsewhere is
    PyTorch's, and what torch.func maps.
    """
    dtype = x.dtype
    if dtype not in DTYPES or not dtype.is_floating_point or x.is_nested:
        return False
    if private.is_exported() or private.is_mapped():
        return False
    dtype_of_others = dtype
    if dtype in HALVES:
        first = next((t for t in others if t is not None), x)
        if first.dtype is torch.float32:
            dtype_of_others = torch.float32
    has_data = not torch.compiler.is_compiling()
    for t in (x, *others):
        if t is not None and not (
            (type(t) is Tensor or type(t) is nn.Parameter)
            and t.is_cpu
            and t.dtype is (dtype if t is x else dtype_of_others)
            and t.layout is torch.strided
            and not (has_data and t.is_neg())
        ):
            return False
    return True


def check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return mask broadcast to the shape of x."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"mask: a tensor of bool, True where an element counts, is needed, got {kind}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask: a tensor on {x.device}, as x, is needed, got {mask.device}")
    try:
        return mask.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"mask: a shape that broadcasts to x, {tuple(x.shape)}, is needed, "
            f"got {tuple(mask.shape)}"
        ) from None


class NormLayer(nn.Module):
    """The road from a layer to numbanorm, and to the code that it had before.

    A subclass says with which tensors and how, and the next class after it in line has that code.
    """

    # What follows in the same pass, see numbanorm.Norm.
    _activation: ActivationLike = None
    # Whether a residual may have another shape, as in a model that was fused.
    _any_residual: bool = False
    # Whether there is such a class; if not, the definition does what numbanorm cannot.
    _has_other: ClassVar[bool] = True
    # The modules in it that a converted layer runs afterwards, as dropout and activation of timm's.
    _then: tuple[str, ...] = ()
    # Whether what it does follows from its settings and from x alone.
    _remembers: ClassVar[bool] = True
    # How the last x was normalised, unless a setting changed since.
    _memo: Memo | None = None

    def __init__(self, *args: Any, activation: ActivationLike = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation

    @property
    def activation(self) -> ActivationLike:
        """What follows the norm in the same pass, or None."""
        return self._activation

    @activation.setter
    def activation(self, activation: ActivationLike) -> None:
        check_activation(activation)
        self._activation = activation

    def extra_repr(self) -> str:
        """Return what is shown between the parentheses."""
        shown = super().extra_repr()
        return shown if self._activation is None else f"{shown}, activation={self._activation!r}"

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; what follows from all of them is found out anew."""
        self.__dict__.pop("_memo", None)
        super().__setattr__(name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; for :mod:`torch.fx` it is one node, as layers of PyTorch are."""
        if len(args) == 1 and type(args[0]) is Tensor:
            return super().__call__(*args, **kwargs)
        # The older ONNX exporter gives what is for keywords by position, as None.
        args = args[:1] if all(arg is None for arg in args[1:]) else args
        proxy = args[0] if args else kwargs.get("input")
        if not isinstance(proxy, torch.fx.Proxy):
            return super().__call__(*args, **kwargs)
        tracer = proxy.tracer

        def note(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, note, args, kwargs)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Return parameters and buffers, which numbanorm has to be able to take."""
        raise NotImplementedError

    def _have_shape(self, shape: Sequence[int]) -> bool:
        """Tell whether that is the shape of all parameters and buffers."""
        for t in self._tensors():  # half the time of all()
            if t is not None and t.shape != shape:
                return False
        return True

    def _plan(self, x: Tensor, mask: Tensor | None) -> tuple[Inputs, Method] | None:
        """Return what is normalised and how, or None for a shape that is PyTorch's to judge."""
        raise NotImplementedError

    def _examples(self) -> list[tuple[int, ...]]:
        """Return shapes of small x."""
        raise NotImplementedError

    def _tracking(self, inputs: Inputs, method: Method) -> tuple[bool, int | None]:
        """Return whether statistics are tracked, and the samples that they are averaged over."""
        return False, None

    def _track(
        self, statistics: Tensor | Saved, samples: int | None, running: Running | None = None
    ) -> None:
        """Track statistics."""
        raise NotImplementedError

    def forward(
        self, input: Tensor, *, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalise x: y = activation(norm(x) + residual).

        Parameters
        ----------
        input : Tensor
            x, on any device.
        mask : Tensor of bool, optional
            Broadcasts to x; True where an element counts in the statistics.
        residual : Tensor of the shape of x, optional
            What is added before the activation.

        Returns
        -------
        Tensor
            y, of the shape and dtype of x.
        """
        if mask is None and residual is None and not torch.compiler.is_compiling():
            memo = self._memo
            if memo is not None and memo.fits(self, input):
                y, statistics = run(self, memo.call, input, *memo.others)
                if memo.running is not None:
                    self._track(statistics, memo.samples, memo.running)
                return self._continue(y) if self._then else y
        counts = None if mask is None else check_mask(mask, input)
        if residual is not None and residual.shape != input.shape and not self._any_residual:
            raise ValueError(
                f"residual: the shape of x, {tuple(input.shape)}, is needed, "
                f"got {tuple(residual.shape)}"
            )
        tensors = self._tensors()
        # Forward mode within forward mode is wrong in PyTorch's own layers: the definition is not.
        has_tangent = private.has_tangent((input, residual, *tensors))
        by_numbanorm = not has_tangent and can_take(input, *tensors)
        if not (by_numbanorm or has_tangent) and counts is None and self._has_other:
            return self._finish(self._elsewhere(input), residual)
        planned = self._plan(input, counts)
        if planned is None:
            y = self._elsewhere(input)
            if counts is not None and counts.numel():
                raise ValueError(f"mask: {self} has none for x of shape {tuple(input.shape)}")
            return self._finish(y, residual)
        inputs, method = planned
        # A residual of another type, or shape, takes PyTorch's steps.
        fuses = by_numbanorm and (
            self._activation is not None
            if residual is None
            else (residual.dtype, residual.shape) == (input.dtype, input.shape)
            and can_take(residual)
        )
        if fuses:
            method = method.followed_by(self._activation)
            if residual is not None:
                batch = residual if residual.dim() == inputs.x.dim() else residual.unsqueeze(0)
                inputs = inputs._replace(residual=batch)
        tracking = self._tracking(inputs, method)
        call = direct_call(inputs, method) if by_numbanorm else None
        if call is not None:
            y, statistics = run(self, call, *inputs[:N_GRADIENTS])
            if self._remembers and counts is None and residual is None and inputs.x is input:
                memo = Memo.of(self, inputs, call, tensors, tracking)
                if memo is not None:
                    self.__dict__["_memo"] = memo
        else:
            y, packed = (operator if by_numbanorm else definition)(inputs, method)
            statistics = tracked_part(packed, inputs.x, method) if tracking[0] else packed
        if tracking[0]:
            self._track(statistics, tracking[1])
        if y.dim() != input.dim():
            y = y.squeeze(0)
        if not fuses:
            y = self._finish(y, residual)
        return self._continue(y)

    def _continue(self, y: Tensor) -> Tensor:
        """Run what a converted layer runs after the norm."""
        for name in self._then:
            y = getattr(self, name)(y)
        return y

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """Add a residual and apply the activation, step by step."""
        if residual is None and self._activation is None:
            return y
        method = Method(()).followed_by(self._activation)
        return finish(y, residual, method.activation, method.slope)

    def _elsewhere(self, x: Tensor) -> Tensor:
        """Return y of the code that stood there before."""
        y: Tensor = super().forward(x)
        return y

    def _get_name(self) -> str:
        return f"numbanorm.{type(self).__name__}"


class AffineLayer(NormLayer):
    """A weight, a bias, and no running statistics."""

    weight: Any
    bias: Any
    eps: float

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias

    def _inputs(self, x: Tensor, mask: Tensor | None) -> Inputs:
        return Inputs(x, self.weight, self.bias, mask=mask)


class TrackingLayer(NormLayer):
    """Running statistics, and what :func:`numbanorm.recalibrate` asks of a layer."""

    training: bool
    momentum: float | None
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    num_batches_skipped: Any
    sample_variance = False
    skip_nonfinite = False
    _pool: Pool | None = None
    # Whether num_batches_tracked is what its name says.
    _counts = True

    @property
    def tracks(self) -> bool:
        """Whether the layer has running statistics."""
        return self.running_mean is not None and self.running_var is not None

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
            self.num_batches_tracked.fill_(pool.n_tracked)

    def _momentum(self, n_before: Any) -> Any:
        """Return the weight of a new value after so many, or after an unknown number: None."""
        if self.momentum is not None:
            return self.momentum
        return 0.0 if n_before is None else 1 / (n_before + 1)

    def _track(
        self, statistics: Tensor | Saved, samples: int | None, running: Running | None = None
    ) -> None:
        """Move the running statistics towards those of a batch, or the mean of its samples'.

        ``statistics`` are what was saved, or (4, C), or (4, samples * C); ``running`` is what is
        moved, where that is known.
        """
        if isinstance(statistics, Saved):
            if self._pool is not None:
                self._pool.add(statistics)
            elif running is not None:
                self._move(statistics, *running)
            else:
                n = self.num_batches_tracked
                tensors = [self.running_mean, self.running_var, *([] if n is None else [n])]
                # Those of 16 bits are averaged in float32, and rounded.
                wide = [t.float() if t.dtype in HALVES else t for t in tensors]
                mean, var, *rest = map(as_array, wide)
                self._move(statistics, tensors, mean, var, rest[0] if rest else None)
                for t, moved in zip(tensors, wide, strict=True):
                    if moved is not t:
                        t.copy_(moved)
            return
        shape = tuple(self.running_mean.shape)
        rows = statistics.detach().reshape(4, samples or 1, *shape)
        if self._pool is not None:
            mean, _, var, n = as_array(rows)
            batch = Statistic((0,) if samples is None else (), n.astype(np.int64), mean, var)
            self._pool.add_statistic(batch, shape, 0 if self.sample_variance else 1)
            return
        n_batches, dtype = self.num_batches_tracked, self.running_mean.dtype
        mean, var, _, n = rows.to(dtype)
        known = (n > 0).to(dtype)
        n_known = known.sum(0)
        momentum = self._momentum(None if n_batches is None else n_batches.to(dtype))
        # A group with nothing in it leaves its running statistics alone.
        moved = (n_known > 0).to(dtype) * momentum
        is_tracked = n_known.any()
        if self.skip_nonfinite:
            is_finite = (mean + var).isfinite().all()
            self.num_batches_skipped.add_(~is_finite)
            moved, is_tracked = moved * is_finite, is_tracked & is_finite
        if self._counts and n_batches is not None:
            n_batches.add_(is_tracked)
        for tensor, values in ((self.running_mean, mean), (self.running_var, var)):
            found = torch.where(known > 0, values, 0).sum(0) / n_known.clamp(min=1)
            tensor.copy_(torch.where(moved > 0, tensor.lerp(found, moved), tensor))

    def _move(
        self, saved: Saved, tensors: list[Tensor], mean: Array, var: Array, n_batches: Array | None
    ) -> None:
        """Move running statistics, and count the batch."""
        momentum = float(self._momentum(n_batches))
        counted = n_batches if self._counts else None
        if track(saved, mean, var, momentum, self.skip_nonfinite, counted):
            self.num_batches_skipped.add_(1)
        torch.autograd.graph.increment_version(tensors)

    def _elsewhere(self, x: Tensor) -> Tensor:
        if self._pool is not None:
            raise TypeError(
                "recalibrate: x and the layer need to be float32 or float64 on the CPU, "
                f"and x of a shape that {self} trains with"
            )
        return super()._elsewhere(x)
