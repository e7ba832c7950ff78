"""PyTorch's layers: subclasses with a forward of their own."""

from collections.abc import Container
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from numbanorm.torch import distributed
from numbanorm.torch.autograd import normalize
from numbanorm.torch.base import Layer, TrackingLayer, can_take
from numbanorm.torch.method import Method


class _BatchNorm(TrackingLayer):
    # How many axes x may have.
    _ranks: ClassVar[Container[int]]

    def forward(self, input: Tensor) -> Tensor:
        # What is wrong here PyTorch says in its own words.
        if input.dim() not in self._ranks:
            return super().forward(input)
        use_batch_stats = self.training or self.running_mean is None
        group = self._group_name() if self.training else ""
        running = (None, None) if use_batch_stats else (self.running_mean, self.running_var)
        tensors = self.weight, self.bias, self.running_mean, self.running_var
        least = (2 if use_batch_stats else 1) * max(self.num_features, 1)
        if (
            self.is_odd
            or not can_take(input, (self.num_features,), *tensors)
            or input.shape[1] != self.num_features
            or (input.numel() < least and not group)
        ):
            self._not_pooling()
            return super().forward(input)
        method = Method(("bn",), self.eps, process_group=group)
        y, statistics = normalize(self, input, self.weight, self.bias, method, running)
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
    no instance of :class:`torch.nn.SyncBatchNorm`, which that refuses on a CPU. Under autocast
    16-bit x is normalised in float32.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.SyncBatchNorm(3)
    >>> layer(torch.rand(8, 3, 4, 4)).shape  # in a single process
    torch.Size([8, 3, 4, 4])
    """

    _ranks = range(2, 65)

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
        **bias: bool,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **bias
        )
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the statistics of all processes."""
        if input.is_cpu and input.dtype in (torch.bfloat16, torch.float16):
            return super().forward(input.float()).to(input.dtype)
        return super().forward(input)

    def _group_name(self) -> str:
        return distributed.name_of_group(self.process_group)


class _InstanceNorm(TrackingLayer):
    _counts = False
    # How many axes x has without and with that of samples.
    _ranks: ClassVar[tuple[int, int]]

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in self._ranks:
            return super().forward(input)
        use_batch_stats = self.training or not self.track_running_stats
        tensors = self.weight, self.bias, self.running_mean, self.running_var
        if (
            self.is_odd
            or not (use_batch_stats or self.tracks)
            or not can_take(input, (self.num_features,), *tensors)
            or input.shape[-self._ranks[0]] != self.num_features
            or input.shape[1 - self._ranks[0] :].numel() < (2 if use_batch_stats else 1)
            or input.numel() == 0
        ):
            self._not_pooling()
            return super().forward(input)
        x = input.unsqueeze(0) if input.dim() == self._ranks[0] else input
        running = (None, None) if use_batch_stats else (self.running_mean, self.running_var)
        # With running statistics a sample has no part in it: that is BatchNorm.
        method = Method(("in" if use_batch_stats else "bn",), self.eps)
        y, statistics = normalize(self, x, self.weight, self.bias, method, running)
        if use_batch_stats and self.tracks:
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


class GroupNorm(Layer, nn.GroupNorm):
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
            not can_take(input, (self.num_channels,), self.weight, self.bias)
            or input.dim() < 2
            or input.shape[1] != self.num_channels
            or input.numel() <= self.num_groups
        ):
            return super().forward(input)
        method = Method(("gn",), self.eps, self.num_groups)
        y, _ = normalize(self, input, self.weight, self.bias, method)
        return y


class LayerNorm(Layer, nn.LayerNorm):
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
        row_axes = len(self.normalized_shape)
        if (
            not can_take(input, self.normalized_shape, self.weight, self.bias)
            or input.shape[input.dim() - row_axes :] != self.normalized_shape
            or input.numel() == 0
        ):
            return super().forward(input)
        method = Method(("rows",), self.eps, row_axes=row_axes)
        y, _ = normalize(self, input, self.weight, self.bias, method)
        return y


class RMSNorm(Layer, nn.RMSNorm):
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
        row_axes = len(self.normalized_shape)
        if (
            not can_take(input, self.normalized_shape, self.weight)
            or input.shape[input.dim() - row_axes :] != self.normalized_shape
            or input.numel() == 0
        ):
            return super().forward(input)
        eps = torch.finfo(input.dtype).eps if self.eps is None else self.eps
        method = Method(("rms",), eps, row_axes=row_axes)
        y, _ = normalize(self, input, self.weight, None, method)
        return y
