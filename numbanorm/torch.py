"""The same layers for PyTorch on the CPU: ``model = numbanorm.torch.convert(model)``.

Each layer is a subclass of PyTorch's of the same name with a ``forward`` of its own, so that
state dicts, checkpoints, hooks and ``isinstance`` are as before. All of them call one operator,
``numbanorm::normalize``, whose derivative is another, ``numbanorm::normalize_backward``. Tensors
are seen as arrays, without a copy and in their own order in memory (``channels_last``).

Other devices and types, forward-mode and second derivatives are left to PyTorch's own code.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as _TorchBatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm as _TorchInstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

import numbanorm
from numbanorm import _checks, _threads, functional
from numbanorm._axes import Array, Geometry
from numbanorm._normalize import Statistic, backward, normalize, restore
from numbanorm._running import Pool
from numbanorm.moments import Moments

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
    "SyncBatchNorm",
    "convert",
    "convert_switchable",
]

# ---------------------------------------------------------------------------------------------
# Two operators. Beside tensors they take `over`, the statistics' names joined by commas ("rows"
# and "rms" are those of LayerNorm and RMSNorm); `number`, how many groups "gn" has, or how many
# axes a row; eps; whether instances have sample variances; and the name of the process group
# that shares the statistics, or "".
# ---------------------------------------------------------------------------------------------

ROWS = ("rows", "rms")


def _array(tensor: Tensor) -> Array:
    """Return a tensor's memory as an array."""
    return _checks.float_array(tensor.numpy(force=True), "x")


def _optional(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else _array(tensor)


def _empty_like(x: Tensor, over: str) -> Tensor:
    # Rows are made contiguous, as PyTorch does; channels stay where they are in memory.
    rows = over in ROWS
    return torch.empty_like(
        x, memory_format=torch.contiguous_format if rows else torch.preserve_format
    )


def _geometry(x: Array, over: str, number: int, sample_variance: bool) -> Geometry:
    if over in ROWS:
        return functional.trailing_geometry(x, x.shape[x.ndim - number :])
    return functional.channel_geometry(x, 1, tuple(over.split(",")), number, sample_variance)


def _sizes(x: Tensor, over: str, number: int) -> list[int]:
    """Return how many groups each statistic of x has."""
    if over in ROWS:
        return [math.prod(x.shape[: x.dim() - number])]
    n, c = x.shape[:2]
    sizes = {"in": n * c, "ln": n, "bn": c, "gn": n * number}
    return [sizes[name] for name in over.split(",")]


def _has_instances(x: Tensor, sample_variance: bool) -> bool:
    return sample_variance and math.prod(x.shape[2:]) > 1


@np.errstate(all="ignore")
def _pack(statistics: Iterable[Statistic], ddof: int) -> Tensor:
    """Return mean, variance for running statistics, variance and count of all groups, (4, S)."""
    packed = []
    for _, n, mean, var in statistics:
        count = np.zeros(mean.shape) if n is None else n
        unbiased = var * (count / np.maximum(count - ddof, 1))
        packed.append(np.stack([mean, unbiased, var, count]).reshape(4, -1))
    return torch.from_numpy(np.concatenate(packed, axis=1))


def _unpack(statistics: Tensor, geometry: Geometry, live: bool) -> list[Statistic]:
    """Return statistics as they were packed; the last one may be the instances'."""
    rows, first, unpacked = statistics.numpy(force=True), 0, []
    for k, axes in enumerate((*geometry.reductions, geometry.inner(True))):
        shape = [1 if axis in axes else n for axis, n in enumerate(geometry.shape)]
        if not live and k == geometry.tracked and 0 not in axes:
            shape[0] = 1
        after = first + math.prod(shape)
        mean, _, var, n = (row.reshape(shape) for row in rows[:, first:after])
        count = n.astype(np.int64) if live or k != geometry.tracked else None
        unpacked.append(Statistic(axes, count, mean, var))
        first = after
        if first == rows.shape[1]:
            break
    return unpacked


@torch.library.custom_op("numbanorm::normalize", mutates_args=(), device_types="cpu")
def _normalize_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    over: str,
    number: int,
    eps: float,
    sample_variance: bool,
    process_group: str,
) -> tuple[Tensor, Tensor]:
    """Return y and the statistics; running ones, where given, take the place of the batch's."""
    y = _empty_like(x, over)
    array, mixture = _array(x), None
    if mean_weight is not None and var_weight is not None:
        logits = _array(mean_weight), _array(var_weight)
        mixture = functional.mix(*logits, mean_weight.numel())
    fixed: tuple[Array, Array] | None = None
    if running_mean is not None and running_var is not None:
        fixed = _array(running_mean), _array(running_var)
    with _threads.thread_count(torch.get_num_threads()):
        shared = []
        if process_group:
            shared = [_shared_statistic(array, process_group)]
            fixed = shared[0].mean, shared[0].var
        _, saved = normalize(
            array,
            _geometry(array, over, number, sample_variance),
            _optional(weight),
            _optional(bias),
            eps,
            fixed=fixed,
            mixture=mixture,
            center=over != "rms",
            sample_variance=sample_variance,
            out=y.numpy(),
        )
    found = shared or saved.statistics
    if _has_instances(x, sample_variance):
        own = saved.instances or Moments.empty((*x.shape[:2], *[1] * (x.dim() - 2)))
        count = np.broadcast_to(own.count, own.mean.shape)
        found = [*found, Statistic((), count, own.mean, own.var())]
    return y, _pack(found, ddof=0 if sample_variance else 1)


