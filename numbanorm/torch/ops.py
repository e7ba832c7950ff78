"""The two custom operators, ``numbanorm::normalize`` and ``numbanorm::normalize_backward``.

Tensors are seen as arrays, without a copy and in their own order in memory. What forward saved is
packed into one tensor for backward. Where nothing but autograd watches, :func:`forward` and
:func:`backward` are called without the operators, and nothing is packed.

The operators take the :class:`~numbanorm.torch.method.Inputs` and the fields of a
:class:`~numbanorm.torch.method.Method` one by one, the names of its statistics joined by commas.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from numbanorm import methods
from numbanorm.core.geometry import Geometry
from numbanorm.core.layouts import Instances, Recipe, Saved, Statistic, finish_target
from numbanorm.core.normalize import ParameterGradients, restore, run_backward, run_forward
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.numba_ext.threads import thread_count
from numbanorm.torch import distributed
from numbanorm.torch.memory import DTYPES, HALVES, as_array, borrow, empty_like, form_of
from numbanorm.torch.method import (
    N_INPUTS,
    Inputs,
    Method,
    feature_shape,
    group_counts,
    has_instances,
    method_of,
)
from numbanorm.torch.plan import Call, Plan, parameter_array, parameter_dtype, prepare, wide_array


def _optional(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else as_array(tensor)


def _mixture(mean_weight: Tensor | None, var_weight: Tensor | None) -> Float64 | None:
    if mean_weight is None or var_weight is None:
        return None
    return methods.mix(wide_array(mean_weight), wide_array(var_weight))


# -- Statistics as one tensor --------------------------------------------------------------------


@np.errstate(all="ignore")
def pack(saved: Saved) -> Tensor:
    """Return mean, variance for running statistics, variance and count of all groups, (4, S)."""
    statistics = saved.all_statistics()
    shape, sample_variance = saved.recipe.shape, saved.recipe.sample_variance
    if sample_variance and math.prod(shape[2:]) > 1:
        zeros = np.zeros((*shape[:2], 1))
        empty = Instances(zeros.astype(np.int64), zeros, zeros)
        instances = saved.statistics.instances or empty
        var = instances.m2 / np.maximum(instances.n, 1)
        statistics = [*statistics, Statistic((), instances.n, instances.mean, var)]
    n_groups = sum(statistic.mean.size for statistic in statistics)
    tensor = torch.empty((4, n_groups), dtype=torch.float64, device="cpu")
    first, packed = 0, as_array(tensor)
    for _, n, mean, var in statistics:
        count: Any = np.zeros(1) if n is None else n
        unbiased = var * (count / np.maximum(count - (0 if sample_variance else 1), 1))
        last = first + mean.size
        for row, values in zip(packed, (mean, unbiased, var, count), strict=True):
            row[first:last] = values.ravel()
        first = last
    return tensor


def _unpack(statistics: Tensor, geometry: Geometry, axes: Iterable[Axes]) -> list[Statistic]:
    """Return the statistics over these axes again."""
    rows, first, unpacked = as_array(statistics), 0, []
    for reduced in axes:
        shape = [1 if axis in reduced else n for axis, n in enumerate(geometry.shape)]
        last = first + math.prod(shape)
        mean, _, var, n = rows[:, first:last].reshape(4, *shape)
        unpacked.append(Statistic(reduced, n.astype(np.int64), mean, var))
        first = last
    return unpacked


def _restore(statistics: Tensor, inputs: Inputs, recipe: Recipe, method: Method) -> Saved:
    """Return what forward saved, from what was packed."""
    geometry, instances = recipe.geometry, None
    axes = geometry.reductions
    if has_instances(inputs.x, method):
        *unpacked, (_, n, mean, var) = _unpack(statistics, geometry, (*axes, geometry.inner(True)))
        assert n is not None
        instances = Instances(n, mean, var * n)
    else:
        unpacked = _unpack(statistics, geometry, axes)
    if not recipe.mode.use_batch_stats:
        unpacked[geometry.tracked] = unpacked[geometry.tracked]._replace(n=None)
    array = as_array(inputs.x)
    return restore(
        array,
        recipe,
        parameter_array(inputs.weight),
        parameter_array(inputs.bias),
        unpacked,
        mixture=_mixture(inputs.mean_weight, inputs.var_weight),
        mask=_optional(inputs.mask),
        instances=instances,
        residual=_optional(inputs.residual),
        exchange=distributed.exchange(method.process_group, array),
    )


# -- Forward and backward of tensors -------------------------------------------------------------


def forward(
    empty_like: Callable[[Tensor, torch.memory_format], Tensor],
    call: Call,
    x: Tensor,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Saved]:
    """Return y, and what backward needs beside x, mask and residual."""
    plan, weight, bias, running, mask = call
    y, exchange = empty_like(x, plan.form), None
    mixture = None if mean_weight is None else _mixture(mean_weight, var_weight)
    if plan.method.process_group:
        exchange = distributed.exchange(plan.method.process_group, as_array(x))
    target, copied = plan.target(y)
    counts = None if mask is None else plan.recipe.layout.to_view(as_array(mask))
    added = None if residual is None else plan.view(residual)
    arguments = plan.view(x), counts, added, target, weight, bias, running, mixture, exchange
    if plan.is_small:
        statistics = run_forward(plan.recipe, *arguments)
    else:
        with thread_count(torch.get_num_threads()):
            statistics = run_forward(plan.recipe, *arguments)
    finish_target(target, copied)
    # Autograd keeps x, mask and residual, and knows when not to.
    return y, Saved(plan.recipe, None, None, None, "", mixture, statistics, exchange)


def backward(
    dx: Tensor,
    dy: Tensor,
    inputs: Inputs,
    statistics: Tensor | Saved,
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, logits and residual.

    They come from the packed statistics or from what was saved. That of x is written to ``dx``,
    which may be ``dy``. Of ``inputs``, running statistics are not needed, and bias only with an
    activation.
    """
    recipe, x, residual, mask = plan.recipe, inputs.x, inputs.residual, inputs.mask
    if isinstance(statistics, Tensor):
        saved = _restore(statistics, inputs, recipe, plan.method)
    else:
        counts = None if mask is None else recipe.layout.to_view(as_array(mask))
        added = None if residual is None else plan.view(residual)
        saved = statistics.with_views(plan.view(x), counts, added)
    target, copied = plan.target(dx)
    dresidual = None if residual is None else empty_like(x, plan.form)
    second, second_copied = (None, None) if dresidual is None else plan.target(dresidual)
    arguments = plan.view(dy), saved, dx is dy and copied is None, target, second
    if plan.is_small:
        gradients = run_backward(*arguments)
    else:
        with thread_count(torch.get_num_threads()):
            gradients = run_backward(*arguments)
    finish_target(target, copied)
    finish_target(second, second_copied)
    return dx, *_new_tensors(gradients, parameter_dtype(inputs), inputs.weight), dresidual


