"""The two custom operators, ``numbanorm::normalize`` and ``numbanorm::normalize_backward``.

Tensors are seen as arrays, without a copy and in their own order in memory. What forward saved is
packed into one tensor for backward. Where nothing but autograd watches, :func:`forward` and
:func:`backward` are called without the operators, and nothing is packed.

The operators take a method as plain values, under the names that exported programs know: ``over``,
the statistics' names joined by commas; ``number``, how many groups "gn" has or how many axes a row;
eps; whether instances have sample variances; and the name of the process group, or "".
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from numbanorm import methods
from numbanorm.core.geometry import Geometry
from numbanorm.core.layouts import Instances, Saved, Statistic
from numbanorm.core.normalize import differentiate, normalize, restore
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.numba_ext.threads import thread_count
from numbanorm.torch import distributed
from numbanorm.torch.memory import as_array, empty_like
from numbanorm.torch.method import (
    Method,
    feature_shape,
    group_counts,
    has_instances,
    method_of,
    of_rows,
)


def _optional(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else as_array(tensor)


def _mixture(mean_weight: Tensor | None, var_weight: Tensor | None) -> Float64 | None:
    if mean_weight is None or var_weight is None:
        return None
    return methods.mix(as_array(mean_weight), as_array(var_weight), mean_weight.numel())


@functools.lru_cache(maxsize=4096)
def _geometry(shape: Axes, method: Method) -> Geometry:
    """Return over which axes of an x of this shape statistics and parameters are."""
    x = np.broadcast_to(0.0, shape)
    if of_rows(method):
        return methods.trailing_geometry(x, shape[len(shape) - method.row_axes :])
    return methods.channel_geometry(
        x, 1, method.statistics, method.num_groups, method.sample_variance
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
    x: Tensor,
    dx: Tensor,
    weight: Tensor | None,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    has_bias: bool,
    use_batch_stats: bool,
    method: Method,
) -> Saved:
    """Return what forward saved, from what was packed."""
    array = as_array(x)
    geometry = _geometry(array.shape, method)
    axes, instances = geometry.reductions, None
    if has_instances(x, method):
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
        _optional(weight),
        has_bias,
        method.eps,
        unpacked,
        mixture=_mixture(mean_weight, var_weight),
        center=method.statistics != ("rms",),
        sample_variance=method.sample_variance,
        instances=instances,
        exchange=distributed.exchange(method.process_group, array),
    )


# -- Forward and backward of tensors -------------------------------------------------------------


def forward(
    empty_like: Callable[[Tensor, Method], Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    method: Method,
) -> tuple[Tensor, Saved]:
    """Return y, and what backward needs beside x."""
    y = empty_like(x, method)
    array = as_array(x)
    running = None
    if running_mean is not None and running_var is not None:
        running = as_array(running_mean), as_array(running_var)
    with thread_count(torch.get_num_threads()):
        saved = normalize(
            array,
            as_array(y),
            _geometry(array.shape, method),
            _optional(weight),
            _optional(bias),
            method.eps,
            running=running,
            mixture=_mixture(mean_weight, var_weight),
            center=method.statistics != ("rms",),
            sample_variance=method.sample_variance,
            exchange=distributed.exchange(method.process_group, array),
        )
    return y, saved.with_x(None)  # autograd keeps x, and knows when not to


def backward(
    dx: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    statistics: Tensor | Saved,
    has_bias: bool,
    use_batch_stats: bool,
    method: Method,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, bias and logits, from the statistics or what was saved.

    That of x is written to ``dx``, which may be ``dy``.
    """
    given = weight is not None, has_bias, mean_weight is not None, var_weight is not None
    if isinstance(statistics, Saved):
        saved = statistics.with_x(as_array(x))
    else:
        saved = _restore(
            statistics, x, dx, weight, mean_weight, var_weight, has_bias, use_batch_stats, method
        )
    with thread_count(torch.get_num_threads()):
        gradients = differentiate(as_array(dy), saved, as_array(dx), dx is dy)
    dweight, dbias, dmean_weight, dvar_weight = (
        # A copy has memory of PyTorch's own, which may be resized.
        torch.from_numpy(gradient).to(x.dtype, copy=True)
        if is_given and gradient is not None
        else None
        for gradient, is_given in zip(gradients, given, strict=True)
    )
    return dx, dweight, dbias, dmean_weight, dvar_weight


# -- The operators -------------------------------------------------------------------------------


@torch.library.custom_op("numbanorm::normalize", mutates_args=(), device_types="cpu")
def normalize_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    mean_weight: Tensor | None, var_weight: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None,
    over: str, number: int, eps: float, sample_variance: bool, process_group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and the statistics; running ones, where given, take the place of "bn"."""
    y, saved = forward(
        empty_like, x, weight, bias, mean_weight, var_weight, running_mean, running_var,
        method_of(over, number, eps, sample_variance, process_group),
    )  # fmt: skip
    return y, pack(saved)


@normalize_op.register_fake
def _(
    x: Tensor, weight: Any, bias: Any, mean_weight: Any, var_weight: Any, mean: Any, var: Any,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    method = method_of(*arguments)
    groups = sum(group_counts(x, method))
    if has_instances(x, method):
        groups += x.shape[0] * x.shape[1]
    return empty_like(x, method), x.new_empty((4, groups), dtype=torch.float64)


@torch.library.custom_op("numbanorm::normalize_backward", mutates_args=(), device_types="cpu")
def backward_op(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean_weight: Tensor | None,
    var_weight: Tensor | None, statistics: Tensor, has_bias: bool, use_batch_stats: bool,
    over: str, number: int, eps: float, sample_variance: bool, process_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight, bias and logits; those that are not there are empty."""
    method = method_of(over, number, eps, sample_variance, process_group)
    dx, *others = backward(
        empty_like(x, method), dy, x, weight, mean_weight, var_weight, statistics, has_bias,
        use_batch_stats, method,
    )  # fmt: skip
    return dx, *(x.new_empty(0) if gradient is None else gradient for gradient in others)


@backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Any, mean_weight: Tensor | None, var_weight: Any,
    statistics: Tensor, has_bias: bool, use_batch_stats: bool, *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    method = method_of(*arguments)
    shape = feature_shape(x, method)
    dweight = x.new_empty(0 if weight is None else shape)
    dbias = x.new_empty(shape if has_bias else 0)
    logits = 0 if mean_weight is None else mean_weight.shape[0]
    return empty_like(x, method), dweight, dbias, x.new_empty(logits), x.new_empty(logits)
