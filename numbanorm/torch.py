"""The same layers for PyTorch on the CPU: ``model = numbanorm.torch.convert(model)``.

Each layer is a subclass of PyTorch's of the same name with a ``forward`` of its own, so that
state dicts, checkpoints, hooks and ``isinstance`` are as before. All of them call one operator,
``numbanorm::normalize``, whose derivative is another, ``numbanorm::normalize_backward``. Tensors
are seen as arrays, without a copy and in their own order in memory (``channels_last``). The
gradient of x is written over that of y where nobody else has it, by hook, name or memory. The
memory of outputs is kept for other outputs when nobody has it any more.

Numba's threads are then those of PyTorch, where it brings GNU OpenMP with it.

Other devices and types, forward-mode and second derivatives are left to PyTorch's own code.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
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
from numbanorm import functional
from numbanorm.core import checks as _checks
from numbanorm.core.geometry import Geometry
from numbanorm.core.memory import Memory, Recycler
from numbanorm.core.normalize import Instances, Saved, Statistic, differentiate, normalize, restore
from numbanorm.core.running import track
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.moments import Moments
from numbanorm.numba_ext import threads as _threads
from numbanorm.recalibrate import Pool
from numbanorm.tuning import tuning

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

# PyTorch for Linux brings GNU OpenMP with it, which Numba's OpenMP layer finds as well: the threads
# that wait for PyTorch's next operation, and keep the cores busy with it, are those that run ours.
if any(Path(torch.__file__).parent.glob("lib/libgomp*")):
    _threads.prefer_openmp()

# ---------------------------------------------------------------------------------------------
# Two operators. Beside tensors they take `over`, the statistics' names joined by commas ("rows"
# and "rms" are those of LayerNorm and RMSNorm); `number`, how many groups "gn" has, or how many
# axes a row; eps; whether instances have sample variances; and the name of the process group
# that shares the statistics, or "".
# ---------------------------------------------------------------------------------------------

ROWS = ("rows", "rms")


def _array(tensor: Tensor) -> Array:
    """Return a tensor's memory as an array."""
    array: Array = tensor.data.numpy()
    return array


