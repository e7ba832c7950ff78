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
from numbanorm.torch.plan import Call, prepare
from numbanorm.torch.vmap import map_backward, map_forward
from numbanorm.tuning import tuning


def _gradients(
    dy: Tensor | None, tensors: tuple[Any, ...], rest: tuple[bool, bool], method: Method
) -> Iterable[Any]:
    """Return the gradients of all inputs by the operator, from these and the statistics."""
    if dy is None:
        if not method.process_group:
            return (None,) * N_INPUTS
        dy = torch.zeros_like(tensors[0])  # other processes wait for this one
    given = [tensor is not None for tensor in tensors[:N_GRADIENTS]]
    given[2] = rest[0]  # bias itself is needed with an activation alone
    return _where(given, _normalize_backward(dy, *tensors, *rest, *method.arguments()))


def _where(given: list[bool], gradients: Iterable[Tensor]) -> Iterable[Any]:
    """Return the gradients of all inputs, None for those that are not there or have none."""
    pairs = zip(given, gradients, strict=True)
    found = [gradient if is_given else None for is_given, gradient in pairs]
    return *found, *[None] * (N_INPUTS - N_GRADIENTS)


# -- Derivatives of the operators ----------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given, ctx.method = Inputs(*inputs[:N_INPUTS]), method_of(*inputs[N_INPUTS:])
    # The slope of an activation is calculated again, from what it was given.
    bias = given.bias if ctx.method.activation else None
    needed = given._replace(bias=bias, running_mean=None, running_var=None)
    ctx.save_for_backward(*needed, output[1])
    ctx.rest = given.bias is not None, given.running_mean is None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiate_forward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradients = _gradients(dy, ctx.saved_tensors, ctx.rest, ctx.method)
    return *gradients, *[None] * len(Method._fields)


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
        x, weight, bias, mean_weight, var_weight, residual, call = args
        y, saved = ops.forward(outputs.empty_like, call, x, mean_weight, var_weight, residual)
        ctx.done = saved, call.plan, bias is not None
        if not call.plan.method.activation:
            bias = None
        ctx.save_for_backward(x, weight, bias, mean_weight, var_weight, residual, call.mask)
        return y, saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        *tensors, mask = ctx.saved_tensors
        inputs, (saved, plan, has_bias) = Inputs._make((*tensors, None, None, mask)), ctx.done
        if torch.is_grad_enabled() or not private.is_eager(dy):
            rest = has_bias, plan.recipe.mode.use_batch_stats
            gradients = _gradients(dy, (*inputs, ops.pack(saved)), rest, plan.method)
            return *tuple(gradients)[:N_GRADIENTS], None
        dy = dy.resolve_neg()
        in_force, sole = tuning(), None
        # What is small malloc has at hand.
        if dy.nbytes >= in_force.recycle_tensors_from and in_force.dx_over_dy:
            sole = private.sole_owner_counts()
        is_free = sole is not None and private.owner_counts(dy) == sole
        dx = gradient_like(inputs.x, dy, is_free, plan.form)
        return *ops.backward(dx, dy, inputs, saved, plan), None


def direct_call(inputs: Inputs, method: Method) -> Call | None:
    """Return the call for :func:`run`, or None where something else watches."""
    if method.process_group or not private.is_eager(inputs.x):
        return None
    return prepare(inputs, _with_number(method))


def operator(inputs: Inputs, method: Method) -> tuple[Tensor, Tensor]:
    """Return y and the packed statistics by the operator."""
    y, statistics = _normalize_forward(*inputs, *_with_number(method).arguments())
    return y, statistics


def _with_number(method: Method) -> Method:
    """Return the same with eps as a number: PyTorch takes a tensor, too."""
    return method if type(method.eps) is float else method._replace(eps=float(method.eps))


def run(layer: object, call: Call, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Saved]:
    """Return y of a layer, and what was saved; the others are those that have gradients."""
    if x.nbytes >= tuning().recycle_tensors_from and tuning().recycle:
        outputs.used_by(layer)
    if torch.is_grad_enabled():
        y, saved = private.apply_of(_Normalize)(x, *others, call)
        return y, saved
    return ops.forward(outputs.empty_like, call, x, *others[2:])
