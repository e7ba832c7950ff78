"""Every method as functions of arrays, without state; ``import numbanorm.functional as F``.

Each method has three functions: ``batch_norm(...)`` returns y, ``batch_norm_forward(...)``
returns y and what backward needs, ``batch_norm_backward(dy, saved)`` returns the gradients.
They differ in nothing but the axes that they reduce.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from numbanorm.core.checks import (
    bool_mask,
    check_channel_axis,
    check_count,
    check_eps,
    check_momentum,
    check_over,
    check_shape,
    float_array,
    output_array,
    parameter,
)
from numbanorm.core.geometry import Geometry, geometry, normalize_axes
from numbanorm.core.normalize import Saved, backward, normalize
from numbanorm.core.running import track
from numbanorm.core.types import Array, Float64

__all__ = [
    "Gradients",
    "SwitchableGradients",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "switchable_norm",
    "switchable_norm_backward",
    "switchable_norm_forward",
]


class Gradients(NamedTuple):
    """Gradients of the loss; None where there is no such parameter.

    ``dx`` has the shape and dtype of x; ``dweight`` and ``dbias`` have the parameters' shape, in
    float64.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> x = np.array([[1.0, 3.0]])
    >>> y, saved = F.layer_norm_forward(x, 2, weight=np.ones(2), eps=0.0)
    >>> F.layer_norm_backward(x, saved)
    Gradients(dx=array([[0., 0.]]), dweight=array([-1.,  3.]), dbias=None)
    """

    dx: Array
    dweight: Float64 | None
    dbias: Float64 | None


class SwitchableGradients(NamedTuple):
    """Gradients of the loss; None where there is no such parameter.

    As in :class:`Gradients`; ``dmean_weight`` and ``dvar_weight`` have one value for each
    statistic.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> x = np.array([[[1.0, 3.0]], [[3.0, 5.0]]])
    >>> y, saved = F.switchable_norm_forward(x, [0.0, 0.0], [0.0, 0.0], over=("in", "bn"))
    >>> F.switchable_norm_backward(x, saved)._fields
    ('dx', 'dweight', 'dbias', 'dmean_weight', 'dvar_weight')
    """

    dx: Array
    dweight: Float64 | None
    dbias: Float64 | None
    dmean_weight: Float64
    dvar_weight: Float64


def channel_axis(x: Array, axis: int) -> int:
    """Return the channel axis of x as a number from 1 on."""
    if x.ndim < 2:
        raise ValueError(f"x: a batch axis and a channel axis are needed, got shape {x.shape}")
    (channel,) = normalize_axes(check_channel_axis(axis), x.ndim, "axis")
    return check_channel_axis(channel)


def trailing_geometry(x: Array, normalized_shape: tuple[int, ...]) -> Geometry:
    """Return the geometry of statistics over trailing axes of these sizes."""
    n = len(normalized_shape)
    if x.shape[max(x.ndim - n, 0) :] != normalized_shape:
        raise ValueError(
            f"x: a shape that ends in normalized_shape {normalized_shape} is needed, got {x.shape}"
        )
    axes = tuple(range(x.ndim - n, x.ndim))
    return geometry(x.shape, (axes,), axes)


def channel_geometry(
    x: Array,
    channel: int,
    over: tuple[str, ...],
    num_groups: int | None = None,
    by_instance: bool = False,
) -> Geometry:
    """Return the geometry of the statistics in ``over`` of an x with channels."""
    everything = range(x.ndim)
    reductions = {
        "in": tuple(a for a in everything if a not in (0, channel)),
        "ln": tuple(a for a in everything if a != 0),
        "bn": tuple(a for a in everything if a != channel),
        "gn": tuple(a for a in everything if a != 0),
    }
    return geometry(
        x.shape,
        tuple(reductions[name] for name in over),
        (channel,),
        groups=num_groups or 1 if "gn" in over else 1,
        group_axis=channel,
        grouped=tuple(name == "gn" for name in over),
        tracked=over.index("bn") if "bn" in over else 0,
        apart=(0, channel) if by_instance else (),
    )


def require_several(geometry: Geometry) -> None:
    """Raise if a group of the tracked statistic is a single value, whose variance says nothing."""
    if geometry.group_size == 1:
        raise ValueError(
            f"x: more than one value per channel is needed in training, got shape {geometry.shape}"
        )


def _running(
    running_mean: Array | None, running_var: Array | None, shape: tuple[int, ...], writeable: bool
) -> tuple[Array, Array] | None:
    """Return both running statistics, checked, or None if there is neither."""
    if running_mean is None and running_var is None:
        return None
    checked = []
    for value, name in ((running_mean, "running_mean"), (running_var, "running_var")):
        if value is None:
            raise ValueError(f"{name}: both running statistics or neither are needed, got None")
        array = parameter(value, name, shape)
        assert array is not None
        if writeable and not (isinstance(value, np.ndarray) and value.flags.writeable):
            raise ValueError(f"{name}: an array that may be updated in place is needed")
        checked.append(array)
    return checked[0], checked[1]


def _with_running(
    x: Array,
    geometry: Geometry,
    running: tuple[Array, Array] | None,
    training: bool,
    momentum: float,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    mask: ArrayLike | None,
    out: Array | None,
    mixture: Float64 | None = None,
) -> tuple[Array, Saved]:
    """Normalise with the batch's statistics and track them, or with the running ones."""
    factor = check_momentum(momentum)
    if factor is None:
        raise ValueError("momentum: a number from 0 to 1 is needed here, got None")
    counts = bool_mask(mask, x.shape)
    y, in_place = output_array(out, x)
    saved = normalize(
        x,
        y,
        geometry,
        parameter(weight, "weight", geometry.param_shape),
        parameter(bias, "bias", geometry.param_shape),
        check_eps(eps),
        fixed=None if training else running,
        mixture=mixture,
        mask=counts,
        in_place=in_place,
    )
    if training and running is not None:
        track(saved, *running, np.zeros((), np.int64), factor)
    return y, saved