def _optional(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else _array(tensor)


def _mixture(mean_weight: Tensor | None, var_weight: Tensor | None) -> Float64 | None:
    if mean_weight is None or var_weight is None:
        return None
    return functional.mix(_array(mean_weight), _array(var_weight), mean_weight.numel())


def _empty_like(x: Tensor, over: str) -> Tensor:
    # Rows are made contiguous, as PyTorch does; channels stay where they are in memory.
    form = torch.contiguous_format if over in ROWS else torch.preserve_format
    return torch.empty_like(x, memory_format=form)


def _feature_shape(x: Tensor, over: str, number: int) -> torch.Size:
    return x.shape[x.dim() - number :] if over in ROWS else x.shape[1:2]


def _sizes(x: Tensor, over: str, number: int) -> list[int]:
    """Return how many groups each statistic of x has."""
    if over in ROWS:
        return [math.prod(x.shape[: x.dim() - number])]
    n, c = x.shape[:2]
    sizes = {"in": n * c, "ln": n, "bn": c, "gn": n * number}
    return [sizes[name] for name in over.split(",")]


def _tracked(over: str) -> int:
    """Return which of the statistics has running averages."""
    names = over.split(",")
    return names.index("bn") if "bn" in names else 0


def _batch(statistics: Tensor, x: Tensor, over: str, number: int) -> Tensor:
    """Return the packed statistic that has running averages."""
    sizes, k = _sizes(x, over, number), _tracked(over)
    return statistics.narrow(1, sum(sizes[:k]), sizes[k])


def _has_instances(x: Tensor, sample_variance: bool) -> bool:
    """Tell whether the instances' own statistics are packed with the others."""
    return sample_variance and math.prod(x.shape[2:]) > 1


@functools.lru_cache(maxsize=4096)
def _geometry(shape: Axes, over: str, number: int, sample_variance: bool) -> Geometry:
    x = np.broadcast_to(0.0, shape)
    if over in ROWS:
        return functional.trailing_geometry(x, shape[len(shape) - number :])
    return functional.channel_geometry(x, 1, tuple(over.split(",")), number, sample_variance)


@np.errstate(all="ignore")
def _pack(saved: Saved, shared: Statistic | None = None) -> Tensor:
    """Return mean, variance for running statistics, variance and count of all groups, (4, S)."""
    statistics = saved.statistics if shared is None else [shared]
    if saved.sample_variance and math.prod(saved.shape[2:]) > 1:
        nothing = np.zeros((*saved.shape[:2], 1))
        own = saved.instances or Instances(nothing.astype(np.int64), nothing, nothing)
        var = own.m2 / np.maximum(own.n, 1)
        statistics = [*statistics, Statistic((), own.n, own.mean, var)]
    first, packed = 0, np.empty((4, sum(statistic.mean.size for statistic in statistics)))
    for _, n, mean, var in statistics:
        count: Any = np.zeros(1) if n is None else n
        unbiased = var * (count / np.maximum(count - (0 if saved.sample_variance else 1), 1))
        last = first + mean.size
        for row, values in zip(packed, (mean, unbiased, var, count), strict=True):
            row[first:last] = values.ravel()
        first = last
    return torch.from_numpy(packed)


def _unpack(statistics: Tensor, geometry: Geometry, axes: Iterable[Axes]) -> list[Statistic]:
    """Return the statistics over these axes again."""
    rows, first, unpacked = statistics.numpy(force=True), 0, []
    for reduced in axes:
        shape = [1 if axis in reduced else n for axis, n in enumerate(geometry.shape)]
        last = first + math.prod(shape)
        mean, _, var, n = rows[:, first:last].reshape(4, *shape)
        unpacked.append(Statistic(reduced, n.astype(np.int64), mean, var))
        first = last
    return unpacked


def _forward(
    empty_like: Callable[[Tensor, str], Tensor],
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
) -> tuple[Tensor, Saved, Statistic | None]:
    """Return y, what backward needs beside x, and the statistic that processes share."""
    y = empty_like(x, over)
    array = _array(x)
    fixed, shared = None, None
    if running_mean is not None and running_var is not None:
        fixed = _array(running_mean), _array(running_var)
    with _threads.thread_count(torch.get_num_threads()):
        if process_group:
            shared = _shared_statistic(array, process_group)
            fixed = shared.mean, shared.var
        saved = normalize(
            array,
            y.numpy(),
            _geometry(array.shape, over, number, sample_variance),
            _optional(weight),
            _optional(bias),
            eps,
            fixed=fixed,
            mixture=_mixture(mean_weight, var_weight),
            center=over != "rms",
            sample_variance=sample_variance,
        )
    del saved.x  # autograd keeps it, and knows when not to
    return y, saved, shared


def _backward(
    dx: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    found: Tensor | Saved,
    has_bias: bool,
    live: bool,
    over: str,
    number: int,
    eps: float,
    sample_variance: bool,
    process_group: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, bias and logits, from the statistics or what was saved.

    That of x is written to ``dx``, which may be ``dy``.
    """
    array = _array(x)
    if isinstance(found, Saved):
        saved = found
        saved.x = saved.plan.to_view(array)
    else:
        geometry = _geometry(array.shape, over, number, sample_variance)
        axes, instances = geometry.reductions, None
        if _has_instances(x, sample_variance):
            *unpacked, own = _unpack(found, geometry, (*axes, geometry.inner(True)))
            assert own.n is not None
            instances = Instances(own.n, own.mean, own.var * own.n)
        else:
            unpacked = _unpack(found, geometry, axes)
        if not live:
            unpacked[geometry.tracked] = unpacked[geometry.tracked]._replace(n=None)
        saved = restore(
            array,
            dx.numpy(),
            geometry,
            _optional(weight),
            has_bias,
            eps,
            unpacked,
            mixture=_mixture(mean_weight, var_weight),
            center=over != "rms",
            sample_variance=sample_variance,
            instances=instances,
            share=_sum_over(process_group) if process_group else None,
        )
    with _threads.thread_count(torch.get_num_threads()):
        gradients = differentiate(_array(dy), saved, dx.numpy(), dx is dy)
    del saved.x
    there = weight is not None, has_bias, mean_weight is not None, var_weight is not None
    dweight, dbias, dmean_weight, dvar_weight = (
        torch.from_numpy(gradient.astype(array.dtype))
        if is_there and gradient is not None
        else None
        for gradient, is_there in zip(gradients, there, strict=True)
    )
    return dx, dweight, dbias, dmean_weight, dvar_weight


@torch.library.custom_op("numbanorm::normalize", mutates_args=(), device_types="cpu")
def _normalize_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    mean_weight: Tensor | None, var_weight: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None,
    over: str, number: int, eps: float, sample_variance: bool, process_group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and the statistics; running ones, where given, take the place of "bn"."""
    y, saved, shared = _forward(
        _empty_like, x, weight, bias, mean_weight, var_weight, running_mean, running_var,
        over, number, eps, sample_variance, process_group,
    )  # fmt: skip
    return y, _pack(saved, shared)


@_normalize_op.register_fake
def _(
    x: Tensor, weight: Any, bias: Any, mean_weight: Any, var_weight: Any, mean: Any, var: Any,
    over: str, number: int, eps: float, sample_variance: bool, process_group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    groups = sum(_sizes(x, over, number))
    if _has_instances(x, sample_variance):
        groups += x.shape[0] * x.shape[1]
    return _empty_like(x, over), x.new_empty((4, groups), dtype=torch.float64)


@torch.library.custom_op("numbanorm::normalize_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean_weight: Tensor | None,
    var_weight: Tensor | None, statistics: Tensor, has_bias: bool, live: bool,
    over: str, number: int, eps: float, sample_variance: bool, process_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight, bias and logits; those that are not there are empty.

    ``live`` says that no running statistics were given.
    """
    dx, *others = _backward(
        _empty_like(x, over), dy, x, weight, mean_weight, var_weight, statistics, has_bias, live,
        over, number, eps, sample_variance, process_group,
    )  # fmt: skip
    return dx, *(x.new_empty(0) if gradient is None else gradient for gradient in others)


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Any, mean_weight: Tensor | None, var_weight: Any,
    statistics: Tensor, has_bias: bool, live: bool,
    over: str, number: int, eps: float, sample_variance: bool, process_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _feature_shape(x, over, number)
    dweight = x.new_empty(0 if weight is None else shape)
    dbias = x.new_empty(shape if has_bias else 0)
    logits = 0 if mean_weight is None else mean_weight.shape[0]
    return _empty_like(x, over), dweight, dbias, x.new_empty(logits), x.new_empty(logits)


# -- Statistics of several processes -------------------------------------------------------------


def _shared_statistic(x: Array, process_group: str) -> Statistic:
    """Return BatchNorm's statistic of all processes' x, which may differ in size."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    own = numbanorm.moments(x, axes)
    count = np.full(own.mean.shape, own.count)
    packed = torch.from_numpy(np.stack([count, own.mean, own._rest, own.m2]))
    group = _process_group(process_group)
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    arrays = (tensor.numpy() for tensor in gathered)
    moments = Moments.merge(Moments._of(n.astype(np.int64), *rest) for n, *rest in arrays)
    n = np.asarray(moments.count)
    if n.max() < 2:
        raise ValueError(
            f"x: more than one value per channel is needed in training, got shape {x.shape}, "
            "and no value in the other processes"
        )
    grid = [1, -1, *[1] * (x.ndim - 2)]
    mean, var = moments.mean.reshape(grid), moments.var().reshape(grid)
    return Statistic(axes, n.reshape(grid), mean, var)


def _sum_over(process_group: str) -> Callable[[Array], object]:
    """Return a function that adds an array up over processes, in place."""
    group = _process_group(process_group)
    return lambda sums: dist.all_reduce(torch.from_numpy(sums), group=group)


def _process_group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)


# -- Derivatives ---------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], *statistics: Tensor) -> None:
    x, weight, bias, mean_weight, var_weight, running_mean, _, *method = inputs
    ctx.save_for_backward(x, weight, mean_weight, var_weight, *statistics)
    ctx.rest = bias is not None, running_mean is None, *method
    ctx.there = [tensor is not None for tensor in inputs[:5]]
    ctx.set_materialize_grads(False)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _keep(ctx, inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(
    ctx: Any, dy: Tensor | None, _: None, *statistics: Tensor
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    gradients = _normalize_backward(dy, *ctx.saved_tensors, *statistics, *ctx.rest)
    return *_where(ctx.there, gradients), *[None] * 7


def _save_again(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, mean_weight, var_weight, statistics, *rest = inputs
    ctx.save_for_backward(dy, x, weight, mean_weight, var_weight, statistics)
    ctx.rest = rest
    logits = mean_weight is not None, var_weight is not None
    ctx.there = [True, weight is not None, rest[0], *logits]


def _differentiate_again(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients of :func:`_definition`."""
    dy, x, weight, mean_weight, var_weight, statistics = ctx.saved_tensors
    _, live, over, number, *method, process_group = ctx.rest
    if process_group:  # the definition knows the samples of this process alone
        raise NotImplementedError("SyncBatchNorm over several processes has no second derivative")
    running: tuple[Any, ...] = None, None
    if not live:
        mean, _, var, _ = _batch(statistics, x, over, number).to(x.dtype)
        running = mean, var
    given = _fill(x, weight, None, mean_weight, var_weight, over, number)
    rest: tuple[Any, ...] = *running, over, number, *method

    def y(*given: Tensor) -> Tensor:
        return _definition(*given, *rest)[0]

    def gradient(dy: Tensor, *given: Tensor) -> Any:
        return torch.func.vjp(y, *given)[1](dy)

    cotangents = (
        g if is_there else torch.zeros_like(t)
        for is_there, g, t in zip(ctx.there, gradients, given, strict=True)
    )
    d_dy, *derivatives = torch.func.vjp(gradient, dy, *given)[1](tuple(cotangents))
    d_x, d_weight, _, *d_logits = _where(ctx.there, derivatives)
    return d_dy, d_x, d_weight, *d_logits, *[None] * 8


def _where(there: list[bool], gradients: Iterable[Tensor]) -> Iterable[Any]:
    """Return the gradients of x, weight, bias and logits, None for those that are not there."""
    return (g if is_there else None for is_there, g in zip(there, gradients, strict=True))


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
        in_transform = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
        return Function.apply(*args) if in_transform else op(*args)

    return call


_normalize_backward = _differentiable(_backward_op, _save_again, _differentiate_again)
_normalize_anyhow = _differentiable(_normalize_op, _save, _differentiate)


def _holders(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Return how many have a memory: in PyTorch, and in Python."""
    n_tensors: int = torch._C._storage_Use_Count(storage._cdata)
    return n_tensors, sys.getrefcount(storage)


class _Memory(Memory):
    """A tensor that nobody sees, and its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.storage, self.n_bytes = tensor, tensor.untyped_storage(), tensor.nbytes
        self.address, self.kind = tensor.data_ptr(), tensor.dtype
        self.alone = _holders(self.storage)

    def is_lost(self) -> bool:
        """Tell whether the memory has gone elsewhere, as when processes come to share it."""
        return bool(self.tensor.data_ptr() != self.address)

    def is_free(self) -> bool:
        """Tell whether nobody else has the memory."""
        return _holders(self.storage) == self.alone and not self.is_lost()

    def lend(self, shape: Axes, strides: Axes) -> Tensor | None:
        """Return a tensor with the memory, or None if another thread was faster."""
        tensor = self.tensor.as_strided(shape, strides).data  # no view, with a version of its own
        n_tensors, n_storages = _holders(self.storage)
        return tensor if (n_tensors - 1, n_storages) == self.alone else None


class _Outputs(Recycler[_Memory]):
    def empty_like(self, x: Tensor, over: str) -> Tensor:
        """Return a tensor for y, in the smallest memory that is free and will do."""
        n_bytes, can_count = x.nbytes, hasattr(torch._C, "_storage_Use_Count")
        if n_bytes < tuning().recycle_tensors_from or not can_count or not _same_form(x, x, over):
            return _empty_like(x, over)
        found = self.find(n_bytes, x.dtype)
        y = None if found is None else found.lend(x.shape, x.stride())
        if found is None or y is None:
            with torch.inference_mode(False):  # what is made in that mode is of no use outside it
                new = _Memory(_empty_like(x, over))
                y = new.tensor.data
            self.keep(new)
            return y
        self.use(found)
        return y


_outputs = _Outputs()


class _Normalize(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which takes as long as a small layer.

    What the operator packs into a tensor stays as it is, unless a second derivative wants it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Saved]:
        y, ctx.saved, _ = _forward(_outputs.empty_like, *inputs)
        _keep(ctx, inputs)
        return y, ctx.saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None or torch.is_grad_enabled() or not _is_eager(dy):
            return _differentiate(ctx, dy, None, _pack(ctx.saved))
        x, *parameters = ctx.saved_tensors
        _, _, over, *_ = ctx.rest
        # Memory of its own would be read before it is written, and its pages may be fresh.
        nobody_else = _nobody_else()
        free = nobody_else is not None and _owners(dy) == nobody_else and _same_form(dy, x, over)
        dx = dy if free else _empty_like(x, over)
        kept: tuple[Any, ...] = *parameters, ctx.saved, *ctx.rest
        return *_backward(dx, dy, x, *kept), *[None] * 7


# Without what Function.apply does first, for the wrappers of transforms: that takes as long as a
# small layer.
_apply = super(torch.autograd.Function, _Normalize).apply


def _owners(gradient: Tensor) -> tuple[int, int, int, int, bool]:
    """Return how many have a tensor, and its memory, and whether PyTorch made that.

    PyTorch adds up gradients in place by the same rule: if nobody else has one.
    """
    storage = gradient.untyped_storage()
    of_tensor = sys.getrefcount(gradient), gradient._use_count()
    return *of_tensor, *_holders(storage), storage.resizable()


@functools.cache
def _nobody_else() -> tuple[int, int, int, int, bool] | None:
    """Return what _owners tells a backward of a gradient that nobody else has, if it can tell.

    Not found out before there is a backward: where there are other devices, a process that has
    started autograd's threads cannot use autograd in a fork of it.
    """
    if not (hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")):
        return None
    found = []

    class Function(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: (x + 1, None))

        @staticmethod
        def backward(ctx: Any, dy: Tensor, _: None) -> Tensor:
            found.append(_owners(dy))
            return dy

    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, device="cpu", requires_grad=True)
        torch.autograd.grad(Function.apply(x)[0] * 2, x)
    return found[0]


# How tensors of so many axes may be in memory without gaps.
FORMS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _same_form(dy: Tensor, x: Tensor, over: str) -> bool:
    """Tell whether dy is in memory as dx is to be, without gaps."""
    # Asking memory_order() would make a small backward 4 % longer.
    if dy.is_contiguous():
        return over in ROWS or x.is_contiguous()
    form = None if over in ROWS else FORMS.get(x.dim())
    return form is not None and all(t.is_contiguous(memory_format=form) for t in (dy, x))


def _is_eager(x: Tensor) -> bool:
    """Tell whether x has data, and nothing but autograd watches what is done with it."""
    return type(x) in (Tensor, nn.Parameter) and not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(x)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _normalize(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | Saved]:
    """Return y and the statistics, which are what was saved where nothing else needs a tensor."""
    *_, process_group = rest
    if process_group or not _is_eager(x):
        y, found = _normalize_anyhow(x, *rest)
    elif torch.is_grad_enabled():
        y, found = _apply(x, *rest)
    else:
        y, found, _ = _forward(_outputs.empty_like, x, *rest)
    return y, found


# -- The definition ------------------------------------------------------------------------------


def _fill(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_weight: Tensor | None,
    var_weight: Tensor | None,
    over: str,
    number: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x and all parameters, with those that say nothing for None."""
    shape = _feature_shape(x, over, number)
    return (
        x,
        x.new_ones(shape) if weight is None else weight,
        x.new_zeros(shape) if bias is None else bias,
        x.new_zeros(1) if mean_weight is None else mean_weight,
        x.new_zeros(1) if var_weight is None else var_weight,
    )


def _definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    over: str,
    number: int,
    eps: float,
    sample_variance: bool,
) -> tuple[Tensor, Tensor]:
    """Do what the operator does, in PyTorch, for any device and type."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if over in ROWS:
        length = math.prod(_feature_shape(x, over, number))
        split, feature_grid = wide.reshape(-1, 1, 1, length), [1, 1, 1, -1]
    else:
        length = math.prod(x.shape[2:])
        split = wide.reshape(x.shape[0], number, x.shape[1] // number, length)
        feature_grid = [1, *split.shape[1:3], 1]
    own_mean = split.mean(-1, keepdim=True)
    own_var = split.var(-1, correction=0, keepdim=True)
    of_instances = sample_variance and length > 1
    if of_instances:
        own_var = own_var * (length / (length - 1))
    if over == "rms":
        own_mean, own_var = torch.zeros_like(own_mean), own_var + own_mean**2
    p, q = mean_weight.to(wide.dtype).softmax(0), var_weight.to(wide.dtype).softmax(0)
    mean, var, packed = wide.new_zeros(()), wide.new_zeros(()), []
    for k, name in enumerate(over.split(",")):
        mean_k, var_k, n = own_mean, own_var, length
        axes = {"ln": (1, 2), "bn": (0,), "gn": (2,)}.get(name)
        if running_mean is not None and running_var is not None and k == _tracked(over):
            mean_k, var_k = running_mean.reshape(feature_grid), running_var.reshape(feature_grid)
        elif axes is not None:
            # The mean of the instances' variances, and the variance of their means.
            mean_k = own_mean.mean(axes, keepdim=True)
            var_k = (own_var + (own_mean - mean_k) ** 2).mean(axes, keepdim=True)
            n = split.numel() // max(mean_k.numel(), 1)
            if sample_variance and not of_instances:
                var_k = var_k * (n / max(n - 1, 1))
        mean, var = mean + p[k] * mean_k, var + q[k] * var_k
        unbiased = var_k * (1 if sample_variance else n / max(n - 1, 1))
        rows = mean_k, unbiased, var_k, torch.full_like(mean_k, n)
        packed.append(torch.stack(rows).reshape(4, -1))
    y = (split - mean) * torch.rsqrt(var + eps)
    y = y * weight.reshape(feature_grid) + bias.reshape(feature_grid)
    return y.reshape(x.shape).to(x.dtype), torch.cat(packed, 1)


# ---------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------


def _takes(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether numbanorm can do it: float32 or float64 on the CPU, one type for all."""
    dtype = x.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return False
    for t in (x, *others):
        if t is not None and not (t.is_cpu and t.dtype is dtype and t.layout is torch.strided):
            return False
    # PyTorch is not in a forward-mode derivative.
    return bool(forward_ad._current_level < 0)


class _Layer(nn.Module):
    def __del__(self, outputs: _Outputs = _outputs) -> None:
        # A model that goes takes its memory with it.
        outputs.clear()


class _Tracking(_Layer):
    """Running statistics, and what :func:`numbanorm.recalibrate` asks of a layer."""

    training: bool
    num_features: int
    momentum: float | None
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    sample_variance = False
    _pool: Pool | None = None
    # Whether num_batches_tracked is what its name says.
    _counts = True

    @property
    def tracks(self) -> bool:
        """Whether the layer has running statistics."""
        return self.running_mean is not None

    def begin_pooling(self, pool: Pool) -> bool:
        """Go to training mode and collect statistics; return the mode of before."""
        before = self.training
        self._pool, self.training = pool, True
        return before

    def end_pooling(self, state: bool) -> None:
        """Go back to the mode of before."""
        del self._pool
        self.training = state

    @torch.no_grad()
    def adopt_pool(self, pool: Pool) -> None:
        """Take the pooled statistics as running statistics."""
        mean, var, known = pool.statistics()
        self.running_mean.copy_(torch.from_numpy(np.where(known, mean, 0)))
        self.running_var.copy_(torch.from_numpy(np.where(known, var, 1)))
        self.num_batches_tracked.fill_(pool.n_forwards)

    def _momentum(self, n_before: Any) -> Any:
        """Return the weight of a new value after so many."""
        return 1 / (n_before + 1) if self.momentum is None else self.momentum

    def _track(self, statistics: Tensor | Saved, samples: int | None = None) -> None:
        """Move the running statistics towards those of a batch, or the mean of its samples'.

        ``statistics`` are what was saved, or (4, C), or (4, samples * C).
        """
        if isinstance(statistics, Saved):
            if self._pool is not None:
                self._pool.add(statistics)
                return
            buffers = self.running_mean, self.running_var, self.num_batches_tracked
            mean, var, n_batches = map(_array, buffers)
            momentum = float(self._momentum(n_batches))
            if not self._counts:
                n_batches = n_batches.copy()
            track(statistics, mean, var, n_batches, momentum)
            torch.autograd.graph.increment_version(buffers)
            return
        if self._pool is not None:
            shape = (4, *([] if samples is None else [samples]), self.num_features)
            mean, _, var, n = statistics.numpy(force=True).reshape(shape)
            batch = Statistic((0,) if samples is None else (), n.astype(np.int64), mean, var)
            ddof = 0 if self.sample_variance else 1
            self._pool.add_statistic(batch, (self.num_features,), ddof)
            return
        momentum = self._momentum(self.num_batches_tracked.to(self.running_mean.dtype))
        if self._counts:
            self.num_batches_tracked.add_(1)
        moved = statistics[:2].detach()
        if samples is not None:
            moved = moved.reshape(2, samples, -1).mean(1)
        mean, var = moved.to(self.running_mean.dtype)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)

    def _not_pooling(self) -> None:
        if self._pool is not None:
            raise TypeError(
                "recalibrate: x and the layer need to be float32 or float64 on the CPU, "
                f"and x of a shape that {self} trains with"
            )


class _BatchNorm(_Tracking, _TorchBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        live = self.training or self.running_mean is None
        group = self._group_name() if self.training else ""
        running = (None, None) if live else (self.running_mean, self.running_var)
        values = input.numel() // max(self.num_features, 1)
        # What is wrong here PyTorch says in its own words.
        if (
            not _takes(input, self.weight, self.bias, self.running_mean, self.running_var)
            or input.shape[1] != self.num_features
            or (values < (2 if live else 1) and not group)
        ):
            self._not_pooling()
            return super().forward(input)
        y, statistics = _normalize(
            input, self.weight, self.bias, None, None, *running, "bn", 1, self.eps, False, group
        )
        if self.training and self.track_running_stats and self.tracks:
            self._track(statistics)
        return y

    def _group_name(self) -> str:
        """Return the name of the process group that shares the statistics, or ""."""
        return ""


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> numbanorm.torch.BatchNorm1d(1, eps=0.0, affine=False)(torch.tensor([[1.0], [3.0]]))
    tensor([[-1.],
            [ 1.]])
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.BatchNorm2d(3)
    >>> layer(torch.rand(8, 3, 4, 4)).shape, isinstance(layer, torch.nn.BatchNorm2d)
    (torch.Size([8, 3, 4, 4]), True)
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.BatchNorm3d(3)
    >>> layer(torch.rand(8, 3, 2, 4, 4)).shape, isinstance(layer, torch.nn.BatchNorm3d)
    (torch.Size([8, 3, 2, 4, 4]), True)
    """


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm` on CPUs, over ``torch.distributed`` with gloo.

    Statistics and gradients are those of the whole batch, also where processes have different
    numbers of samples. As in PyTorch, the gradients of weight and bias are those of a process's
    own samples. In evaluation, and in a single process, it is a BatchNorm.
    :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` followed by :func:`convert` puts it
    into a model.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.SyncBatchNorm(3)
    >>> layer(torch.rand(8, 3, 4, 4)).shape  # in a single process
    torch.Size([8, 3, 4, 4])
    """

    def _group_name(self) -> str:
        if not (dist.is_available() and dist.is_initialized()):
            return ""
        group = self.process_group or dist.group.WORLD
        return str(group.group_name) if dist.get_world_size(group) > 1 else ""


class _InstanceNorm(_Tracking, _TorchInstanceNorm):
    _counts = False

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        x = input.unsqueeze(0) if input.dim() == self._get_no_batch_dim() else input
        live = self.training or not self.track_running_stats
        running = (None, None) if live else (self.running_mean, self.running_var)
        if (
            not _takes(x, self.weight, self.bias, self.running_mean, self.running_var)
            or x.shape[1] != self.num_features
            or x.numel() < (2 if live else 1) * x.shape[0] * x.shape[1]
            or x.numel() == 0
        ):
            self._not_pooling()
            return super().forward(input)
        # With running statistics a sample has no part in it: that is BatchNorm.
        over = "in" if live else "bn"
        y, statistics = _normalize(
            x, self.weight, self.bias, None, None, *running, over, 1, self.eps, False, ""
        )
        if live and self.tracks:
            self._track(statistics, x.shape[0])
        return y if x is input else y.squeeze(0)

    def _momentum(self, n_before: Any) -> Any:
        # PyTorch has a counter here and leaves it at 0, and None moves nothing.
        return self.momentum or 0.0


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> numbanorm.torch.InstanceNorm1d(1, eps=0.0)(torch.tensor([[[1.0, 3.0]]]))
    tensor([[[-1.,  1.]]])
    """


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.InstanceNorm2d(3)
    >>> layer(torch.rand(8, 3, 4, 4)).shape, isinstance(layer, torch.nn.InstanceNorm2d)
    (torch.Size([8, 3, 4, 4]), True)
    """


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.InstanceNorm3d(3)
    >>> layer(torch.rand(8, 3, 2, 4, 4)).shape, isinstance(layer, torch.nn.InstanceNorm3d)
    (torch.Size([8, 3, 2, 4, 4]), True)
    """


class GroupNorm(_Layer, nn.GroupNorm):
    """:class:`torch.nn.GroupNorm`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> x = torch.tensor([[1.0, 3.0, 10.0, 30.0]])
    >>> numbanorm.torch.GroupNorm(2, 4, eps=0.0, affine=False)(x)
    tensor([[-1.,  1., -1.,  1.]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each sample over groups of channels."""
        if (
            not _takes(input, self.weight, self.bias)
            or input.dim() < 2
            or input.shape[1] != self.num_channels
            or input.numel() <= self.num_groups
        ):
            return super().forward(input)
        method = "gn", self.num_groups, self.eps, False, ""
        y, _ = _normalize(input, self.weight, self.bias, None, None, None, None, *method)
        return y


class LayerNorm(_Layer, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> x = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    >>> numbanorm.torch.LayerNorm(2, eps=0.0, elementwise_affine=False)(x)
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the trailing axes."""
        number = len(self.normalized_shape)
        if (
            not _takes(input, self.weight, self.bias)
            or input.shape[input.dim() - number :] != self.normalized_shape
            or input.numel() == 0
        ):
            return super().forward(input)
        method = "rows", number, self.eps, False, ""
        y, _ = _normalize(input, self.weight, self.bias, None, None, None, None, *method)
        return y


class RMSNorm(_Layer, nn.RMSNorm):
    """:class:`torch.nn.RMSNorm`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> x = torch.tensor([[3.0, 3.0, -3.0]])
    >>> numbanorm.torch.RMSNorm(3, eps=0.0, elementwise_affine=False)(x)
    tensor([[ 1.,  1., -1.]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Divide by the root mean square over the trailing axes."""
        number = len(self.normalized_shape)
        if (
            not _takes(input, self.weight)
            or input.shape[input.dim() - number :] != self.normalized_shape
            or input.numel() == 0
        ):
            return super().forward(input)
        eps = torch.finfo(input.dtype).eps if self.eps is None else self.eps
        method = "rms", number, eps, False, ""
        y, _ = _normalize(input, self.weight, None, None, None, None, None, *method)
        return y


def _parameter(value: Tensor, wanted: bool = True) -> nn.Parameter | None:
    return nn.Parameter(value) if wanted else None


def _check_groups(num_features: int, num_groups: int | None) -> None:
    if num_groups is not None and num_features % num_groups:
        raise ValueError(
            f"num_groups: a divisor of num_features={num_features} is needed, got {num_groups}"
        )


class _SwitchableNorm(_Tracking):
    _ranks: ClassVar[tuple[int, ...]]
    _over: ClassVar[tuple[str, ...]] = ("in", "ln", "bn")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        over: Iterable[str] | None = None,
        num_groups: int | None = None,
        zero_init: bool = False,
        bias: bool = True,
        axis: int = 1,
        sample_variance: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features = size = _checks.check_count(num_features, "num_features")
        self.eps = _checks.check_eps(eps)
        self.momentum = _checks.check_momentum(momentum)
        self.affine, self.track_running_stats = affine, track_running_stats
        like = {"device": device, "dtype": dtype}
        self.register_parameter("weight", _parameter(torch.ones(size, **like), affine))
        self.register_parameter("bias", _parameter(torch.zeros(size, **like), affine and bias))
        self.register_buffer("running_mean", torch.zeros(size, **like))
        self.register_buffer("running_var", torch.ones(size, **like))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))
        self._switch(over, num_groups, zero_init, axis, sample_variance)
        self.reset_parameters()

    def _switch(
        self,
        over: Iterable[str] | None,
        num_groups: int | None,
        zero_init: bool = False,
        axis: int = 1,
        sample_variance: bool = False,
    ) -> None:
        """Give what is its own to a layer that has what BatchNorm has."""
        self.over = _checks.check_over(self._over if over is None else over, num_groups)
        self.num_groups, self.zero_init = num_groups, zero_init
        self.axis = _checks.check_channel_axis(axis)
        self.sample_variance = sample_variance
        _check_groups(self.num_features, num_groups)
        if "bn" not in self.over or not self.track_running_stats:
            self.running_mean = self.running_var = self.num_batches_tracked = None
        like = next((t for t in (self.weight, self.running_mean) if t is not None), torch.ones(()))
        for name in ("mean_weight", "var_weight"):
            self.register_parameter(name, _parameter(like.new_ones(len(self.over))))

    def reset_running_stats(self) -> None:
        """Start the running statistics again: mean 0, variance 1."""
        if self.tracks:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Start again: weight 1 (0 with ``zero_init``), bias 0, all logits 1."""
        self.reset_running_stats()
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.zero_init else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the learned mixture of statistics."""
        if input.dim() not in self._ranks:
            ranks = " or ".join(map(str, self._ranks))
            raise ValueError(f"expected {ranks} axes, got shape {tuple(input.shape)}")
        # A view has an owner more, its base, so that dx would never be written over dy.
        in_order = self.axis in (1, 1 - input.dim())
        x = input if in_order else input.movedim(self.axis, 1)
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels on axis {self.axis}, "
                f"got shape {tuple(input.shape)}"
            )
        live = self.training or not self.tracks
        running = (None, None) if live else (self.running_mean, self.running_var)
        tensors = x, self.weight, self.bias, self.mean_weight, self.var_weight
        over, number = ",".join(self.over), self.num_groups or 1
        method: tuple[Any, ...] = over, number, self.eps, self.sample_variance
        statistics: Tensor | Saved
        if _takes(*tensors, self.running_mean, self.running_var):
            y, statistics = _normalize(*tensors, *running, *method, "")
        else:
            y, statistics = _definition(*_fill(*tensors, over, number), *running, *method)
        if self.training and self.tracks and x.numel():
            if isinstance(statistics, Tensor):
                statistics = _batch(statistics, x, over, number)
            self._track(statistics)
        return y if in_order else y.movedim(1, self.axis)

    def importance(self) -> dict[str, dict[str, float]]:
        """Return the softmax weights of means and variances by the statistic's name.

        Examples
        --------
        >>> import numbanorm.torch
        >>> numbanorm.torch.SwitchableNorm1d(4).importance()
        {'mean': {'ln': 0.5, 'bn': 0.5}, 'var': {'ln': 0.5, 'bn': 0.5}}
        """
        logits = {"mean": self.mean_weight, "var": self.var_weight}
        return {
            kind: dict(zip(self.over, values.double().softmax(0).tolist(), strict=True))
            for kind, values in logits.items()
        }

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], **options: Any) -> Self:
        """Load a checkpoint of the authors' own code, and reproduce that code's outputs.

        As :meth:`numbanorm.SwitchableNorm.from_official`, whose arguments it takes.
        """
        layer = getattr(numbanorm, cls.__name__).from_official(state_dict, **options)
        state = {name: torch.from_numpy(np.array(a)) for name, a in layer.state_dict().items()}
        loaded = cls(
            layer.num_features, layer.eps, layer.momentum,
            track_running_stats=layer.track_running_stats, bias="bias" in state, over=layer.over,
            sample_variance=layer.sample_variance, dtype=state["mean_weight"].dtype,
        )  # fmt: skip
        loaded.load_state_dict(state)
        return loaded

    def extra_repr(self) -> str:
        """Return what is shown between the parentheses."""
        shown = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, "
            f"over={self.over}"
        )
        return shown + (f", num_groups={self.num_groups}" if self.num_groups else "")


class SwitchableNorm1d(_SwitchableNorm):
    """:class:`numbanorm.SwitchableNorm1d` as a Module, by default over LN and BN.

    It differs from it in having PyTorch's ``device`` and ``dtype``, and no ``skip_nonfinite``.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.SwitchableNorm1d(4)
    >>> layer(torch.rand(8, 4)).shape, layer.over
    (torch.Size([8, 4]), ('ln', 'bn'))
    """

    _ranks = (2, 3)
    _over = ("ln", "bn")


class SwitchableNorm2d(_SwitchableNorm):
    """:class:`numbanorm.SwitchableNorm2d` as a Module.

    It differs from it in having PyTorch's ``device`` and ``dtype``, and no ``skip_nonfinite``.

    References
    ----------
    Luo, Ren, Peng, Zhang, Li, "Differentiable Learning-to-Normalize via Switchable
    Normalization", arXiv:1806.10779.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.SwitchableNorm2d(4)
    >>> layer(torch.rand(2, 4, 3, 3)).shape
    torch.Size([2, 4, 3, 3])
    >>> sorted(name for name, _ in layer.named_parameters())
    ['bias', 'mean_weight', 'var_weight', 'weight']
    """

    _ranks = (4,)


class SwitchableNorm3d(_SwitchableNorm):
    """:class:`numbanorm.SwitchableNorm3d` as a Module.

    It differs from it in having PyTorch's ``device`` and ``dtype``, and no ``skip_nonfinite``.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.SwitchableNorm3d(4)
    >>> layer(torch.rand(2, 4, 2, 3, 3)).shape
    torch.Size([2, 4, 2, 3, 3])
    """

    _ranks = (5,)


# ---------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------

_OURS: dict[type, type] = {
    getattr(nn, ours.__name__): ours
    for ours in (
        BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm,
        InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, GroupNorm, LayerNorm, RMSNorm,
    )
}  # fmt: skip
_SWITCHABLE: dict[type, type] = {
    batch: switchable
    for theirs, ours, switchable in (
        (nn.BatchNorm1d, BatchNorm1d, SwitchableNorm1d),
        (nn.BatchNorm2d, BatchNorm2d, SwitchableNorm2d),
        (nn.BatchNorm3d, BatchNorm3d, SwitchableNorm3d),
    )
    for batch in (theirs, ours)
}


def convert(module: nn.Module) -> nn.Module:
    """Let numbanorm do the normalising of a model, in place.

    Layers become those of this module and stay the same objects: parameters, buffers, hooks and
    mode are untouched, and so is an optimiser. Layers of exactly PyTorch's classes are meant; a
    subclass, which may have a forward of its own, is left alone. Lazy ones follow once they know
    their size.

    Outputs of a MiB and more are written where earlier ones were that nobody has any more. So some
    memory is kept, no more than was in use at one time, until a layer is deleted.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a single layer.

    Returns
    -------
    torch.nn.Module
        The same object.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> type(numbanorm.torch.convert(torch.nn.Sequential(torch.nn.LayerNorm(4)))[0])
    <class 'numbanorm.torch.LayerNorm'>
    """
    for layer in module.modules():
        if type(layer) in _OURS:
            layer.__class__ = _OURS[type(layer)]
        elif isinstance(layer, LazyModuleMixin) and layer.cls_to_become in _OURS:
            layer.cls_to_become = _OURS[layer.cls_to_become]
    return module


def convert_switchable(
    module: nn.Module, *, over: Iterable[str] | None = None, num_groups: int | None = None
) -> nn.Module:
    """Turn BatchNorm layers into SwitchableNorm, in place.

    Weight, bias, running statistics, hooks and mode are kept. The logits are new parameters, 1
    each, so that an optimiser has to be made afterwards.

    Parameters
    ----------
    module : torch.nn.Module
        A model, or a single layer.
    over : sequence of str, optional
        Any choice of "in", "ln", "bn" and "gn"; by default IN, LN and BN, and LN and BN in 1d.
    num_groups : int, optional
        The number of groups for "gn".

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError, ValueError
        If ``over`` and ``num_groups`` do not fit, or if a lazy BatchNorm has no size yet.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> numbanorm.torch.convert_switchable(torch.nn.BatchNorm2d(8), over=("ln", "bn")).importance()
    {'mean': {'ln': 0.5, 'bn': 0.5}, 'var': {'ln': 0.5, 'bn': 0.5}}
    """
    names = None if over is None else _checks.check_over(over, num_groups)
    layers = list(module.modules())
    for layer in layers:
        if getattr(layer, "cls_to_become", None) in _SWITCHABLE:
            raise ValueError(f"module: {layer} has no size yet; run the model once before")
        if type(layer) in _SWITCHABLE:
            _check_groups(layer.num_features, num_groups)
    for layer in layers:
        if type(layer) in _SWITCHABLE:
            layer.__class__ = _SWITCHABLE[type(layer)]
            layer._switch(names, num_groups)
    return module
