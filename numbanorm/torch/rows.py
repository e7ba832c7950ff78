"""LayerNorm and RMSNorm for PyTorch, over trailing axes or over channels that come first."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from numbanorm.core import checks
from numbanorm.core.checks import ActivationLike
from numbanorm.torch.base import AffineLayer
from numbanorm.torch.definition import wide_dtype
from numbanorm.torch.method import BY_AXES, Inputs, Method


class _RowNorm(AffineLayer):
    """Over trailing axes, with a weight for each element."""

    normalized_shape: Any
    _center: ClassVar[bool] = True

    def _plan(self, x: Tensor, mask: Tensor | None) -> tuple[Inputs, Method] | None:
        wanted = self._row_shape()
        shape = x.shape[x.dim() - len(wanted) :]
        if shape != wanted or not self._have_shape(shape) or x.numel() == 0:
            return None
        return self._inputs(x, mask), Method.of_rows(len(wanted), self._eps(x), self._center)

    def _examples(self) -> list[tuple[int, ...]]:
        return [(*outer, *self._row_shape()) for outer in ((3,), (2, 3), (2, 2, 3))]

    def _row_shape(self) -> tuple[int, ...]:
        # Of other libraries it may be a number, or a list.
        shape = self.normalized_shape
        return (shape,) if isinstance(shape, int) else tuple(shape)

    def _eps(self, x: Tensor) -> float:
        return self.eps


class _LayerNorm(_RowNorm):
    """LayerNorm's rows."""


class LayerNorm(_LayerNorm, nn.LayerNorm):
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


class _RMSNorm(_RowNorm):
    """RMSNorm's rows."""

    _center = False

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return (self.weight,)

    def _inputs(self, x: Tensor, mask: Tensor | None) -> Inputs:
        return Inputs(x, self.weight, mask=mask)

    def _eps(self, x: Tensor) -> float:
        return torch.finfo(wide_dtype(x)).eps if self.eps is None else self.eps


class RMSNorm(_RMSNorm, nn.RMSNorm):
    """:class:`torch.nn.RMSNorm`, computed by numbanorm.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> x = torch.tensor([[3.0, 3.0, -3.0]])
    >>> numbanorm.torch.RMSNorm(3, eps=0.0, elementwise_affine=False)(x)
    tensor([[ 1.,  1., -1.]])
    """


class _ChannelsFirst(_RowNorm):
    """Over the channels of (N, C, H, W), wherever they are in memory."""

    def _plan(self, x: Tensor, mask: Tensor | None) -> tuple[Inputs, Method] | None:
        shape = x.shape[1:2]
        if x.dim() != 4 or shape != self._row_shape() or not self._have_shape(shape):
            return None
        if x.numel() == 0:
            return None
        method = Method(BY_AXES, self._eps(x), axes=(1,), feature_axes=(1,), center=self._center)
        return self._inputs(x, mask), method

    def _examples(self) -> list[tuple[int, ...]]:
        return [(2, *self._row_shape(), 3, 2)]


class _LayerNorm2d(_ChannelsFirst, _LayerNorm):
    """LayerNorm's."""


class RMSNorm2d(_ChannelsFirst, _RMSNorm):
    """RMSNorm's, for layers of other libraries: PyTorch has none."""


class LayerNorm2d(_LayerNorm2d, nn.LayerNorm):
    """LayerNorm over the channels of each position of x, (N, C, H, W).

    It is the ``LayerNorm2d`` of torchvision, timm and others, without their transposed copies:
    y = (x - mean) / sqrt(var + eps) * weight + bias, and y is in memory as x is.

    Parameters
    ----------
    num_channels : int
        C.
    eps : float
        Added to the variance.
    elementwise_affine, bias : bool
        Whether there are a weight and a bias, of shape (C,); a bias needs a weight.
    activation : str or tuple, optional
        What follows in the same pass, see :class:`numbanorm.Norm`.
    device, dtype
        Of the parameters.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> x = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> numbanorm.torch.LayerNorm2d(2, eps=0.0, elementwise_affine=False)(x).flatten()
    tensor([-1.,  1.])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        activation: ActivationLike = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            checks.check_count(num_channels, "num_channels"),
            checks.check_eps(eps),
            elementwise_affine,
            bias,
            device,
            dtype,
            activation=activation,
        )

    def _elsewhere(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x: (N, C, H, W) is needed, got shape {tuple(x.shape)}")
        # The older ONNX exporter makes nonsense of movedim(-1, 1).
        return super()._elsewhere(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