def norm_backward(dy: ArrayLike, saved: Saved, *, out: Array | None = None) -> Gradients:
    """Return the gradients of a forward with respect to x, weight and bias.

    All methods but SwitchableNorm share this function. With x_hat = (x - mean) / sqrt(var + eps)
    and g = dy * weight, where means are those of the statistics' groups,
    dx = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps) (RMSNorm has no mean(g)),
    dweight = sum(dy * x_hat), dbias = sum(dy). In evaluation the statistics are constants:
    dx = g / sqrt(var + eps).

    Parameters
    ----------
    dy : array of the shape of x
        The gradient of the loss with respect to y; another float type is converted.
    saved : Saved
        The second result of the method's ``_forward``.
    out : array, optional
        Where dx is written; it may be ``dy``.

    Returns
    -------
    Gradients
        ``(dx, dweight, dbias)``, the last two in float64 and of the parameters' shape.

    Raises
    ------
    TypeError, ValueError
        If dy or out does not fit.
    RuntimeError
        If the forward wrote y over x.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> y, saved = F.layer_norm_forward(np.array([[1.0, 3.0]]), 2, np.ones(2), np.zeros(2), eps=0.0)
    >>> F.layer_norm_backward(np.array([[1.0, 2.0]]), saved).dweight
    array([-1.,  2.])
    """
    return Gradients(*backward(dy, saved, out)[:3])


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
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`batch_norm` and what :func:`batch_norm_backward` needs.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, training, momentum, eps, axis, mask, out
        As in :func:`batch_norm`. x must stay as it is until the backward.

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
    geometry = channel_geometry(array, channel_axis(array, axis), ("bn",))
    running = _running(running_mean, running_var, geometry.running_shape, training)
    if training:
        require_several(geometry)
    elif running is None:
        raise ValueError("running_mean: running statistics are needed in evaluation, got None")
    return _with_running(array, geometry, running, training, momentum, weight, bias, eps, mask, out)


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
    out: Array | None = None,
) -> Array:
    """Normalise each channel over the batch: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
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
    out : array, optional
        Where y is written; it may be ``x``.

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
        axis=axis, mask=mask, out=out,
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
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`instance_norm` and what :func:`instance_norm_backward` needs.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, axis, mask, out
        As in :func:`instance_norm`. x must stay as it is until the backward.

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
    geometry = channel_geometry(array, channel_axis(array, axis), ("in",))
    running = _running(running_mean, running_var, geometry.running_shape, use_input_stats)
    if use_input_stats:
        require_several(geometry)
    elif running is None:
        raise ValueError("running_mean: needed where use_input_stats is False, got None")
    return _with_running(
        array, geometry, running, use_input_stats, momentum, weight, bias, eps, mask, out
    )


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
    out: Array | None = None,
) -> Array:
    """Normalise each channel of each sample: the statistics span neither samples nor channels.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance over all axes
    but N and C.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        With ``axis=-1``, (N, ..., C).
    running_mean, running_var : array (C,), optional
        Averages over samples and batches; updated in place if ``use_input_stats``, else used.
    weight, bias : array (C,), optional
        Scale and shift.
    use_input_stats : bool
        Whether the statistics are those of x.
    momentum, eps, axis, mask, out
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
        axis=axis, mask=mask, out=out,
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
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`group_norm` and what :func:`group_norm_backward` needs.

    Parameters
    ----------
    x, num_groups, weight, bias, eps, axis, mask, out
        As in :func:`group_norm`. x must stay as it is until the backward.

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
    geometry = channel_geometry(array, channel_axis(array, axis), ("gn",), groups)
    return _with_running(array, geometry, None, True, 0.0, weight, bias, eps, mask, out)


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each sample over groups of neighbouring channels.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance over the C / G
    channels of a group and all axes but N.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        With ``axis=-1``, (N, ..., C).
    num_groups : int
        A divisor of C.
    weight, bias : array (C,), optional
        Scale and shift.
    eps, axis, mask, out
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
    return group_norm_forward(x, num_groups, weight, bias, eps, axis=axis, mask=mask, out=out)[0]


