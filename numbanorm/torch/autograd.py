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
from numbanorm.torch.definition import definition, fill
from numbanorm.torch.memory import gradient_like, outputs
from numbanorm.torch.method import Method, method_of, tracked_part
from numbanorm.tuning import tuning


def _save(ctx: Any, tensors: tuple[Any, ...], method: Method, *statistics: Tensor) -> None:
    """Save what backward needs of the seven tensors of a forward."""
    x, weight, bias, mean_weight, var_weight, running_mean, _ = tensors
    ctx.save_for_backward(x, weight, mean_weight, var_weight, *statistics)
    ctx.rest = bias is not None, running_mean is None
    ctx.method = method
    ctx.given = [tensor is not None for tensor in tensors[:5]]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *statistics: Tensor) -> Iterable[Any]:
    """Return the gradients of x, weight, bias and logits by the operator."""
    if dy is None:
        if not ctx.method.process_group:
            return (None,) * 5
        dy = torch.zeros_like(ctx.saved_tensors[0])  # other processes wait for this one
    arguments = *ctx.saved_tensors, *statistics, *ctx.rest, *ctx.method.arguments()
    return _where(ctx.given, _normalize_backward(dy, *arguments))


def _where(given: list[bool], gradients: Iterable[Tensor]) -> Iterable[Any]:
    """Return the gradients of x, weight, bias and logits, None for those that are not there."""
    return (g if is_given else None for is_given, g in zip(given, gradients, strict=True))


# -- Derivatives of the operators ----------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs[:7], method_of(*inputs[7:]), output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_forward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy), *[None] * 7


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, mean_weight, var_weight, statistics, has_bias, *rest = inputs
    ctx.save_for_backward(dy, x, weight, mean_weight, var_weight, statistics)
    ctx.use_batch_stats, *arguments = rest
    ctx.method = method_of(*arguments)
    logits = mean_weight is not None, var_weight is not None
    ctx.given = [True, weight is not None, has_bias, *logits]


def _differentiate_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients of the definition."""
    dy, x, weight, mean_weight, var_weight, statistics = ctx.saved_tensors
    method = ctx.method
    if method.process_group:  # the definition knows the samples of this process alone
        raise NotImplementedError("SyncBatchNorm over several processes has no second derivative")
    running: tuple[Any, Any] = None, None
    if not ctx.use_batch_stats:
        mean, _, var, _ = tracked_part(statistics, x, method).to(x.dtype)
        running = mean, var
    filled = fill(x, weight, None, mean_weight, var_weight, method)

    def y(*tensors: Tensor) -> Tensor:
        return definition(*tensors, method=method, running=running)[0]

    def gradient(dy: Tensor, *tensors: Tensor) -> Any:
        return torch.func.vjp(y, *tensors)[1](dy)

    cotangents = (
        g if is_given else torch.zeros_like(t)
        for is_given, g, t in zip(ctx.given, gradients, filled, strict=True)
    )
    d_dy, *derivatives = torch.func.vjp(gradient, dy, *filled)[1](tuple(cotangents))
    d_x, d_weight, _, *d_logits = _where(ctx.given, derivatives)
    return d_dy, d_x, d_weight, *d_logits, *[None] * 8


def _differentiable(
    op: Any, save: Callable[..., None], differentiate: Callable[..., tuple[Tensor | None, ...]]
) -> Callable[..., Any]:
    """Register how to differentiate an operator and how to map it; return what calls it."""
    op.register_autograd(differentiate, setup_context=save)

    def one_by_one(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def take(i: int) -> Iterable[Any]:
            for arg, dim in zip(args, in_dims, strict=True):
                yield arg if dim is None else arg.select(dim, i)

        results = [op(*take(i)) for i in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    torch.library.register_vmap(op, one_by_one)

    # torch.func differentiates such functions, but not operators.
    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(lambda *args: op(*args))
        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)

    def call(*args: Any) -> Any:
        in_transform = private.may_be_transformed() and torch.is_grad_enabled()
        return Function.apply(*args) if in_transform else op(*args)

    return call


_normalize_backward = _differentiable(ops.backward_op, _save_backward, _differentiate_backward)
_normalize_forward = _differentiable(ops.normalize_op, _save_forward, _differentiate_forward)


# -- Without the dispatcher ----------------------------------------------------------------------


class _Normalize(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which takes as long as a small layer.

    What the operator packs into a tensor stays as it is, unless a second derivative wants it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Saved]:
        y, ctx.saved = ops.forward(outputs.empty_like, *inputs)
        _save(ctx, inputs[:7], inputs[7])
        return y, ctx.saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None or torch.is_grad_enabled() or not private.is_eager(dy):
            return *_gradients(ctx, dy, ops.pack(ctx.saved)), *[None] * 3
        x, *parameters = ctx.saved_tensors
        dy = dy.resolve_neg()
        sole = private.sole_owner_counts()
        is_free = sole is not None and private.owner_counts(dy) == sole
        dx = gradient_like(x, dy, is_free, ctx.method)
        kept = *parameters, ctx.saved, *ctx.rest, ctx.method
        return *ops.backward(dx, dy, x, *kept), *[None] * 3


def normalize(
    layer: object,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    method: Method,
    running: tuple[Tensor | None, Tensor | None] = (None, None),
    logits: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | Saved]:
    """Return a layer's y and the statistics: what was saved where nothing else needs a tensor."""
    if type(method.eps) is not float:  # PyTorch takes a tensor
        method = method._replace(eps=float(method.eps))
    tensors = x, weight, bias, *logits, *running
    if private.has_tangent(tensors):
        # Forward mode within forward mode is wrong in PyTorch's own layers.
        if method.process_group:
            raise NotImplementedError(
                "SyncBatchNorm over several processes has no forward-mode derivative"
            )
        filled = fill(x, weight, bias, *logits, method)
        return definition(*filled, method=method, running=running)
    if method.process_group or not private.is_eager(x):
        y, statistics = _normalize_forward(*tensors, *method.arguments())
        return y, statistics
    if x.nbytes >= tuning().recycle_tensors_from:
        outputs.used_by(layer)
    if torch.is_grad_enabled():
        y, statistics = private.apply_of(_Normalize)(*tensors, method)
    else:
        y, statistics = ops.forward(outputs.empty_like, *tensors, method)
    return y, statistics
