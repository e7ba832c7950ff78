"""BatchNorm, InstanceNorm and GroupNorm of arrays with a channel axis."""

from __future__ import annotations

from numpy.typing import ArrayLike

from numbanorm.core.checks import ActivationLike, check_count, float_array
from numbanorm.core.layouts import Saved
from numbanorm.core.types import Array
from numbanorm.functional.common import normalize_and_track, running_pair
from numbanorm.methods import channel_axis, channel_geometry, require_several


def batch_norm_forward(
    x: ArrayLike,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`batch_norm` and what :func:`batch_norm_backward` needs.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, training, momentum, eps, axis, mask
        As in :func:`batch_norm`.
    activation, residual, out
        As in :func:`batch_norm`. x and residual must stay as it is until the backward.

    Returns
    -------
    y : array
        Of the shape and dtype of x.
    saved : Saved
        What backward needs; it holds x, not a copy of it.

    Raises
    ------
    TypeError, ValueError
        As in :func:`batch_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> y, saved = F.batch_norm_forward(x, None, None, training=True, eps=0.0)
    >>> F.batch_norm_backward(np.ones_like(x), saved).dx
    array([[0., 0.],
           [0., 0.]])
    """
    array = float_array(x, "x")
    geometry = channel_geometry(array.shape, channel_axis(array, axis), ("bn",))
    running = running_pair(running_mean, running_var, geometry.running_shape, training)
    if training:
        require_several(geometry)
    elif running is None:
        raise ValueError("running_mean: running statistics are needed in evaluation, got None")
    return normalize_and_track(
        array, geometry, running, training, momentum, weight, bias, eps, mask,
        activation, residual, out,
    )  # fmt: skip


def batch_norm(
    x: ArrayLike,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each channel over the batch: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Parameters
    ----------
    x : array of floats, (N, C, ...)
        N samples of C channels; with ``axis=-1``, (N, ..., C).
    running_mean, running_var : array (C,), optional
        Averages over batches; updated in place in training, used instead of the batch's
        statistics in evaluation. The variance is the unbiased one.
    weight, bias : array (C,), optional
        Scale and shift.
    training : bool
        Whether the batch's own statistics are used.
    momentum : float
        Weight of the new value in the running statistics.
    eps : float
        Added to the (biased) variance.
    axis : int
        The channel axis.
    mask : array of bool, optional
        Broadcasts to x; True where an element counts in the statistics.
    activation : str or tuple, optional
        What follows in the same pass: "relu", "leaky_relu" (or with a slope,
        ``("leaky_relu", 0.2)``), "relu6", "silu", "gelu", "gelu_tanh", "sigmoid" or "tanh".
    residual : array of the shape of x, optional
        What is added before the activation: y = activation(norm(x) + residual).
    out : array, optional
        Where y is written; it may be ``x`` or ``residual``.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, if evaluation has no running statistics, or if training has
        a single value per channel.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.batch_norm(np.array([[1.0, 5.0], [3.0, 5.0]]), None, None, training=True, eps=0.0)
    array([[-1.,  0.],
           [ 1.,  0.]])
    """
    return batch_norm_forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps,
        axis=axis, mask=mask, activation=activation, residual=residual, out=out,
    )[0]  # fmt: skip


def instance_norm_forward(
    x: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`instance_norm` and what :func:`instance_norm_backward` needs.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, axis, mask
        As in :func:`instance_norm`.
    activation, residual, out
        As in :func:`instance_norm`. x and residual must stay as it is until the backward.

    Returns
    -------
    y : array
        Of the shape and dtype of x.
    saved : Saved
        What backward needs; it holds x, not a copy of it.

    Raises
    ------
    TypeError, ValueError
        As in :func:`instance_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> y, saved = F.instance_norm_forward(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    >>> F.instance_norm_backward(np.ones_like(y), saved).dx
    array([[[0., 0.],
            [0., 0.]]])
    """
    array = float_array(x, "x")
    geometry = channel_geometry(array.shape, channel_axis(array, axis), ("in",))
    running = running_pair(running_mean, running_var, geometry.running_shape, use_input_stats)
    if use_input_stats:
        require_several(geometry)
    elif running is None:
        raise ValueError("running_mean: needed where use_input_stats is False, got None")
    return normalize_and_track(
        array, geometry, running, use_input_stats, momentum, weight, bias, eps, mask,
        activation, residual, out,
    )  # fmt: skip


def instance_norm(
    x: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each channel of each sample: the statistics span neither samples nor channels.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance over all axes
    but N and C.

    Parameters
    ----------
    x : array of floats, (N, C, ...)
        With ``axis=-1``, (N, ..., C).
    running_mean, running_var : array (C,), optional
        Averages over samples and batches; updated in place if ``use_input_stats``, else used.
    weight, bias : array (C,), optional
        Scale and shift.
    use_input_stats : bool
        Whether the statistics are those of x.
    momentum, eps, axis, mask, activation, residual, out
        As in :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or if an instance is a single value.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    return instance_norm_forward(
        x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps,
        axis=axis, mask=mask, activation=activation, residual=residual, out=out,
    )[0]  # fmt: skip


def group_norm_forward(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`group_norm` and what :func:`group_norm_backward` needs.

    Parameters
    ----------
    x, num_groups, weight, bias, eps, axis, mask, activation, residual, out
        As in :func:`group_norm`. x and residual must stay as it is until the backward.

    Returns
    -------
    y : array
        Of the shape and dtype of x.
    saved : Saved
        What backward needs; it holds x, not a copy of it.

    Raises
    ------
    TypeError, ValueError
        As in :func:`group_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> y, saved = F.group_norm_forward(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    >>> F.group_norm_backward(np.ones_like(y), saved).dx
    array([[0., 0., 0., 0.]])
    """
    array = float_array(x, "x")
    groups = check_count(num_groups, "num_groups")
    geometry = channel_geometry(array.shape, channel_axis(array, axis), ("gn",), groups)
    return normalize_and_track(
        array, geometry, None, True, 0.0, weight, bias, eps, mask, activation, residual, out
    )


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each sample over groups of neighbouring channels.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance over the C / G
    channels of a group and all axes but N.

    Parameters
    ----------
    x : array of floats, (N, C, ...)
        With ``axis=-1``, (N, ..., C).
    num_groups : int
        A divisor of C.
    weight, bias : array (C,), optional
        Scale and shift.
    eps, axis, mask, activation, residual, out
        As in :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Wu and He, "Group Normalization", arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    return group_norm_forward(
        x, num_groups, weight, bias, eps,
        axis=axis, mask=mask, activation=activation, residual=residual, out=out,
    )[0]  # fmt: skip