def layer_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`layer_norm` and what :func:`layer_norm_backward` needs.

    Parameters
    ----------
    x, normalized_shape, weight, bias, eps, mask, out
        As in :func:`layer_norm`. x must stay as it is until the backward.

    Returns
    -------
    y : array
        Of the shape and dtype of x.
    saved : Saved
        What backward needs; it holds x, not a copy of it.

    Raises
    ------
    TypeError, ValueError
        As in :func:`layer_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> y, saved = F.layer_norm_forward(np.array([[1.0, 3.0]]), 2, eps=0.0)
    >>> F.layer_norm_backward(np.ones_like(y), saved).dx
    array([[0., 0.]])
    """
    array = float_array(x, "x")
    geometry = trailing_geometry(array, check_shape(normalized_shape, "normalized_shape"))
    return _with_running(array, geometry, None, True, 0.0, weight, bias, eps, mask, out)


def layer_norm(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each sample over its trailing axes, with a weight for each element of them.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance over the axes
    of ``normalized_shape``.

    Parameters
    ----------
    x : array of float32 or float64, (..., *normalized_shape)
        Any number of axes may stand before the normalised ones.
    normalized_shape : int or sequence of int
        The sizes of the trailing axes.
    weight, bias : array of shape normalized_shape, optional
        Scale and shift.
    eps, mask, out
        As in :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    return layer_norm_forward(x, normalized_shape, weight, bias, eps, mask=mask, out=out)[0]


def rms_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`rms_norm` and what :func:`rms_norm_backward` needs.

    Parameters
    ----------
    x, normalized_shape, weight, eps, mask, out
        As in :func:`rms_norm`. x must stay as it is until the backward.

    Returns
    -------
    y : array
        Of the shape and dtype of x.
    saved : Saved
        What backward needs; it holds x, not a copy of it.

    Raises
    ------
    TypeError, ValueError
        As in :func:`rms_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> y, saved = F.rms_norm_forward(np.array([[3.0, 3.0]]), 2, eps=0.0)
    >>> F.rms_norm_backward(y, saved).dx
    array([[0., 0.]])
    """
    array = float_array(x, "x")
    geometry = trailing_geometry(array, check_shape(normalized_shape, "normalized_shape"))
    counts = bool_mask(mask, array.shape)
    y, in_place = output_array(out, array)
    return y, normalize(
        array,
        y,
        geometry,
        parameter(weight, "weight", geometry.param_shape),
        None,
        None if eps is None else check_eps(eps),
        center=False,
        mask=counts,
        in_place=in_place,
    )


def rms_norm(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Divide each sample by its root mean square: y = x / sqrt(mean(x**2) + eps) * weight.

    Parameters
    ----------
    x : array of float32 or float64, (..., *normalized_shape)
        Any number of axes may stand before the normalised ones.
    normalized_shape : int or sequence of int
        The sizes of the trailing axes.
    weight : array of shape normalized_shape, optional
        Scale.
    eps : float, optional
        By default the machine epsilon of x's type, as in PyTorch.
    mask, out
        As in :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> F.rms_norm(np.array([[3.0, 3.0, -3.0]]), 3, eps=0.0)
    array([[ 1.,  1., -1.]])
    """
    return rms_norm_forward(x, normalized_shape, weight, eps, mask=mask, out=out)[0]


def mix(mean_weight: ArrayLike, var_weight: ArrayLike, n: int) -> Float64:
    """Return the softmax weights of ``n`` statistics from their logits."""
    # Imported here, since it takes four times as long as all the rest of the library.
    from scipy.special import softmax

    logits = [
        parameter(value, name, (n,))
        for value, name in ((mean_weight, "mean_weight"), (var_weight, "var_weight"))
    ]
    # At once: a call takes longer than a small kernel.
    mixture: Float64 = softmax(np.array(logits, np.float64), axis=1)
    return mixture


