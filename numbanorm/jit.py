"""The methods as functions that code which Numba compiles may call; outside it they are ordinary.

>>> import numpy as np
>>> from numba import njit
>>> from numbanorm.jit import layer_norm
>>> @njit
... def spread(x, weight, bias):
...     y, mean, rstd = layer_norm(x, weight, bias, 1e-5)
...     return y.max() - y.min()
>>> float(round(spread(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2)), 3))
2.0

Numbers are those of :mod:`numbanorm.functional`, to the last bit. ``@njit`` with ``cache=True``,
with ``parallel=True`` and with any other option will do. In a ``prange``, and in a function with
``nogil=True``, a call runs on the thread that makes it; elsewhere on several, as a layer does.

In all functions weight and bias are arrays, or None. A backward takes what its forward was called
with, but for bias and eps, and what that found; without a weight there are no gradients but dx, so
that a layer with a bias alone has a weight of ones. Arrays of statistics, and gradients of
parameters, are float64; y and dx have the type of x, and are C-contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from numbanorm import functional
from numbanorm.core.checks import check_count, float_array, parameter
from numbanorm.core.geometry import Geometry
from numbanorm.core.layouts import Saved, Statistic
from numbanorm.core.normalize import find_recipe, restore
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.methods import channel_axis, channel_geometry, trailing_geometry
from numbanorm.moments import moments as moments_over
from numbanorm.numba_ext.from_njit import from_njit

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "moments",
    "rms_norm",
    "rms_norm_backward",
]

# -- Types of results, for Numba -------------------------------------------------------------------


def _like(x: Any) -> Any:
    return types.Array(x.dtype, x.ndim, "C")


def _float64(ndim: int) -> Any:
    return types.Array(types.float64, max(ndim, 0), "C")


def _forward_of(x: Any, *ndims: int) -> Any:
    """Return the type of y and of statistics of so many axes."""
    return types.Tuple((_like(x), *map(_float64, ndims)))


def _gradients_of(x: Any, weight: Any, n_parameters: int = 2) -> Any:
    """Return the type of dx and of the gradients of parameters."""
    of_parameter = types.none if isinstance(weight, types.NoneType) else _float64(1)
    if isinstance(weight, types.Optional):  # which of the two is known when it runs
        of_parameter = types.Optional(of_parameter)
    return types.Tuple((_like(x), *[of_parameter] * n_parameters))


# -- Statistics, and back --------------------------------------------------------------------------


@np.errstate(all="ignore")  # NaN and Inf are the user's
def _statistics(saved: Saved, shape: Axes) -> tuple[Float64, Float64, Float64]:
    """Return mean, variance and rstd in one shape."""
    found = saved.batch
    mean, var = (np.ascontiguousarray(a).reshape(shape) for a in (found.mean, found.var))
    rstd = np.asarray(1.0 / np.sqrt(var + saved.mode.eps))
    # As kernels do: 0 for an empty group, or where var + eps is 0.
    rstd[np.isinf(rstd) if saved.layout.geometry.group_size else ...] = 0.0
    return mean, var, rstd


@np.errstate(all="ignore")
def _var_of(rstd: Float64) -> Float64:
    """Return the variance, with eps in it, of which 1 / sqrt is rstd to the last bit."""
    var = np.square(1.0 / rstd)
    for _ in range(8):  # rounded three times, it is a few units in the last place away
        found = 1.0 / np.sqrt(var)
        larger, smaller = found > rstd, found < rstd
        if not (larger | smaller).any():
            break
        var = np.where(larger, np.nextafter(var, np.inf), var)
        var = np.where(smaller, np.nextafter(var, 0.0), var)
    return np.where(rstd == 0.0, 0.0, var)


def _differentiate(
    dy: Array,
    x: Array,
    geometry: Geometry,
    weight: Array | None,
    mean: Array | None,
    rstd: Array,
    shape: Axes,
) -> tuple[Array, Float64 | None, Float64 | None]:
    """Return dx, dweight and dbias; mean and rstd are of this shape, and without a mean it is 0."""
    root, center = parameter(rstd, "rstd", shape), parameter(mean, "mean", shape)
    assert root is not None
    grid = geometry.kept_sizes(geometry.reductions[0])
    var = _var_of(root.astype(np.float64)).reshape(grid)
    statistic = Statistic(
        geometry.reductions[0],
        np.array([geometry.group_size]),
        np.zeros(grid) if center is None else center.astype(np.float64).reshape(grid),
        var,
    )
    weight = parameter(weight, "weight", geometry.param_shape)
    x = np.ascontiguousarray(x)  # in the order of dx, as it was in that of y
    has_weight = weight is not None
    recipe = find_recipe(
        x, x, geometry, 0.0, has_weight=has_weight, has_bias=has_weight, center=center is not None
    )
    saved = restore(x, recipe, weight, None, [statistic])
    gradients = functional.layer_norm_backward(dy, saved)  # that of all methods
    return gradients.dx, gradients.dweight, gradients.dbias


def _rows(x: Array) -> Geometry:
    if x.ndim == 0:
        raise ValueError("x: at least one axis is needed, got a single number")
    return trailing_geometry(x.shape, x.shape[-1:])


def _channels(x: Array, over: str, num_groups: int | None = None) -> Geometry:
    return channel_geometry(x.shape, channel_axis(x, 1), (over,), num_groups)


# -- Rows ------------------------------------------------------------------------------------------


@from_njit(lambda x, weight, bias, eps: _forward_of(x, x.ndim - 1, x.ndim - 1))
def layer_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Float64, Float64]:
    """Normalise over the last axis: y = (x - mean) * rstd * weight + bias.

    Parameters
    ----------
    x : array of float32 or float64, (..., D)
        Any number of axes may stand before the normalised one.
    weight, bias : array (D,) or None
        Scale and shift.
    eps : float
        Added to the variance: rstd = 1 / sqrt(var + eps).

    Returns
    -------
    y : array of the shape of x
        See :func:`numbanorm.functional.layer_norm`.
    mean, rstd : array of float64, (...)
        What :func:`layer_norm_backward` takes.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import layer_norm
    >>> layer_norm(np.array([[1.0, 3.0]]), None, None, 0.0)
    (array([[-1.,  1.]]), array([2.]), array([1.]))
    """
    x = float_array(x, "x")
    shape = _rows(x).param_shape
    y, saved = functional.layer_norm_forward(x, shape, weight, bias, eps)
    mean, _, rstd = _statistics(saved, x.shape[:-1])
    return y, mean, rstd


@from_njit(lambda dy, x, weight, mean, rstd: _gradients_of(x, weight))
def layer_norm_backward(
    dy: Array, x: Array, weight: Array | None, mean: Array, rstd: Array
) -> tuple[Array, Float64 | None, Float64 | None]:
    """Return the gradients of :func:`layer_norm`.

    Parameters
    ----------
    dy : array of the shape of x
        The gradient of the loss with respect to y.
    x, weight
        As in the forward.
    mean, rstd : array (...)
        What the forward returned.

    Returns
    -------
    dx : array of the shape and type of x
        See :func:`numbanorm.functional.layer_norm_backward`.
    dweight, dbias : array of float64, (D,)
        None if there is no weight.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import layer_norm, layer_norm_backward
    >>> x, weight = np.array([[1.0, 3.0]]), np.ones(2)
    >>> y, mean, rstd = layer_norm(x, weight, None, 0.0)
    >>> layer_norm_backward(x, x, weight, mean, rstd)
    (array([[0., 0.]]), array([-1.,  3.]), array([1., 3.]))
    """
    x = float_array(x, "x")
    return _differentiate(dy, x, _rows(x), weight, mean, rstd, x.shape[:-1])


@from_njit(lambda x, weight, eps: _forward_of(x, x.ndim - 1))
def rms_norm(x: Array, weight: Array | None, eps: float | None) -> tuple[Array, Float64]:
    """Divide by the root mean square over the last axis: y = x * rstd * weight.

    Parameters
    ----------
    x : array of float32 or float64, (..., D)
        Any number of axes may stand before the normalised one.
    weight : array (D,) or None
        Scale.
    eps : float or None
        Added to the mean square: rstd = 1 / sqrt(mean(x**2) + eps). None is the machine epsilon of
        x's type.

    Returns
    -------
    y : array of the shape of x
        See :func:`numbanorm.functional.rms_norm`.
    rstd : array of float64, (...)
        What :func:`rms_norm_backward` takes.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import rms_norm
    >>> rms_norm(np.array([[2.0, -2.0]]), None, 0.0)
    (array([[ 1., -1.]]), array([0.5]))
    """
    x = float_array(x, "x")
    y, saved = functional.rms_norm_forward(x, _rows(x).param_shape, weight, eps)
    return y, _statistics(saved, x.shape[:-1])[2]


@from_njit(lambda dy, x, weight, rstd: _gradients_of(x, weight, 1))
def rms_norm_backward(
    dy: Array, x: Array, weight: Array | None, rstd: Array
) -> tuple[Array, Float64 | None]:
    """Return the gradients of :func:`rms_norm`.

    Parameters
    ----------
    dy : array of the shape of x
        The gradient of the loss with respect to y.
    x, weight
        As in the forward.
    rstd : array (...)
        What the forward returned.

    Returns
    -------
    dx : array of the shape and type of x
        See :func:`numbanorm.functional.rms_norm_backward`.
    dweight : array of float64, (D,)
        None if there is no weight.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import rms_norm, rms_norm_backward
    >>> x, weight = np.array([[2.0, -2.0]]), np.ones(2)
    >>> y, rstd = rms_norm(x, weight, 0.0)
    >>> rms_norm_backward(x, x, weight, rstd)
    (array([[0., 0.]]), array([2., 2.]))
    """
    x = float_array(x, "x")
    dx, dweight, _ = _differentiate(dy, x, _rows(x), weight, None, rstd, x.shape[:-1])
    return dx, dweight


# -- Channels --------------------------------------------------------------------------------------


@from_njit(lambda x, weight, bias, eps: _forward_of(x, 1, 1, 1))
def batch_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Float64, Float64, Float64]:
    """Normalise each channel over the batch: y = (x - mean) * rstd * weight + bias.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        N samples of C channels.
    weight, bias : array (C,) or None
        Scale and shift.
    eps : float
        Added to the variance: rstd = 1 / sqrt(var + eps).

    Returns
    -------
    y : array of the shape of x
        See :func:`numbanorm.functional.batch_norm` with ``training=True``.
    mean, var, rstd : array of float64, (C,)
        The biased variance. :func:`batch_norm_backward` takes mean and rstd; running statistics
        move towards mean and n / (n - 1) * var.

    Raises
    ------
    ValueError
        If a shape does not fit, or if there is a single value per channel.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import batch_norm
    >>> y, mean, var, rstd = batch_norm(np.array([[1.0, 5.0], [3.0, 9.0]]), None, None, 0.0)
    >>> mean, var, rstd
    (array([2., 7.]), array([1., 4.]), array([1. , 0.5]))
    """
    y, saved = functional.batch_norm_forward(x, None, None, weight, bias, True, eps=eps)
    return y, *_statistics(saved, y.shape[1:2])


@from_njit(lambda dy, x, weight, mean, rstd: _gradients_of(x, weight))
def batch_norm_backward(
    dy: Array, x: Array, weight: Array | None, mean: Array, rstd: Array
) -> tuple[Array, Float64 | None, Float64 | None]:
    """Return the gradients of :func:`batch_norm`.

    Parameters
    ----------
    dy : array of the shape of x
        The gradient of the loss with respect to y.
    x, weight
        As in the forward.
    mean, rstd : array (C,)
        What the forward returned.

    Returns
    -------
    dx : array of the shape and type of x
        See :func:`numbanorm.functional.batch_norm_backward`.
    dweight, dbias : array of float64, (C,)
        None if there is no weight.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import batch_norm, batch_norm_backward
    >>> x, weight = np.array([[1.0], [3.0]]), np.ones(1)
    >>> y, mean, var, rstd = batch_norm(x, weight, None, 0.0)
    >>> dx, dweight, dbias = batch_norm_backward(x, x, weight, mean, rstd)
    >>> dweight, dbias
    (array([2.]), array([4.]))
    """
    x = float_array(x, "x")
    return _differentiate(dy, x, _channels(x, "bn"), weight, mean, rstd, x.shape[1:2])


@from_njit(lambda x, weight, bias, running_mean, running_var, eps: _like(x))
def batch_norm_inference(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array,
    running_var: Array,
    eps: float,
) -> Array:
    """Normalise each channel with given statistics, as in evaluation.

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        N samples of C channels.
    weight, bias : array (C,) or None
        Scale and shift.
    running_mean, running_var : array (C,)
        They are left as they are.
    eps : float
        Added to the variance.

    Returns
    -------
    array of the shape of x
        See :func:`numbanorm.functional.batch_norm`.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import batch_norm_inference
    >>> batch_norm_inference(np.array([[5.0]]), None, None, np.array([1.0]), np.array([4.0]), 0.0)
    array([[2.]])
    """
    return functional.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)


@from_njit(lambda x, num_groups, weight, bias, eps: _forward_of(x, 2, 2))
def group_norm(
    x: Array, num_groups: int, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Float64, Float64]:
    """Normalise each sample over groups of channels: y = (x - mean) * rstd * weight + bias.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        N samples of C channels.
    num_groups : int
        G, a divisor of C.
    weight, bias : array (C,) or None
        Scale and shift.
    eps : float
        Added to the variance: rstd = 1 / sqrt(var + eps).

    Returns
    -------
    y : array of the shape of x
        See :func:`numbanorm.functional.group_norm`.
    mean, rstd : array of float64, (N, G)
        What :func:`group_norm_backward` takes.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import group_norm
    >>> group_norm(np.array([[1.0, 3.0, 10.0, 14.0]]), 2, None, None, 0.0)
    (array([[-1.,  1., -1.,  1.]]), array([[ 2., 12.]]), array([[1. , 0.5]]))
    """
    y, saved = functional.group_norm_forward(x, num_groups, weight, bias, eps)
    mean, _, rstd = _statistics(saved, (y.shape[0], num_groups))
    return y, mean, rstd


@from_njit(lambda dy, x, num_groups, weight, mean, rstd: _gradients_of(x, weight))
def group_norm_backward(
    dy: Array, x: Array, num_groups: int, weight: Array | None, mean: Array, rstd: Array
) -> tuple[Array, Float64 | None, Float64 | None]:
    """Return the gradients of :func:`group_norm`.

    Parameters
    ----------
    dy : array of the shape of x
        The gradient of the loss with respect to y.
    x, num_groups, weight
        As in the forward.
    mean, rstd : array (N, G)
        What the forward returned.

    Returns
    -------
    dx : array of the shape and type of x
        See :func:`numbanorm.functional.group_norm_backward`.
    dweight, dbias : array of float64, (C,)
        None if there is no weight.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import group_norm, group_norm_backward
    >>> x, weight = np.array([[1.0, 3.0, 10.0, 14.0]]), np.ones(4)
    >>> y, mean, rstd = group_norm(x, 2, weight, None, 0.0)
    >>> group_norm_backward(x, x, 2, weight, mean, rstd)[2]
    array([ 1.,  3., 10., 14.])
    """
    x = float_array(x, "x")
    geometry = _channels(x, "gn", check_count(num_groups, "num_groups"))
    return _differentiate(dy, x, geometry, weight, mean, rstd, (x.shape[0], num_groups))


@from_njit(lambda x, weight, bias, eps: _forward_of(x, 2, 2))
def instance_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Float64, Float64]:
    """Normalise each channel of each sample: y = (x - mean) * rstd * weight + bias.

    Parameters
    ----------
    x : array of float32 or float64, (N, C, ...)
        N samples of C channels.
    weight, bias : array (C,) or None
        Scale and shift.
    eps : float
        Added to the variance: rstd = 1 / sqrt(var + eps).

    Returns
    -------
    y : array of the shape of x
        See :func:`numbanorm.functional.instance_norm`.
    mean, rstd : array of float64, (N, C)
        What :func:`instance_norm_backward` takes.

    Raises
    ------
    ValueError
        If a shape does not fit, or if an instance is a single value.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import instance_norm
    >>> y, mean, rstd = instance_norm(np.array([[[1.0, 3.0], [10.0, 14.0]]]), None, None, 0.0)
    >>> mean, rstd
    (array([[ 2., 12.]]), array([[1. , 0.5]]))
    """
    y, saved = functional.instance_norm_forward(x, None, None, weight, bias, eps=eps)
    mean, _, rstd = _statistics(saved, y.shape[:2])
    return y, mean, rstd


@from_njit(lambda dy, x, weight, mean, rstd: _gradients_of(x, weight))
def instance_norm_backward(
    dy: Array, x: Array, weight: Array | None, mean: Array, rstd: Array
) -> tuple[Array, Float64 | None, Float64 | None]:
    """Return the gradients of :func:`instance_norm`.

    Parameters
    ----------
    dy : array of the shape of x
        The gradient of the loss with respect to y.
    x, weight
        As in the forward.
    mean, rstd : array (N, C)
        What the forward returned.

    Returns
    -------
    dx : array of the shape and type of x
        See :func:`numbanorm.functional.instance_norm_backward`.
    dweight, dbias : array of float64, (C,)
        None if there is no weight.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import instance_norm, instance_norm_backward
    >>> x, weight = np.array([[[1.0, 3.0], [10.0, 14.0]]]), np.ones(2)
    >>> y, mean, rstd = instance_norm(x, weight, None, 0.0)
    >>> instance_norm_backward(x, x, weight, mean, rstd)[2]
    array([ 4., 24.])
    """
    x = float_array(x, "x")
    return _differentiate(dy, x, _channels(x, "in"), weight, mean, rstd, x.shape[:2])


# -- Moments ---------------------------------------------------------------------------------------


@from_njit(lambda x: types.Tuple((types.int64, _float64(x.ndim - 1), _float64(x.ndim - 1))))
def moments(x: Array) -> tuple[int, Float64, Float64]:
    """Take count, mean and second central moment over the first axis, in one pass.

    Parameters
    ----------
    x : array of float32 or float64, (N, ...)
        N observations.

    Returns
    -------
    count : int
        N.
    mean, m2 : array of float64, (...)
        m2 is the sum of squared deviations; see :func:`numbanorm.moments`.

    Raises
    ------
    ValueError
        If x has no axis.

    Examples
    --------
    >>> import numpy as np
    >>> from numbanorm.jit import moments
    >>> moments(np.array([[1.0, 5.0], [3.0, 9.0]]))
    (2, array([2., 7.]), array([2., 8.]))
    """
    found = moments_over(x, 0)
    assert isinstance(found.count, int)
    return found.count, found.mean, found.m2
