"""BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm: a Norm with its axes and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from numbanorm.core.checks import (
    ActivationLike,
    bool_mask,
    check_channel_axis,
    check_count,
    check_shape,
    float_array,
    like_x,
)
from numbanorm.core.geometry import AllBut
from numbanorm.core.types import Array
from numbanorm.layers.norm import Norm


class BatchNorm(Norm):
    """Normalise each channel over the batch, for x of any rank.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the mean and the biased variance of
    each channel over all other axes; in evaluation with their running averages.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the new value in the running statistics; None means the cumulative average.
    affine : bool
        Whether there are a weight and a bias, of shape (C,).
    track_running_stats : bool
        Whether there are running statistics, of shape (C,); without, evaluation uses the batch.
    bias : bool
        Whether an affine layer has a bias.
    axis : int
        The channel axis; -1 for (N, ..., C).
    skip_nonfinite : bool
        Whether a batch with non-finite statistics leaves the running ones alone; such batches are
        counted in ``num_batches_skipped``.
    activation : str or tuple, optional
        What follows in the same pass, see :class:`~numbanorm.Norm`.
    device : optional
        As in PyTorch's signatures, None or "cpu": arrays are nowhere else.
    dtype : dtype, optional
        Of parameters and running statistics, float32 (as with None) or float64.
    comm : mpi4py communicator, optional
        Of processes that train together, see :class:`Norm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; in training, if x has a single value per channel.

    Notes
    -----
    A NaN or Inf in x makes y and dx of its channel NaN in training, and the running statistics of
    that channel for good, unless ``skip_nonfinite``; in evaluation it stays alone.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> numbanorm.BatchNorm(3)(np.arange(9, dtype=np.float32).reshape(3, 3))[:, 0].round(4)
    array([-1.2247,  0.    ,  1.2247], dtype=float32)
    """

    several_values = True
    has_default_eps = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        axis: int = 1,
        skip_nonfinite: bool = False,
        activation: ActivationLike = None,
        device: object = None,
        dtype: DTypeLike | None = np.float32,
        comm: Any = None,
    ) -> None:
        self.num_features = check_count(num_features, "num_features")
        self.axis = check_channel_axis(axis)
        super().__init__(
            AllBut((self.axis,)),
            affine,
            track_running_stats,
            feature_axes=self.axis,
            shape=self.num_features,
            bias=bias,
            eps=eps,
            momentum=momentum,
            skip_nonfinite=skip_nonfinite,
            activation=activation,
            device=device,
            dtype=dtype,
            comm=comm,
        )

    @property
    def track_running_stats(self) -> bool:
        """Whether there are running statistics."""
        return self.track_stats


class BatchNorm1d(BatchNorm):
    """:class:`BatchNorm`, same parameters, for x of shape (N, C) or (N, C, L).

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> numbanorm.BatchNorm1d(2, eps=0.0)(x)
    array([[-1., -1.],
           [ 1.,  1.]])
    """

    ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """:class:`BatchNorm`, same parameters, for x of shape (N, C, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> x = np.random.default_rng(0).random((8, 3, 4, 4), np.float32)
    >>> y = numbanorm.BatchNorm2d(3)(x)
    >>> y.shape, bool(np.allclose(y.mean(axis=(0, 2, 3)), 0, atol=1e-6))
    ((8, 3, 4, 4), True)
    """

    ranks = (4,)


class BatchNorm3d(BatchNorm):
    """:class:`BatchNorm`, same parameters, for x of shape (N, C, D, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> x = np.random.default_rng(0).random((8, 3, 2, 4, 4), np.float32)
    >>> y = numbanorm.BatchNorm3d(3)(x)
    >>> y.shape, bool(np.allclose(y.mean(axis=(0, 2, 3, 4)), 0, atol=1e-6))
    ((8, 3, 2, 4, 4), True)
    """

    ranks = (5,)


class InstanceNorm(Norm):
    """Normalise each channel of each sample, for x of any rank.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the mean and the biased variance over
    all axes but N and C.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the new value in the running statistics; None means the cumulative average.
    affine : bool
        Whether there are a weight and a bias, of shape (C,).
    track_running_stats : bool
        Whether there are running statistics, of shape (C,), averages over samples and batches,
        which evaluation uses.
    bias, axis, skip_nonfinite, activation, device, dtype
        As in :class:`BatchNorm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; in training, if an instance is a single value.

    Notes
    -----
    A NaN or Inf in x makes y and dx of its channel of its sample NaN. Running statistics of its
    channel stay NaN, unless ``skip_nonfinite``; in evaluation with them it stays alone.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> numbanorm.InstanceNorm(2, eps=0.0)(np.array([[[1.0, 3.0], [10.0, 30.0]]]))
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """

    several_values = True
    has_default_eps = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
        axis: int = 1,
        skip_nonfinite: bool = False,
        activation: ActivationLike = None,
        device: object = None,
        dtype: DTypeLike | None = np.float32,
    ) -> None:
        self.num_features = check_count(num_features, "num_features")
        self.axis = check_channel_axis(axis)
        super().__init__(
            AllBut((0, self.axis)),
            affine,
            track_running_stats,
            feature_axes=self.axis,
            shape=self.num_features,
            bias=bias,
            eps=eps,
            momentum=momentum,
            skip_nonfinite=skip_nonfinite,
            activation=activation,
            device=device,
            dtype=dtype,
        )

    @property
    def track_running_stats(self) -> bool:
        """Whether there are running statistics."""
        return self.track_stats


class _SampleOrBatch(InstanceNorm):
    """An InstanceNorm of fixed rank: x with one axis less is a single sample."""

    def forward(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        out: Array | None = None,
    ) -> Array:
        sample = float_array(x, "x")
        if sample.ndim != self.ranks[0] - 1:
            return super().forward(sample, mask=mask, residual=residual, out=out)
        channel = self.axis - 1 if self.axis > 0 else self.axis
        if -sample.ndim <= channel < sample.ndim:
            self._check_sizes(sample, (channel,))
        counts = bool_mask(mask, sample.shape)
        batch_mask = None if counts is None else counts[None]
        added = like_x(residual, "residual", sample)
        y = super().forward(
            sample[None],
            mask=batch_mask,
            residual=None if added is None else added[None],
            out=_batch_of_one(out),
        )
        return y[0] if out is None else out

    def backward(
        self, dy: ArrayLike, *, out: Array | None = None, out_residual: Array | None = None
    ) -> Any:
        sample = float_array(dy, "dy")
        if sample.ndim != self.ranks[0] - 1:
            return super().backward(sample, out=out, out_residual=out_residual)
        outs = out, out_residual
        results = super().backward(
            sample[None], out=_batch_of_one(out), out_residual=_batch_of_one(out_residual)
        )
        if isinstance(results, tuple):
            return tuple(y[0] if o is None else o for y, o in zip(results, outs, strict=True))
        return results[0] if out is None else out

    forward.__doc__ = Norm.forward.__doc__
    backward.__doc__ = Norm.backward.__doc__


def _batch_of_one(out: Any) -> Any:
    """Return an output with a batch axis; what is no array is left for the checks."""
    return out[None] if isinstance(out, np.ndarray) else out


class InstanceNorm1d(_SampleOrBatch):
    """:class:`InstanceNorm`, same parameters, for x of shape (N, C, L) or (C, L).

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> numbanorm.InstanceNorm1d(2, eps=0.0)(np.array([[1.0, 3.0], [10.0, 30.0]]))
    array([[-1.,  1.],
           [-1.,  1.]])
    """

    ranks = (3,)


class InstanceNorm2d(_SampleOrBatch):
    """:class:`InstanceNorm`, same parameters, for x of shape (N, C, H, W) or (C, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> x = np.random.default_rng(0).random((8, 3, 4, 4), np.float32)
    >>> y = numbanorm.InstanceNorm2d(3)(x)
    >>> y.shape, bool(np.allclose(y.mean(axis=(2, 3)), 0, atol=1e-6))
    ((8, 3, 4, 4), True)
    """

    ranks = (4,)


class InstanceNorm3d(_SampleOrBatch):
    """:class:`InstanceNorm`, same parameters, for x of shape (N, C, D, H, W) or (C, D, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> x = np.random.default_rng(0).random((8, 3, 2, 4, 4), np.float32)
    >>> y = numbanorm.InstanceNorm3d(3)(x)
    >>> y.shape, bool(np.allclose(y.mean(axis=(2, 3, 4)), 0, atol=1e-6))
    ((8, 3, 2, 4, 4), True)
    """

    ranks = (5,)


class GroupNorm(Norm):
    """Normalise each sample over groups of neighbouring channels.

    With one group it is LayerNorm over (C, ...) without its weight per element, with C groups
    it is InstanceNorm.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the mean and the biased variance over the
    C / G channels of a group and all axes but N.

    Parameters
    ----------
    num_groups : int
        A divisor of ``num_channels``.
    num_channels : int
        C, the number of channels.
    eps : float
        Added to the variance.
    affine : bool
        Whether there are a weight and a bias, of shape (C,).
    bias, axis, activation, device, dtype
        As in :class:`BatchNorm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Notes
    -----
    A NaN or Inf in x makes y and dx of its group of channels of its sample NaN.

    References
    ----------
    Wu and He, "Group Normalization", arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> numbanorm.GroupNorm(2, 4, eps=0.0)(np.array([[1.0, 3.0, 10.0, 30.0]]))
    array([[-1.,  1., -1.,  1.]])
    """

    has_default_eps = False

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        axis: int = 1,
        activation: ActivationLike = None,
        device: object = None,
        dtype: DTypeLike | None = np.float32,
    ) -> None:
        self.num_groups = check_count(num_groups, "num_groups")
        self.num_channels = check_count(num_channels, "num_channels")
        if self.num_channels % self.num_groups:
            raise ValueError(
                f"num_groups: a divisor of num_channels={num_channels} is needed, got {num_groups}"
            )
        self.axis = check_channel_axis(axis)
        super().__init__(
            AllBut((0,)),
            affine,
            feature_axes=self.axis,
            shape=self.num_channels,
            groups=self.num_groups,
            group_axis=self.axis,
            bias=bias,
            eps=eps,
            activation=activation,
            device=device,
            dtype=dtype,
        )


class LayerNorm(Norm):
    """Normalise each sample over its trailing axes, with a weight for each element of them.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the mean and the biased variance over the
    axes of ``normalized_shape``. Training and evaluation are the same.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the trailing axes; an int means the last axis.
    eps : float
        Added to the variance.
    elementwise_affine : bool
        Whether there are a weight and a bias, of shape ``normalized_shape``.
    bias : bool
        Whether an affine layer has a bias.
    activation, device, dtype
        As in :class:`BatchNorm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Notes
    -----
    A NaN or Inf in x makes y and dx of its sample NaN.

    References
    ----------
    Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import numbanorm
    >>> numbanorm.LayerNorm(2, eps=0.0)([[1.0, 3.0], [10.0, 30.0]])
    array([[-1.,  1.],
           [-1.,  1.]])
    """

    has_default_eps = False

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        activation: ActivationLike = None,
        device: object = None,
        dtype: DTypeLike | None = np.float32,
    ) -> None:
        self.normalized_shape = check_shape(normalized_shape, "normalized_shape")
        axes = tuple(range(-len(self.normalized_shape), 0))
        super().__init__(
            axes,
            elementwise_affine,
            feature_axes=axes,
            shape=self.normalized_shape,
            bias=bias,
            eps=eps,
            activation=activation,
            device=device,
            dtype=dtype,
        )

    @property
    def elementwise_affine(self) -> bool:
        """Whether there are a weight and a bias."""
        return self.affine


class RMSNorm(Norm):
    """Divide each sample by the root mean square of its trailing axes; no mean is subtracted.

    y = x / sqrt(mean(x**2) + eps) * weight

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the trailing axes; an int means the last axis.
    eps : float, optional
        By default the machine epsilon of x's type, as in PyTorch.
    elementwise_affine : bool
        Whether there is a weight, of shape ``normalized_shape``; there is no bias.
    activation, device, dtype
        As in :class:`BatchNorm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Notes
    -----
    A NaN or Inf in x makes y and dx of its sample NaN.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Examples
    --------
    >>> import numbanorm
    >>> numbanorm.RMSNorm(3, eps=0.0)([[3.0, 3.0, -3.0]])
    array([[ 1.,  1., -1.]])
    """

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        activation: ActivationLike = None,
        device: object = None,
        dtype: DTypeLike | None = np.float32,
    ) -> None:
        self.normalized_shape = check_shape(normalized_shape, "normalized_shape")
        axes = tuple(range(-len(self.normalized_shape), 0))
        super().__init__(
            axes,
            elementwise_affine,
            feature_axes=axes,
            shape=self.normalized_shape,
            center=False,
            bias=False,
            eps=eps,
            activation=activation,
            device=device,
            dtype=dtype,
        )

    @property
    def elementwise_affine(self) -> bool:
        """Whether there is a weight."""
        return self.affine
