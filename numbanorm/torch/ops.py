"""The two custom operators, ``numbanorm::normalize`` and ``numbanorm::normalize_backward``.

Tensors are seen as arrays, without a copy and in their own order in memory. What forward saved is
packed into one tensor for backward. Where nothing but autograd watches, :func:`forward` and
:func:`backward` are called without the operators, and nothing is packed.

The operators take the :class:`~numbanorm.torch.method.Inputs` and the fields of a
:class:`~numbanorm.torch.method.Method` one by one, the names of its statistics joined by commas.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from numbanorm import methods
from numbanorm.core.geometry import Geometry, geometry, normalize_axes
from numbanorm.core.layouts import Instances, Saved, Statistic
from numbanorm.core.normalize import differentiate, normalize, restore
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.numba_ext.threads import thread_count
from numbanorm.torch import distributed
from numbanorm.torch.memory import HALVES, as_array, empty_like
from numbanorm.torch.method import (
    N_INPUTS,
    Inputs,
    Method,
    activation_of,
    feature_shape,
    group_counts,
    has_instances,
    method_of,
)


def _optional(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else as_array(tensor)


def _wide(tensor: Tensor) -> Array:
    """Return a parameter or a running statistic, in float32 if it has 16 bits."""
    return as_array(tensor.float() if tensor.dtype in HALVES else tensor)


def _parameter(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else _wide(tensor)


def _mixture(inputs: Inputs) -> Float64 | None:
    mean_weight, var_weight = inputs.mean_weight, inputs.var_weight
    if mean_weight is None or var_weight is None:
        return None
    return methods.mix(_wide(mean_weight), _wide(var_weight))


@functools.lru_cache(maxsize=4096)
def _geometry(shape: Axes, method: Method) -> Geometry:
    """Return over which axes of an x of this shape statistics and parameters are."""
    if not method.axes:
        x = np.broadcast_to(0.0, shape)
        return methods.channel_geometry(
            x, 1, method.statistics, method.num_groups, method.sample_variance
        )
    n = len(shape)
    axes, features = (normalize_axes(a, n) for a in (method.axes, method.feature_axes))
    return geometry(
        shape, (axes,), features, groups=method.num_groups, group_axis=method.group_axis % n
    )


# -- Statistics as one tensor --------------------------------------------------------------------


@np.errstate(all="ignore")
def pack(saved: Saved) -> Tensor:
    """Return mean, variance for running statistics, variance and count of all groups, (4, S)."""
    statistics = saved.all_statistics()
    sample_variance = saved.sample_variance
    if sample_variance and math.prod(saved.shape[2:]) > 1:
        zeros = np.zeros((*saved.shape[:2], 1))
        empty = Instances(zeros.astype(np.int64), zeros, zeros)
        instances = saved.statistics.instances or empty
        var = instances.m2 / np.maximum(instances.n, 1)
        statistics = [*statistics, Statistic((), instances.n, instances.mean, var)]
    shape = 4, sum(statistic.mean.size for statistic in statistics)
    tensor = torch.empty(shape, dtype=torch.float64, device="cpu")
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


def _restore(
    statistics: Tensor,
    inputs: Inputs,
    dx: Tensor,
    has_bias: bool,
    use_batch_stats: bool,
    method: Method,
) -> Saved:
    """Return what forward saved, from what was packed."""
    array = as_array(inputs.x)
    geometry = _geometry(array.shape, method)
    axes, instances = geometry.reductions, None
    if has_instances(inputs.x, method):
        *unpacked, (_, n, mean, var) = _unpack(statistics, geometry, (*axes, geometry.inner(True)))
        assert n is not None
        instances = Instances(n, mean, var * n)
    else:
        unpacked = _unpack(statistics, geometry, axes)
    if not use_batch_stats:
        unpacked[geometry.tracked] = unpacked[geometry.tracked]._replace(n=None)
    return restore(
        array,
        as_array(dx),
        geometry,
        _parameter(inputs.weight),
        has_bias,
        method.eps,
        unpacked,
        mixture=_mixture(inputs),
        center=method.center,
        sample_variance=method.sample_variance,
        mask=_optional(inputs.mask),
        instances=instances,
        bias=_parameter(inputs.bias),
        activation=activation_of(method.activation, method.slope),
        residual=_optional(inputs.residual),
        exchange=distributed.exchange(method.process_group, array),
    )


# -- Forward and backward of tensors -------------------------------------------------------------


def forward(
    empty_like: Callable[[Tensor, Method], Tensor], inputs: Inputs, method: Method
) -> tuple[Tensor, Saved]:
    """Return y, and what backward needs beside x, mask and residual."""
    y = empty_like(inputs.x, method)
    array = as_array(inputs.x)
    running = None
    if inputs.running_mean is not None and inputs.running_var is not None:
        running = _wide(inputs.running_mean), _wide(inputs.running_var)
    with thread_count(torch.get_num_threads()):
        saved = normalize(
            array,
            as_array(y),
            _geometry(array.shape, method),
            _parameter(inputs.weight),
            _parameter(inputs.bias),
            method.eps,
            running=running,
            mixture=_mixture(inputs),
            center=method.center,
            sample_variance=method.sample_variance,
            mask=_optional(inputs.mask),
            activation=activation_of(method.activation, method.slope),
            residual=_optional(inputs.residual),
            exchange=distributed.exchange(method.process_group, array),
        )
    # Autograd keeps x, mask and residual, and knows when not to.
    return y, saved.with_inputs(None, None, None)


def backward(
    dx: Tensor,
    dy: Tensor,
    inputs: Inputs,
    statistics: Tensor | Saved,
    has_bias: bool,
    use_batch_stats: bool,
    method: Method,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, logits and residual.

    They come from the packed statistics or from what was saved. That of x is written to ``dx``,
    which may be ``dy``. Of ``inputs``, running statistics are not needed, and bias only with an
    activation.
    """
    given = inputs.weight is not None, has_bias, *[w is not None for w in inputs[3:5]]
    if isinstance(statistics, Saved):
        saved = statistics.with_inputs(
            as_array(inputs.x), _optional(inputs.mask), _optional(inputs.residual)
        )
    else:
        saved = _restore(statistics, inputs, dx, has_bias, use_batch_stats, method)
    dresidual = None if inputs.residual is None else empty_like(inputs.x, method)
    with thread_count(torch.get_num_threads()):
        gradients = differentiate(as_array(dy), saved, as_array(dx), dx is dy, _optional(dresidual))
    dtype = parameter_dtype(inputs)
    return (
        dx,
        *(
            # A copy, in memory of PyTorch's own, which may be resized.
            torch.tensor(gradient, dtype=dtype, device="cpu")
            if is_given and gradient is not None
            else None
            for gradient, is_given in zip(gradients, given, strict=True)
        ),
        dresidual,
    )


