"""How tensors are normalised and differentiated: by the operators, or without PyTorch's dispatcher.

The operators' derivatives are registered with PyTorch: that of ``normalize`` is
``normalize_backward``, and that of this is the derivative of the definition.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from numbanorm.core.layouts import Saved
from numbanorm.torch import ops, private
from numbanorm.torch.definition import gradient_function
from numbanorm.torch.memory import gradient_like, outputs
from numbanorm.torch.method import N_GRADIENTS, N_INPUTS, Inputs, Method, method_of
from numbanorm.torch.ops import backward_arguments
from numbanorm.torch.vmap import map_backward, map_forward
from numbanorm.tuning import tuning


def _save(ctx: Any, inputs: Inputs, method: Method, *statistics: Tensor) -> None:
    """Save what backward needs of a forward."""
    # The slope of an activation is calculated again, from what it was given.
    bias = inputs.bias if method.activation else None
    needed = inputs._replace(bias=bias, running_mean=None, running_var=None)
    ctx.save_for_backward(*needed, *statistics)
    ctx.rest = inputs.bias is not None, inputs.running_mean is None
    ctx.method = method
    ctx.given = [tensor is not None for tensor in inputs[:N_GRADIENTS]]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *statistics: Tensor) -> Iterable[Any]:
    """Return the gradients of all inputs by the operator."""
    if dy is None:
        if not ctx.method.process_group:
            return (None,) * N_INPUTS
        dy = torch.zeros_like(ctx.saved_tensors[0])  # other processes wait for this one
    arguments = *ctx.saved_tensors, *statistics, *ctx.rest, *ctx.method.arguments()
    return _where(ctx.given, _normalize_backward(dy, *arguments))


def _where(given: list[bool], gradients: Iterable[Tensor]) -> Iterable[Any]:
    """Return the gradients of all inputs, None for those that are not there or have none."""
    pairs = zip(given, gradients, strict=True)
    found = [gradient if is_given else None for is_given, gradient in pairs]
    return *found, *[None] * (N_INPUTS - N_GRADIENTS)


# -- Derivatives of the operators ----------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, Inputs(*inputs[:N_INPUTS]), method_of(*inputs[N_INPUTS:]), output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_forward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy), *[None] * len(Method._fields)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, *args = inputs
    tensors, (statistics, has_bias, ctx.use_batch_stats), ctx.method = backward_arguments(args)
    ctx.save_for_backward(dy, *tensors, statistics)
    ctx.given = [tensor is not None for tensor in tensors[:N_GRADIENTS]]
    ctx.has_bias = has_bias


def _differentiate_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients of the definition."""
    dy, *tensors, statistics = ctx.saved_tensors
    inputs, method = Inputs(*tensors), ctx.method
    gradient, primals = gradient_function(inputs, statistics, ctx.use_batch_stats, method)
    # Backward has no bias, but its gradient.
    has_gradient = [*ctx.given[:2], ctx.has_bias, *ctx.given[3:]]
    cotangents = (
        g if is_given else torch.zeros_like(t)
        for is_given, g, t in zip(has_gradient, gradients, primals, strict=True)
    )
    d_dy, *derivatives = torch.func.vjp(gradient, dy, *primals)[1](tuple(cotangents))
    return d_dy, *_where(ctx.given, derivatives), *[None] * (3 + len(Method._fields))


def _differentiable(
    op: Any,
    save: Callable[..., None],
    differentiate: Callable[..., tuple[Tensor | None, ...]],
    map_rule: Callable[..., Any],
) -> Callable[..., Any]:
    """Register how to differentiate an operator and how to map it; return what calls it."""
    op.register_autograd(differentiate, setup_context=save)

    torch.library.register_vmap(op, map_rule)

    # torch.func differentiates such functions, but not operators.
    class Function(torch.autograd.Function):
        forward = staticmethod(lambda *args: op(*args))
        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)
        vmap = staticmethod(map_rule)

    def call(*args: Any) -> Any:
        in_transform = private.may_be_transformed() and torch.is_grad_enabled()
        return Function.apply(*args) if in_transform else op(*args)

    return call


_normalize_backward: Callable[..., Any] = _differentiable(
    ops.backward_op,
    _save_backward,
    _differentiate_backward,
    lambda *args: map_backward(_normalize_forward, _normalize_backward, *args),
)
_normalize_forward: Callable[..., Any] = _differentiable(
    ops.normalize_op,
    _save_forward,
    _differentiate_forward,
    lambda *args: map_forward(_normalize_forward, *args),
)


# -- Without the dispatcher ----------------------------------------------------------------------


class _Normalize(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which takes as long as a small layer.

    What the operator packs into a tensor stays as it is, unless a second derivative wants it.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Saved]:
        *tensors, method = args
        inputs = Inputs(*tensors)
        y, ctx.saved = ops.forward(outputs.empty_like, inputs, method)
        _save(ctx, inputs, method)
        return y, ctx.saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None or torch.is_grad_enabled() or not private.is_eager(dy):
            return *_gradients(ctx, dy, ops.pack(ctx.saved)), None
        inputs, dy = Inputs(*ctx.saved_tensors), dy.resolve_neg()
        sole = private.sole_owner_counts() if tuning().dx_over_dy else None
        is_free = sole is not None and private.owner_counts(dy) == sole
        dx = gradient_like(inputs.x, dy, is_free, ctx.method)
        has_bias, use_batch_stats = ctx.rest
        gradients = ops.backward(dx, dy, inputs, ctx.saved, has_bias, use_batch_stats, ctx.method)
        return *gradients, *[None] * (1 + N_INPUTS - N_GRADIENTS)


def normalize(layer: object, inputs: Inputs, method: Method) -> tuple[Tensor, Tensor | Saved]:
    """Return a layer's y and the statistics: what was saved where nothing else needs a tensor."""
    if type(method.eps) is not float:  # PyTorch takes a tensor
        method = method._replace(eps=float(method.eps))
    x = inputs.x
    if method.process_group or not private.is_eager(x):
        y, statistics = _normalize_forward(*inputs, *method.arguments())
        return y, statistics
    if x.nbytes >= tuning().recycle_tensors_from and tuning().recycle:
        outputs.used_by(layer)
    if torch.is_grad_enabled():
        y, statistics = private.apply_of(_Normalize)(*inputs, method)
    else:
        y, statistics = ops.forward(outputs.empty_like, inputs, method)
    return y, statistics
