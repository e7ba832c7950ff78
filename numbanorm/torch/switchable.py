"""SwitchableNorm as a Module."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

import numbanorm
from numbanorm.core import checks
from numbanorm.core.checks import ActivationLike
from numbanorm.torch.base import TrackingLayer, check_mask
from numbanorm.torch.method import Inputs, Method


def _parameter(value: Tensor, wanted: bool = True) -> nn.Parameter | None:
    return nn.Parameter(value) if wanted else None


def check_groups(num_features: int, num_groups: int | None) -> None:
    """Raise if channels cannot be split into so many groups."""
    if num_groups is not None and num_features % num_groups:
        raise ValueError(
            f"num_groups: a divisor of num_features={num_features} is needed, got {num_groups}"
        )


class _SwitchableNorm(TrackingLayer):
    _has_other = False
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
        activation: ActivationLike = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(activation=activation)
        self.num_features = size = checks.check_count(num_features, "num_features")
        self.eps = checks.check_eps(eps)
        self.momentum = checks.check_momentum(momentum)
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
        self.over = checks.check_over(self._over if over is None else over, num_groups)
        self.num_groups, self.zero_init = num_groups, zero_init
        self.axis = checks.check_channel_axis(axis)
        self.sample_variance = sample_variance
        check_groups(self.num_features, num_groups)
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

    def forward(
        self, input: Tensor, *, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalise with the learned mixture of statistics, else as :class:`BatchNorm2d`."""
        if input.dim() not in self._ranks:
            ranks = " or ".join(map(str, self._ranks))
            raise ValueError(f"expected {ranks} axes, got shape {tuple(input.shape)}")
        # A view has an owner more, its base, so that dx would never be written over dy.
        axis = self.axis % input.dim()
        if axis == 1:
            return super().forward(input, mask=mask, residual=residual)
        counts = None if mask is None else check_mask(mask, input).movedim(axis, 1)
        added = None if residual is None else residual.movedim(axis, 1)
        y = super().forward(input.movedim(axis, 1), mask=counts, residual=added)
        return y.movedim(1, axis)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        logits = self.mean_weight, self.var_weight
        return self.weight, self.bias, *logits, self.running_mean, self.running_var

    def _plan(self, x: Tensor, mask: Tensor | None) -> tuple[Inputs, Method]:
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels on axis {self.axis}, "
                f"got shape {tuple(x.movedim(1, self.axis).shape)}"
            )
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != x.shape[1:2]:
                raise ValueError(
                    f"{name}: shape ({self.num_features},) is needed, got {tuple(tensor.shape)}"
                )
        use_batch_stats = self.training or not self.tracks
        mean, var = (None, None) if use_batch_stats else (self.running_mean, self.running_var)
        logits = self.mean_weight, self.var_weight
        inputs = Inputs(x, self.weight, self.bias, *logits, None, mean, var, mask)
        method = Method(
            tuple(self.over),
            self.eps,
            self.num_groups or 1,
            sample_variance=self.sample_variance,
        )
        return inputs, method

    def _examples(self) -> list[tuple[int, ...]]:
        shapes = [[3, 2, 3, 2][: rank - 1] for rank in self._ranks]
        for shape in shapes:
            shape.insert(self.axis % (len(shape) + 1), self.num_features)
        return [tuple(shape) for shape in shapes]

    def _tracking(self, inputs: Inputs, method: Method) -> tuple[bool, int | None]:
        return self.training and self.tracks and inputs.x.numel() > 0, None

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
        shown += f", num_groups={self.num_groups}" if self.num_groups else ""
        return shown + (f", activation={self.activation!r}" if self.activation else "")


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
