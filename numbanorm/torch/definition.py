"""The definition: what the operator does, in PyTorch's own operators.

For other devices and types, for forward-mode derivatives and for second ones.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from numbanorm.torch.method import (
    N_GRADIENTS,
    Inputs,
    Method,
    feature_shape,
    split_shape,
    tracked,
    tracked_part,
)


def fill(inputs: Inputs, method: Method) -> Inputs:
    """Return inputs with parameters that say nothing for None."""
    x, weight, bias, mean_weight, var_weight, residual = inputs[:6]
    shape = feature_shape(x, method)
    return inputs._replace(
        weight=x.new_ones(shape) if weight is None else weight,
        bias=x.new_zeros(shape) if bias is None else bias,
        mean_weight=x.new_zeros(1) if mean_weight is None else mean_weight,
        var_weight=x.new_zeros(1) if var_weight is None else var_weight,
        residual=x.new_zeros(()) if residual is None else residual,
    )


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the type that x is calculated in."""
    return torch.promote_types(x.dtype, torch.float32)


def finish(y: Tensor, residual: Tensor | None, activation: str, slope: float) -> Tensor:
    """Return what follows the norm: the activation of y + residual."""
    z = y if residual is None else y + residual
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu(z, slope)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(z, approximate="tanh")
    return getattr(torch.nn.functional, activation)(z) if activation else z


def definition(inputs: Inputs, method: Method) -> tuple[Tensor, Tensor]:
    """Return y and the packed statistics, for any device and type."""
    if method.process_group:  # the samples of other processes are not known here
        raise NotImplementedError(
            "SyncBatchNorm over several processes has neither forward-mode nor second derivatives, "
            "is not mapped, and needs plain tensors on the CPU"
        )
    inputs = fill(inputs, method)._replace(residual=inputs.residual)
    x, weight, bias, mean_weight, var_weight, residual, *running, mask = inputs
    running_mean, running_var = running
    assert weight is not None and bias is not None
    assert mean_weight is not None and var_weight is not None
    if method.axes:
        shape, reduced, features = split_shape(x, method)
    else:  # (N, groups, channels of a group, elements of an instance)
        length, groups = math.prod(x.shape[2:]), method.num_groups
        shape = x.shape[0], groups, x.shape[1] // groups, length
        reduced, features = (3,), (1, 2)
    feature_grid = [size if axis in features else 1 for axis, size in enumerate(shape)]
    running_grid = feature_grid
    if method.axes:
        kept = [axis for axis in range(1, len(shape)) if axis not in reduced]
        running_grid = [size if axis in kept else 1 for axis, size in enumerate(shape)]
    wide = x.to(wide_dtype(x)).reshape(shape)
    counts, lost = torch.ones_like(wide), None
    if mask is not None:
        counted = mask.expand(x.shape).reshape(shape)
        # What does not count reaches nothing but its own y, whatever it is.
        lost = torch.where(~(counted | wide.isfinite()), wide.detach(), 0)
        counts, wide = counted.to(wide.dtype), torch.where(lost == 0, wide, 0)
    n_in = counts.sum(reduced, keepdim=True)
    mean_in = (wide * counts).sum(reduced, keepdim=True) / n_in.clamp(min=1)
    if not method.center:
        mean_in = torch.zeros_like(mean_in)
    var_in = ((wide - mean_in) ** 2 * counts).sum(reduced, keepdim=True) / n_in.clamp(min=1)
    if method.sample_variance:
        var_in = var_in * (n_in / (n_in - 1).clamp(min=1))
    of_instances = method.sample_variance and shape[-1] > 1
    p, q = mean_weight.to(wide.dtype).softmax(0), var_weight.to(wide.dtype).softmax(0)
    mean, var, known, packed = wide.new_zeros(()), wide.new_zeros(()), n_in < 0, []
    for k, name in enumerate(method.statistics):
        mean_k, var_k, n = mean_in, var_in, n_in
        axes = {"ln": (1, 2), "bn": (0,), "gn": (2,)}.get(name)
        if axes is not None:
            # The mean of the instances' variances, and the variance of their means.
            n = n_in.sum(axes, keepdim=True)
            mean_k = (mean_in * n_in).sum(axes, keepdim=True) / n.clamp(min=1)
            parts = (var_in + (mean_in - mean_k) ** 2) * n_in
            var_k = parts.sum(axes, keepdim=True) / n.clamp(min=1)
            if method.sample_variance and not of_instances:
                var_k = var_k * (n / (n - 1).clamp(min=1))
        unbiased = var_k if method.sample_variance else var_k * (n / (n - 1).clamp(min=1))
        if running_mean is not None and running_var is not None and k == tracked(method):
            mean_k, var_k = running_mean.reshape(running_grid), running_var.reshape(running_grid)
            unbiased, n = var_k, torch.ones_like(var_k)
        mean, var = mean + p[k] * mean_k, var + q[k] * var_k
        known = known | (n > 0)
        packed.append(torch.stack((mean_k, unbiased, var_k, n)).reshape(4, -1))
    known = known & ~(var + method.eps <= 0)  # also where it is NaN
    rstd = torch.where(known, torch.rsqrt(torch.where(known, var + method.eps, 1)), 0)
    y = (wide - mean) * rstd * weight.reshape(feature_grid) + bias.reshape(feature_grid)
    if lost is not None:
        y = y + lost
    y = finish(y.reshape(x.shape), residual, method.activation, method.slope)
    return y.to(x.dtype), torch.cat(packed, 1)


def gradient_function(
    inputs: Inputs, statistics: Tensor, use_batch_stats: bool, method: Method
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a function of dy and the tensors that have gradients, and these tensors."""
    if not use_batch_stats:
        mean, _, var, _ = tracked_part(statistics, inputs.x, method).to(wide_dtype(inputs.x))
        inputs = inputs._replace(running_mean=mean, running_var=var)
    filled = fill(inputs, method)

    def y(*tensors: Tensor) -> Tensor:
        return definition(Inputs(*tensors, *filled[N_GRADIENTS:]), method)[0]

    def gradients(dy: Tensor, *tensors: Tensor) -> Any:
        return torch.func.vjp(y, *tensors)[1](dy)

    return gradients, filled[:N_GRADIENTS]
