"""What a layer remembers of a forward, so that the next x like the last one is normalised at once.

Whether numbanorm can take x and the layer's tensors, over which axes, and in which layout follows
from types, shapes, strides and settings: finding that out takes longer than a small layer.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from numbanorm.core.types import Array, Axes
from numbanorm.torch import private
from numbanorm.torch.memory import HALVES, as_array
from numbanorm.torch.method import N_GRADIENTS, Inputs
from numbanorm.torch.plan import Call
from numbanorm.tuning import tuning


class _Known(NamedTuple):
    """A parameter or buffer of a layer, which may be None, and what it was like."""

    name: str
    tensor: Tensor | None
    address: int = 0
    dtype: torch.dtype | None = None
    shape: Axes = ()
    strides: Axes = ()

    @classmethod
    def of(cls, name: str, tensor: Tensor | None) -> Self:
        """Return what a tensor is like."""
        if tensor is None:
            return cls(name, None)
        shape = tuple(tensor.shape)
        return cls(name, tensor, tensor.data_ptr(), tensor.dtype, shape, tensor.stride())


class Running(NamedTuple):
    """Running statistics and their count, as tensors and as arrays."""

    tensors: list[Tensor]
    mean: Array
    var: Array
    n_batches: Array | None


class Memo(NamedTuple):
    """How the last x was normalised, without a mask or a residual.

    Attributes
    ----------
    dtype, shape, strides
        Of x.
    parameters, buffers : list of _Known
        The tensors of the layer.
    call : Call
        What was called.
    others : tuple of (Tensor or None)
        What else has gradients.
    samples : int or None
        Over how many samples running statistics are averaged.
    running : Running or None
        What is moved by each forward.
    """

    dtype: torch.dtype
    shape: Axes
    strides: Axes
    parameters: list[_Known]
    buffers: list[_Known]
    call: Call
    others: tuple[Tensor | None, ...]
    samples: int | None
    running: Running | None

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        inputs: Inputs,
        call: Call,
        tensors: tuple[Tensor | None, ...],
        tracking: tuple[bool, int | None],
    ) -> Self | None:
        """Return what to remember, or None where a tensor of the layer is not its own.

        Nor where one has 16 bits: its array is a copy, which does not follow it.
        """
        own = [*layer._parameters.values(), *layer._buffers.values()]
        for t in tensors:
            if t is not None and (t.dtype in HALVES or not any(t is each for each in own)):
                return None
        is_tracked, samples = tracking
        running = _running(layer) if is_tracked else None
        x = inputs.x
        parameters, buffers = (
            [_Known.of(name, t) for name, t in held.items()]
            for held in (layer._parameters, layer._buffers)
        )
        return cls(
            x.dtype, tuple(x.shape), x.stride(), parameters, buffers, call,
            inputs[1:N_GRADIENTS], samples, running,
        )  # fmt: skip

    def fits(self, layer: nn.Module, x: Tensor) -> bool:
        """Tell whether x is like the last one, and all tensors of the layer are as they were."""
        if (
            type(x) is not Tensor
            or x.dtype is not self.dtype
            or x.is_nested
            or x.layout is not torch.strided
            or x.shape != self.shape
            or x.stride() != self.strides
            or not x.is_cpu
            or x.is_neg()
            or private.is_watched(x)
            or private.may_have_tangent()
            or self.call.plan.recipe.layout.tuning is not tuning()
        ):
            return False
        for known, held in ((self.parameters, layer._parameters), (self.buffers, layer._buffers)):
            for name, tensor, address, dtype, shape, strides in known:
                if held.get(name) is not tensor:
                    return False
                if tensor is not None and (
                    tensor.data_ptr() != address
                    or tensor.dtype is not dtype
                    or tensor.shape != shape
                    or tensor.stride() != strides
                    or tensor.is_neg()
                ):
                    return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """Become None in copies and pickles, as addresses are nothing to them."""
        return type(None), ()


def _running(layer: Any) -> Running:
    """Return the running statistics of a layer."""
    mean, var, n = layer.running_mean, layer.running_var, layer.num_batches_tracked
    tensors = [mean, var] if n is None else [mean, var, n]
    return Running(tensors, as_array(mean), as_array(var), None if n is None else as_array(n))