@_normalize_op.register_fake
def _(
    x: Tensor, weight: Any, bias: Any, mean_weight: Any, var_weight: Any, mean: Any, var: Any,
    over: str, number: int, eps: float, sample_variance: bool, process_group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n_groups = sum(_sizes(x, over, number))
    if _has_instances(x, sample_variance):
        n_groups += x.shape[0] * x.shape[1]
    return _empty_like(x, over), x.new_empty((4, n_groups), dtype=torch.float64)


@torch.library.custom_op("numbanorm::normalize_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    statistics: Tensor,
    has_bias: bool,
    live: bool,
    over: str,
    number: int,
    eps: float,
    sample_variance: bool,
    process_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and logits, empty where there are none.

    ``live`` says that no statistic was a running one.
    """
    dx = _empty_like(x, over)
    array = _array(x)
    geometry = _geometry(array, over, number, sample_variance)
    unpacked = _unpack(statistics, geometry, live)
    instances, mixture = None, None
    if _has_instances(x, sample_variance):
        _, n, mean, var = unpacked.pop()
        assert n is not None
        instances = Moments(n, mean, var * n)
    if mean_weight is not None and var_weight is not None:
        logits = _array(mean_weight), _array(var_weight)
        mixture = functional.mix(*logits, mean_weight.numel())
    saved = restore(
        array,
        dx.numpy(),
        geometry,
        _optional(weight),
        has_bias,
        eps,
        unpacked,
        mixture=mixture,
        center=over != "rms",
        sample_variance=sample_variance,
        instances=instances,
        share=_sum_over(process_group) if process_group else None,
    )
    with _threads.thread_count(torch.get_num_threads()):
        _, *gradients = backward(_array(dy), saved, dx.numpy())
    wanted = weight is not None, has_bias, mixture is not None, mixture is not None
    return dx, *(
        torch.as_tensor(gradient, dtype=x.dtype) if wanted else x.new_empty(0)
        for gradient, wanted in zip(gradients, wanted, strict=True)
    )


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean_weight: Tensor | None, var_weight: Any,
    statistics: Tensor, has_bias: bool, live: bool,
    over: str, number: int, eps: float, sample_variance: bool, process_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = x.shape[x.dim() - number :] if over in ROWS else x.shape[1:2]
    dweight = x.new_empty(0 if weight is None else shape)
    dbias = x.new_empty(shape if has_bias else 0)
    n_logits = 0 if mean_weight is None else mean_weight.shape[0]
    return _empty_like(x, over), dweight, dbias, x.new_empty(n_logits), x.new_empty(n_logits)


# -- Statistics of several processes -------------------------------------------------------------


def _process_group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)


def _shared_statistic(x: Array, process_group: str) -> Statistic:
    """Return BatchNorm's statistic of all processes' x; each may have another number of samples."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    own = numbanorm.moments(x, axes)
    group = _process_group(process_group)
    packed = torch.from_numpy(np.concatenate([[own.count], own.mean, own.m2]))
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    rows = (tensor.numpy() for tensor in gathered)
    moments = Moments.merge(Moments(int(row[0]), *row[1:].reshape(2, -1)) for row in rows)
    if np.max(moments.count) < 2:
        raise ValueError(
            f"x: more than one value per channel is needed in training, got shape {x.shape} and "
            f"no more in any other process"
        )
    grid = [1, -1, *[1] * (x.ndim - 2)]
    mean, var = moments.mean.reshape(grid), moments.var().reshape(grid)
    return Statistic(axes, np.full(mean.shape, moments.count), mean, var)


def _sum_over(process_group: str) -> Callable[[Array], object]:
    group = _process_group(process_group)
    return lambda sums: dist.all_reduce(torch.from_numpy(sums), group=group)


# -- Derivatives ---------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, mean_weight, var_weight, running_mean, _, *method = inputs
    ctx.save_for_backward(x, weight, mean_weight, var_weight, output[1])
    ctx.rest = bias is not None, running_mean is None, *method
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    gradients = _normalize_backward(dy, *ctx.saved_tensors, *ctx.rest)
    return *(g if g.numel() else None for g in gradients), *[None] * 7


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, mean_weight, var_weight, statistics, *rest = inputs
    ctx.save_for_backward(dy, x, weight, mean_weight, var_weight, statistics)
    ctx.rest = rest


def _differentiate_again(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Return the derivative of the definition's gradient, by PyTorch."""
    dy, x, weight, mean_weight, var_weight, statistics = ctx.saved_tensors
    has_bias, live, over, number, *method, process_group = ctx.rest
    if process_group:
        raise NotImplementedError("SyncBatchNorm has no second derivative")
    shape = x.shape[x.dim() - number :] if over in ROWS else x.shape[1:2]
    bias = x.new_zeros(shape) if has_bias else None
    fixed = None, None
    if not live:
        sizes, names = _sizes(x, over, number), over.split(",")
        first = sum(sizes[: names.index("bn")]) if "bn" in names else 0
        fixed = statistics[[0, 2], first : first + x.shape[1]].to(x.dtype)
    given = x, weight, bias, mean_weight, var_weight
    present = [k for k, tensor in enumerate(given) if tensor is not None]

    def y(*tensors: Tensor) -> Tensor:
        arguments: list[Any] = [None] * 5
        for k, tensor in zip(present, tensors, strict=True):
            arguments[k] = tensor
        return _definition(*arguments, *fixed, over, number, *method)[0]

    def gradient(dy: Tensor, *tensors: Tensor) -> Any:
        return torch.func.vjp(y, *tensors)[1](dy)

    _, pull = torch.func.vjp(gradient, dy, *(given[k] for k in present))
    d_dy, *derivatives = pull(tuple(gradients[k] for k in present))
    found: list[Tensor | None] = [None] * 5
    for k, derivative in zip(present, derivatives, strict=True):
        found[k] = derivative
    del found[2]  # nothing depends on the bias
    return d_dy, *found, *[None] * 8


def _differentiable(
    op: Any, save: Callable[..., None], differentiate: Callable[..., tuple[Tensor | None, ...]]
) -> Callable[..., Any]:
    """Register the derivative of an operator; return what calls it."""
    op.register_autograd(differentiate, setup_context=save)

    def one_by_one(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def take(i: int) -> Iterable[Any]:
            for arg, dim in zip(args, in_dims, strict=True):
                yield arg if dim is None else arg.select(dim, i)

        results = [op(*take(i)) for i in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    torch.library.register_vmap(op, one_by_one)

    # torch.func cannot differentiate operators, only such functions, and they are faster. What
    # is compiled or exported keeps the operator, which knows its derivative.
    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(lambda *args: op(*args))
        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)

    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else Function.apply(*args)

    return call


_normalize_backward = _differentiable(_backward_op, _save_for_second, _differentiate_again)
_normalize = _differentiable(_normalize_op, _save, _differentiate)


def _definition(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    over: str,
    number: int,
    eps: float,
    sample_variance: bool,
) -> tuple[Tensor, Tensor]:
    """Return what the operator does, in PyTorch, for any device and type."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if over in ROWS:
        length = math.prod(x.shape[x.dim() - number :])
        split, feature_grid = wide.reshape(-1, 1, 1, length), [1, 1, 1, -1]
    else:
        length = math.prod(x.shape[2:])
        split = wide.reshape(x.shape[0], number, x.shape[1] // number, length)
        feature_grid = [1, number, -1, 1]
    own_mean = split.mean(-1, keepdim=True)
    own_var = split.var(-1, correction=0, keepdim=True)
    ddof = int(sample_variance)
    if sample_variance and length > 1:
        own_var, ddof = own_var * (length / (length - 1)), 0
    if over == "rms":
        own_mean, own_var = torch.zeros_like(own_mean), own_var + own_mean**2
    names, axes = over.split(","), {"ln": (1, 2), "bn": (0,), "gn": (2,)}
    p, q = (
        [1.0] if logits is None else torch.softmax(logits.to(wide.dtype), 0)
        for logits in (mean_weight, var_weight)
    )
    mean, var, packed = torch.zeros(()).to(wide), torch.zeros(()).to(wide), []
    for k, name in enumerate(names):
        mean_k, var_k = own_mean, own_var
        live = running_mean is None or name in ("in", "ln", "gn")[: 3 * (len(names) > 1)]
        if not live:
            mean_k, var_k = (r.reshape(feature_grid) for r in (running_mean, running_var))
        elif name in axes:
            # The mean of the instances' variances, and the variance of their means.
            mean_k = own_mean.mean(axes[name], keepdim=True)
            var_k = (own_var + (own_mean - mean_k) ** 2).mean(axes[name], keepdim=True)
        n = split.numel() // max(mean_k.numel(), 1)
        if live and ddof:
            var_k = var_k * (n / max(n - ddof, 1))
        mean, var = mean + p[k] * mean_k, var + q[k] * var_k
        unbiased = var_k if sample_variance else var_k * (n / max(n - 1, 1))
        count = torch.full_like(mean_k, n)
        packed.append(torch.stack([mean_k, unbiased, var_k, count]).reshape(4, -1))
    y = (split - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight.reshape(feature_grid)
    if bias is not None:
        y = y + bias.reshape(feature_grid)
    return y.reshape(x.shape).to(x.dtype), torch.cat(packed, 1)


# ---------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------


def _takes(*tensors: Tensor | None) -> bool:
    """Tell whether numbanorm can do it: float32 or float64 on the CPU, one type for all."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        given[0].dtype in (torch.float32, torch.float64)
        and all(
            t.device.type == "cpu" and t.dtype == given[0].dtype and t.layout == torch.strided
            for t in given
        )
        # Forward-mode derivatives are on.
        and forward_ad._current_level < 0
    )


class _Tracking(nn.Module):
    """Running statistics, and what :func:`numbanorm.recalibrate` asks of a layer."""

    _pool: Pool | None = None

    @property
    def tracks(self) -> bool:
        """Whether the layer has running statistics."""
        return self.running_mean is not None

    def begin_pooling(self, pool: Pool) -> bool:
        """Go to training mode and collect statistics; return the mode of before."""
        before: bool = self.training
        self._pool, self.training = pool, True
        return before

    def end_pooling(self, state: bool) -> None:
        """Go back to the mode of before."""
        del self._pool
        self.training = state

    def adopt_pool(self, pool: Pool) -> None:
        """Take the pooled statistics as running statistics."""
        mean, var, known = pool.statistics()
        for running, values, empty in (self.running_mean, mean, 0), (self.running_var, var, 1):
            running.copy_(torch.from_numpy(np.where(known, values, empty)))
        self.num_batches_tracked.fill_(pool.n_forwards)

    @torch.no_grad()
    def _track(self, statistics: Tensor, samples: int = 1) -> None:
        """Move running statistics towards a batch's, or towards the average of its samples'."""
        if self._pool is not None:
            rows = statistics.numpy(force=True).reshape(4, -1, self.num_features)
            mean, _, var, n = rows if samples > 1 else rows[:, 0]
    """placeholder"""