@np.errstate(all="ignore")  # as PyTorch does
def _new_tensors(
    gradients: ParameterGradients, dtype: torch.dtype, weight: Tensor | None
) -> list[Tensor | None]:
    """Return copies, in memory of PyTorch's own, which may be resized."""
    tensors: list[Tensor | None] = []
    for values in gradients:
        if values is None:
            tensors.append(None)
        elif dtype in HALVES:
            tensors.append(torch.tensor(values, dtype=dtype, device="cpu"))
        else:
            if weight is not None and weight.is_contiguous() and weight.shape == values.shape:
                tensor = torch.empty_like(weight)  # in half the time
            else:
                tensor = torch.empty(values.shape, dtype=dtype, device="cpu")
            borrow(tensor, values.shape, DTYPES[dtype], writable=True)[...] = values
            tensors.append(tensor)
    return tensors


# -- The operators -------------------------------------------------------------------------------

INPUTS = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? mean_weight, Tensor? var_weight, "
    "Tensor? residual, Tensor? running_mean, Tensor? running_var, Tensor? mask"
)
METHOD = (
    "str over, float eps, int num_groups, int[] axes, int[] feature_axes, int group_axis, "
    "bool center, bool sample_variance, str process_group, str activation, float slope"
)


def _operator(name: str, schema: str) -> Any:
    return torch.library.custom_op(
        f"numbanorm::{name}", mutates_args=(), device_types="cpu", schema=schema
    )


@_operator("normalize", f"({INPUTS}, {METHOD}) -> (Tensor y, Tensor statistics)")
def normalize_op(*args: Any) -> tuple[Tensor, Tensor]:
    """Return y and the statistics; running ones, where given, take the place of "bn"."""
    inputs, method = Inputs(*args[:N_INPUTS]), method_of(*args[N_INPUTS:])
    tensors = inputs.x, inputs.mean_weight, inputs.var_weight, inputs.residual
    y, saved = forward(empty_like, prepare(inputs, method), *tensors)
    return y, pack(saved)


@normalize_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    x, method = args[0], method_of(*args[N_INPUTS:])
    groups = sum(group_counts(x, method))
    if has_instances(x, method):
        groups += x.shape[0] * x.shape[1]
    return empty_like(x, form_of(method)), x.new_empty((4, groups), dtype=torch.float64)


@_operator(
    "normalize_backward",
    f"(Tensor dy, {INPUTS}, Tensor statistics, bool has_bias, bool use_batch_stats, {METHOD}) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dmean_weight, Tensor dvar_weight, "
    "Tensor dresidual)",
)
def backward_op(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return the gradients as backward does; those that are not there are empty."""
    inputs, (statistics, has_bias, use_batch_stats), method = backward_arguments(args)
    x, plan = inputs.x, Plan.of(inputs, method, has_bias, use_batch_stats)
    gradients = backward(empty_like(x, form_of(method)), dy, inputs, statistics, plan)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


@backward_op.register_fake
def _(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, (_, has_bias, _), method = backward_arguments(args)
    x, shape = inputs.x, feature_shape(inputs.x, method)
    logits = () if inputs.mean_weight is None else inputs.mean_weight.shape
    sizes = (
        shape if inputs.weight is not None else None, shape if has_bias else None,
        *[logits or None] * 2,
    )  # fmt: skip
    dtype = parameter_dtype(inputs)
    others = (x.new_empty(0) if size is None else x.new_empty(size, dtype=dtype) for size in sizes)
    has_residual = inputs.residual is not None
    dresidual = empty_like(x, form_of(method)) if has_residual else x.new_empty(0)
    return empty_like(x, form_of(method)), *others, dresidual


def backward_arguments(args: Sequence[Any]) -> tuple[Inputs, tuple[Any, Any, Any], Method]:
    """Return inputs; statistics, has_bias and use_batch_stats; and method of a backward."""
    n = N_INPUTS + 3
    statistics, has_bias, use_batch_stats = args[N_INPUTS:n]
    rest = statistics, has_bias, use_batch_stats
    return Inputs(*args[:N_INPUTS]), rest, method_of(*args[n:])