def switchable_norm_forward(
    x: ArrayLike,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    over: Iterable[str] = ("in", "ln", "bn"),
    num_groups: int | None = None,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`switchable_norm` and what :func:`switchable_norm_backward` needs.

    Parameters
    ----------
    x, mean_weight, var_weight, weight, bias, running_mean, running_var
        As in :func:`switchable_norm`. x must stay as it is until the backward.
    training, momentum, eps, over, num_groups, axis, mask, out
        As in :func:`switchable_norm`.

    Returns
    -------
    y : array
        Of the shape and dtype of x.
    saved : Saved
        What backward needs; it holds x, not a copy of it.

    Raises
    ------
    TypeError, ValueError
        As in :func:`switchable_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> x = np.array([[[1.0, 3.0]], [[3.0, 5.0]]])
    >>> y, saved = F.switchable_norm_forward(x, [0.0, 0.0], [0.0, 0.0], over=("in", "bn"))
    >>> F.switchable_norm_backward(np.ones_like(x), saved).dmean_weight
    array([0., 0.])
    """
    array = float_array(x, "x")
    names = check_over(over, num_groups)
    geometry = channel_geometry(array, channel_axis(array, axis), names, num_groups)
    running = _running(running_mean, running_var, geometry.running_shape, training)
    if running is not None and "bn" not in names:
        raise ValueError(f"running_mean: it goes with 'bn' in over, got over={names!r}")
    if running is None and "bn" in names and not training:
        raise ValueError("running_mean: 'bn' needs running statistics in evaluation, got None")
    return _with_running(
        array, geometry, running, training, momentum, weight, bias, eps, mask, out,
        mix(mean_weight, var_weight, len(names)),
    )  # fmt: skip


def switchable_norm(
    x: ArrayLike,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    over: Iterable[str] = ("in", "ln", "bn"),
    num_groups: int | None = None,
    axis: int = 1,
    mask: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise with learned mixtures of instance, layer, batch and group statistics.

    mean = sum of softmax(mean_weight)[k] * mean_k and var = sum of softmax(var_weight)[k] * var_k
    over the statistics k; y = (x - mean) / sqrt(var + eps) * weight + bias.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        With ``axis=-1``, (N, ..., C).
    mean_weight, var_weight : array (K,)
        A logit for each statistic, in the order of ``over``.
    weight, bias : array (C,), optional
        Scale and shift.
    running_mean, running_var : array (C,), optional
        Averages of the batch statistics; updated in place in training, used in evaluation.
    training, momentum, eps, axis, mask, out
        As in :func:`batch_norm`.
    over : sequence of str
        Any choice of "in", "ln", "bn" and "gn", in any order.
    num_groups : int, optional
        The number of groups for "gn", a divisor of C; needed only there.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Luo, Ren, Peng, Zhang, Li, "Differentiable Learning-to-Normalize via Switchable
    Normalization", arXiv:1806.10779.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> x = np.array([[[1.0, 3.0]], [[3.0, 5.0]]])
    >>> F.switchable_norm(x, [0.0, 0.0], [0.0, 0.0], over=("in", "ln"), eps=0.0)[:, 0]
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    return switchable_norm_forward(
        x, mean_weight, var_weight, weight, bias, running_mean, running_var, training, momentum,
        eps, over=over, num_groups=num_groups, axis=axis, mask=mask, out=out,
    )[0]  # fmt: skip


def switchable_norm_backward(
    dy: ArrayLike, saved: Saved, *, out: Array | None = None
) -> SwitchableGradients:
    """Return the gradients of :func:`switchable_norm_forward`.

    Parameters
    ----------
    dy, saved, out
        As in :func:`batch_norm_backward`.

    Returns
    -------
    SwitchableGradients
        ``(dx, dweight, dbias, dmean_weight, dvar_weight)``, all but dx in float64.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in :func:`batch_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> x = np.array([[[1.0, 3.0]], [[3.0, 5.0]]])
    >>> y, saved = F.switchable_norm_forward(x, [0.0, 0.0], [0.0, 0.0], over=("in", "bn"))
    >>> F.switchable_norm_backward(np.ones_like(x), saved).dmean_weight.round(4)
    array([0., 0.])
    """
    dx, dweight, dbias, dmean_weight, dvar_weight = backward(dy, saved, out)
    assert dmean_weight is not None and dvar_weight is not None
    return SwitchableGradients(dx, dweight, dbias, dmean_weight, dvar_weight)


batch_norm_backward = norm_backward
layer_norm_backward = norm_backward
instance_norm_backward = norm_backward
group_norm_backward = norm_backward
rms_norm_backward = norm_backward
