"""Norm, the generic layer, as a Module."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from numbanorm.core import checks
from numbanorm.core.checks import ActivationLike
from numbanorm.core.geometry import axis_tuple, normalize_axes, normalize_features
from numbanorm.core.types import Axes
from numbanorm.torch.base import TrackingLayer
from numbanorm.torch.definition import wide_dtype
from numbanorm.torch.method import BY_AXES, Inputs, Method


class Norm(TrackingLayer):
    """:class:`numbanorm.Norm` as a Module: normalise x over any axes.

    It takes the same arguments, and PyTorch's ``device`` and ``dtype``. A Module has its parameters
    and buffers before it sees x, so that ``shape`` is needed where it has any.

    Parameters
    ----------
    axes : int or tuple of int
        The axes reduced over, negative allowed.
    affine : bool
        Whether there are a weight and a bias.
    track_stats : bool
        Whether running statistics are kept, and used in evaluation. They have the parameters'
        shape: ``feature_axes`` are then the kept axes other than axis 0, over which they are
        averaged where it is kept.
    feature_axes : int or tuple of int, optional
        The axes that weight and bias span; by default the kept axes when axis 0 is reduced
        (BatchNorm's rule), else the reduced axes (LayerNorm's rule).
    shape : int or tuple of int, optional
        The shape of parameters and running statistics.
    groups : int
        ``group_axis`` is split into that many groups, each with statistics of its own.
    group_axis : int
        The axis that is split.
    center : bool
        Whether the mean is subtracted; if not, the variance is the mean square (RMSNorm).
    bias : bool
        Whether an affine layer has a bias.
    eps : float or None
        Added to the variance; None means the machine epsilon of x's type.
    momentum : float or None
        Weight of the new value in the running statistics; None means the cumulative average.
    skip_nonfinite : bool
        Whether a batch whose statistics are not finite leaves the running statistics alone; such
        batches are counted in ``num_batches_skipped``.
    activation : str or tuple, optional
        What follows in the same pass, see :class:`numbanorm.Norm`.
    device, dtype
        Of parameters and running statistics.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or x in forward; the message says what would do.

    Examples
    --------
    >>> import torch
    >>> import numbanorm.torch
    >>> layer = numbanorm.torch.Norm(axes=(0, 2), shape=1, eps=0.0)
    >>> layer(torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]])).detach().flatten()
    tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """

    _has_other = False

    def __init__(
        self,
        axes: int | Iterable[int],
        affine: bool = True,
        track_stats: bool = False,
        *,
        feature_axes: int | Iterable[int] | None = None,
        shape: int | Iterable[int] | None = None,
        groups: int = 1,
        group_axis: int = 1,
        center: bool = True,
        bias: bool = True,
        eps: float | None = 1e-5,
        momentum: float | None = 0.1,
        skip_nonfinite: bool = False,
        activation: ActivationLike = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(activation=activation)
        self.axes = axis_tuple(axes, "axes")
        if not self.axes:
            raise ValueError("axes: at least one axis is needed, got none")
        self.feature_axes = (
            None if feature_axes is None else axis_tuple(feature_axes, "feature_axes")
        )
        self.affine, self.track_stats = bool(affine), bool(track_stats)
        self.groups = checks.check_count(groups, "groups")
        (self.group_axis,) = axis_tuple(group_axis, "group_axis")
        self.center = bool(center)
        self.eps = None if eps is None else checks.check_eps(eps)
        self.momentum = checks.check_momentum(momentum)
        self.skip_nonfinite = bool(skip_nonfinite)
        if shape is None and (self.affine or self.track_stats):
            raise ValueError(
                "shape: the shape of parameters and running statistics is needed, got None; "
                "affine=False, track_stats=False is a layer without"
            )
        if self.track_stats and not self._features_are_kept():
            raise ValueError(
                "track_stats: running statistics are of the kept axes other than axis 0, and of no "
                "groups; feature_axes= has to name these axes, so that shape= is their shape"
            )
        # Where all axes are reduced there is one of each.
        self.shape: Axes | None = () if shape == () else None
        if shape is not None and shape != ():
            self.shape = checks.check_shape(shape, "shape")
        like = {"device": device, "dtype": dtype}
        weight = torch.ones(self.shape or (), **like) if self.affine else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        shift = None if weight is None or not bias else nn.Parameter(torch.zeros_like(weight))
        self.register_parameter("bias", shift)
        running = torch.zeros(self.shape or (), **like) if self.track_stats else None
        self.register_buffer("running_mean", running)
        self.register_buffer("running_var", None if running is None else torch.ones_like(running))
        zero = torch.tensor(0, device=device) if self.track_stats else None
        self.register_buffer("num_batches_tracked", zero)
        # No part of a state dict, as it is not in that of PyTorch's layers.
        skipped = None if zero is None else zero.clone()
        self.register_buffer("num_batches_skipped", skipped, persistent=False)

    def _features_are_kept(self) -> bool:
        """Tell whether running statistics may have the parameters' shape."""
        if self.groups > 1:
            return False
        if self.feature_axes is None:
            return 0 in self.axes
        return not set(self.feature_axes) & {0, *self.axes}

    def reset_running_stats(self) -> None:
        """Start the running statistics again: mean 0, variance 1."""
        if self.tracks:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()
            self.num_batches_skipped.zero_()

    def reset_parameters(self) -> None:
        """Start again: weight 1, bias 0, and no running statistics."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.running_mean, self.running_var

    def _plan(self, x: Tensor, mask: Tensor | None) -> tuple[Inputs, Method]:
        axes = normalize_axes(self.axes, x.dim())
        features = normalize_features(self.feature_axes, axes, x.dim())
        if self.weight is not None:
            self._check_sizes(x, features, self.weight, "feature axes")
        if self.running_mean is not None:
            kept = tuple(axis for axis in range(1, x.dim()) if axis not in axes)
            self._check_sizes(x, kept, self.running_mean, "kept axes")
        (group_axis,) = normalize_axes(self.group_axis, x.dim(), "group_axis")
        if x.shape[group_axis] % self.groups:
            raise ValueError(
                f"x: axis {group_axis} of size {x.shape[group_axis]} cannot be split into "
                f"{self.groups} groups; a multiple of {self.groups} would do"
            )
        eps = torch.finfo(wide_dtype(x)).eps if self.eps is None else self.eps
        method = Method(BY_AXES, eps, self.groups, axes, features, group_axis, self.center)
        use_batch_stats = self.training or not self.track_stats
        mean, var = (None, None) if use_batch_stats else (self.running_mean, self.running_var)
        inputs = Inputs(x, self.weight, self.bias, running_mean=mean, running_var=var, mask=mask)
        return inputs, method

    def _examples(self) -> list[tuple[int, ...]]:
        shapes = []
        for n_axes in range(1, 6):
            sizes = [self.groups * n for n in (3, 4, 2, 5, 3)[:n_axes]]
            known = (*self.axes, *(self.feature_axes or ()), self.group_axis)
            if not all(-n_axes <= axis < n_axes for axis in known):
                continue
            axes = normalize_axes(self.axes, n_axes)
            features = normalize_features(self.feature_axes, axes, n_axes)
            if self.shape is None or len(self.shape) == len(features):
                for axis, n in zip(features, self.shape or (), strict=False):
                    sizes[axis] = n
                shapes.append(tuple(sizes))
        return shapes

    def _check_sizes(self, x: Tensor, axes: Axes, tensor: Tensor, name: str) -> None:
        sizes = tuple(x.shape[axis] for axis in axes)
        if sizes != tensor.shape:
            raise ValueError(
                f"x: sizes {tuple(tensor.shape)} are needed on the {name} {axes}, got {sizes} "
                f"in shape {tuple(x.shape)}"
            )

    def _tracking(self, inputs: Inputs, method: Method) -> tuple[bool, int | None]:
        samples = None if 0 in method.axes else inputs.x.shape[0]
        return self.training and self.tracks, samples

    def extra_repr(self) -> str:
        """Return what is shown between the parentheses."""
        axes = self.axes[0] if len(self.axes) == 1 else self.axes
        shown = [f"{axes}, affine={self.affine}, track_stats={self.track_stats}"]
        options: dict[str, tuple[Any, Any]] = {
            "feature_axes": (self.feature_axes, None),
            "shape": (self.shape, None),
            "groups": (self.groups, 1),
            "group_axis": (self.group_axis, 1),
            "center": (self.center, True),
            "bias": (not self.affine or self.bias is not None, True),
            "eps": (self.eps, 1e-5),
            "momentum": (self.momentum, 0.1),
            "skip_nonfinite": (self.skip_nonfinite, False),
            "activation": (self.activation, None),
        }
        shown += [f"{key}={value!r}" for key, (value, usual) in options.items() if value != usual]
        return ", ".join(shown)
