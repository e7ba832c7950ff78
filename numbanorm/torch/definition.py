"""The definition: what the operator does, in PyTorch's own operators.

For other devices and types, for forward-mode derivatives of SwitchableNorm and for second
derivatives.
"""

import math

import torch
from torch import Tensor

from numbanorm.torch.method import Method, feature_shape, of_rows, tracked


def fill(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    method: Method,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x and all parameters, with those that say nothing for None."""
    shape = feature_shape(x, method)
    return (
        x,
        x.new_ones(shape) if weight is None else weight,
        x.new_zeros(shape) if bias is None else bias,
        x.new_zeros(1) if mean_weight is None else mean_weight,
        x.new_zeros(1) if var_weight is None else var_weight,
    )


def definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    *,
    method: Method,
    running: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Return y and the packed statistics, for any device and type."""
    sample_variance, (running_mean, running_var) = method.sample_variance, running
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if of_rows(method):
        length = math.prod(feature_shape(x, method))
        split, feature_grid = wide.reshape(-1, 1, 1, length), [1, 1, 1, -1]
    else:
        length, groups = math.prod(x.shape[2:]), method.num_groups
        split = wide.reshape(x.shape[0], groups, x.shape[1] // groups, length)
        feature_grid = [1, *split.shape[1:3], 1]
    mean_in = split.mean(-1, keepdim=True)
    var_in = split.var(-1, correction=0, keepdim=True)
    of_instances = sample_variance and length > 1
    if of_instances:
        var_in = var_in * (length / (length - 1))
    if method.statistics == ("rms",):
        mean_in, var_in = torch.zeros_like(mean_in), var_in + mean_in**2
    p, q = mean_weight.to(wide.dtype).softmax(0), var_weight.to(wide.dtype).softmax(0)
    mean, var, packed = wide.new_zeros(()), wide.new_zeros(()), []
    for k, name in enumerate(method.statistics):
        mean_k, var_k, n = mean_in, var_in, length
        axes = {"ln": (1, 2), "bn": (0,), "gn": (2,)}.get(name)
        if running_mean is not None and running_var is not None and k == tracked(method):
            mean_k, var_k = running_mean.reshape(feature_grid), running_var.reshape(feature_grid)
        elif axes is not None:
            # The mean of the instances' variances, and the variance of their means.
            mean_k = mean_in.mean(axes, keepdim=True)
            var_k = (var_in + (mean_in - mean_k) ** 2).mean(axes, keepdim=True)
            n = split.numel() // max(mean_k.numel(), 1)
            if sample_variance and not of_instances:
                var_k = var_k * (n / max(n - 1, 1))
        mean, var = mean + p[k] * mean_k, var + q[k] * var_k
        unbiased = var_k * (1 if sample_variance else n / max(n - 1, 1))
        rows = mean_k, unbiased, var_k, torch.full_like(mean_k, n)
        packed.append(torch.stack(rows).reshape(4, -1))
    y = (split - mean) * torch.rsqrt(var + method.eps)
    y = y * weight.reshape(feature_grid) + bias.reshape(feature_grid)
    return y.reshape(x.shape).to(x.dtype), torch.cat(packed, 1)