def parameter_dtype(inputs: Inputs) -> torch.dtype:
    """Return the type of the parameters, which is one for all."""
    return next((t.dtype for t in inputs[1:5] if t is not None), inputs.x.dtype)


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
    y, saved = forward(empty_like, inputs, method)
    return y, pack(saved)


@normalize_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    x, method = args[0], method_of(*args[N_INPUTS:])
    groups = sum(group_counts(x, method))
    if has_instances(x, method):
        groups += x.shape[0] * x.shape[1]
    return empty_like(x, method), x.new_empty((4, groups), dtype=torch.float64)


@_operator(
    "normalize_backward",
    f"(Tensor dy, {INPUTS}, Tensor statistics, bool has_bias, bool use_batch_stats, {METHOD}) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dmean_weight, Tensor dvar_weight, "
    "Tensor dresidual)",
)
def backward_op(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return the gradients as backward does; those that are not there are empty."""
    inputs, rest, method = backward_arguments(args)
    x = inputs.x
    gradients = backward(empty_like(x, method), dy, inputs, *rest, method)
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
    dresidual = empty_like(x, method) if has_residual else x.new_empty(0)
    return empty_like(x, method), *others, dresidual


def backward_arguments(args: Sequence[Any]) -> tuple[Inputs, tuple[Any, Any, Any], Method]:
    """Return inputs; statistics, has_bias and use_batch_stats; and method of a backward."""
    n = N_INPUTS + 3
    statistics, has_bias, use_batch_stats = args[N_INPUTS:n]
    rest = statistics, has_bias, use_batch_stats
    return Inputs(*args[:N_INPUTS]), rest, method_of(*args[n:])
