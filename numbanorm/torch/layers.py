"""PyTorch's layers of channels: subclasses with a forward of their own.

What a layer of ours adds to PyTorch's stands in a class of its own with an underscore, which goes
before that of any library that means the same: see :mod:`numbanorm.torch.foreign`.
"""

from collections.abc import Container
from typing import Any, ClassVar

from torch import Tensor, nn

from numbanorm.core.checks import ActivationLike
from numbanorm.torch import distributed
from numbanorm.torch.base import AffineLayer, TrackingLayer
from numbanorm.torch.method import Inputs, Method


class _ChannelNorm(TrackingLayer):
    """Of each channel, with running statistics."""

    weight: Any
    bias: Any
    eps: float
    track_running_stats: bool

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.running_mean, self.running_var

    def _inputs(self, x: Tensor, mask: Tensor | None, use_batch_stats: bool) -> Inputs:
        mean, var = (None, None) if use_batch_stats else (self.running_mean, self.running_var)
        return Inputs(x, self.weight, self.bias, running_mean=mean, running_var=var, mask=mask)


class _BatchNorm(_ChannelNorm):
    # How many axes x may have.
    _ranks: ClassVar[Container[int]]

    def _plan(self, x: Tensor, mask: Tensor | None) -> tuple[Inputs, Method] | None:
        # What is wrong here PyTorch says in its own words.
        if x.dim() not in self._ranks or self.is_odd or not self._have_shape(x.shape[1:2]):
            return None
        use_batch_stats = self.training or self.running_mean is None
        group = self._group_name() if self.training else ""
        values = x.numel() // max(x.shape[1], 1)
        if values < (2 if use_batch_stats else 1) and not group:
            return None
        return self._inputs(x, mask, use_batch_stats), Method(
            ("bn",), self.eps, process_group=group
        )

    def _examples(self) -> list[tuple[int, ...]]:
        ranks = [rank for rank in (2, 3, 4, 5) if rank in self._ranks]
        return [(3, self.num_features, 2, 3, 2)[:rank] for rank in ranks]

    def _tracking(self, inputs: Inputs, method: Method) -> tuple[bool, int | None]:
        return self.training and self.track_running_stats and self.tracks, None

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

    _ranks = (2, 3)


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

    _ranks = (4,)


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

    _ranks = (5,)


# DistributedDataParallel refuses an instance of nn.SyncBatchNorm on a CPU: a twin has its methods.
_METHODS = {k: v for k, v in vars(nn.SyncBatchNorm).items() if k not in ("__init__", "__dict__")}
_SyncBatchNorm: Any = type("SyncBatchNorm", nn.SyncBatchNorm.__bases__, _METHODS)


class SyncBatchNorm(_BatchNorm, _SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm` on CPUs, over ``torch.distributed`` with gloo.

    Statistics and gradients are those of the whole batch, also where processes have different
    numbers of samples, or none. As in PyTorch, the gradients of weight and bias are those of a
    process's own samples. In evaluation, and in a single process, it is a BatchNorm.
    :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` followed by :func:`convert` puts it
    into a model, which goes into :class:`~torch.nn.parallel.DistributedDataParallel` then: it is
    no instance of :class:`torch.nn.SyncBatchNorm`, which that refuses on a CPU.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.SyncBatchNorm(3)
    >>> layer(torch.rand(8, 3, 4, 4)).shape  # in a single process
    torch.Size([8, 3, 4, 4])
    """

    _ranks = range(2, 65)
    _remembers = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: ActivationLike = None,
        **bias: bool,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            activation=activation, **bias,
        )  # fmt: skip
        self.process_group = process_group

    def _group_name(self) -> str:
        return distributed.name_of_group(self.process_group)


class _InstanceNorm(_ChannelNorm):
    _counts = False
    # How many axes x has without and with that of samples.
    _ranks: ClassVar[tuple[int, int]]

    def _plan(self, x: Tensor, mask: Tensor | None) -> tuple[Inputs, Method] | None:
        if x.dim() not in self._ranks or self.is_odd:
            return None
        if x.dim() == self._ranks[0]:
            x, mask = x.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
        use_batch_stats = self._use_batch_stats()
        if (
            x.shape[1] != self.num_features
            or not self._have_shape(x.shape[1:2])
            or not (use_batch_stats or self.tracks)
            or x.numel() < (2 if use_batch_stats else 1) * x.shape[0] * x.shape[1]
            or x.numel() == 0
        ):
            return None
        # With running statistics a sample has no part in it: that is BatchNorm.
        method = Method(("in" if use_batch_stats else "bn",), self.eps)
        return self._inputs(x, mask, use_batch_stats), method

    def _examples(self) -> list[tuple[int, ...]]:
        shape = 2, self.num_features, 3, 2, 2
        return [shape[1:][: self._ranks[0]], shape[: self._ranks[1]]]

    def _use_batch_stats(self) -> bool:
        return self.training or not self.track_running_stats

    def _tracking(self, inputs: Inputs, method: Method) -> tuple[bool, int | None]:
        return self._use_batch_stats() and self.tracks, inputs.x.shape[0]

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

    _ranks = (2, 3)


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

    _ranks = (3, 4)


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

    _ranks = (4, 5)


class _GroupNorm(AffineLayer):
    num_groups: int
    num_channels: int

    def _plan(self, x: Tensor, mask: Tensor | None) -> tuple[Inputs, Method] | None:
        if x.dim() < 2 or x.shape[1] != self.num_channels or x.numel() <= self.num_groups:
            return None
        if not self._have_shape(x.shape[1:2]):
            return None
        return self._inputs(x, mask), Method(("gn",), self.eps, self.num_groups)

    def _examples(self) -> list[tuple[int, ...]]:
        return [(3, self.num_channels, 4), (2, self.num_channels, 3, 2)]


class GroupNorm(_GroupNorm, nn.GroupNorm):
    """:class:`torch.nn.GroupNorm`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> x = torch.tensor([[1.0, 3.0, 10.0, 30.0]])
    >>> numbanorm.torch.GroupNorm(2, 4, eps=0.0, affine=False)(x)
    tensor([[-1.,  1., -1.,  1.]])
    """
