"""LayerNorm and RMSNorm over trailing axes."""

from __future__ import annotations

from collections.abc import Iterable

from numpy.typing import ArrayLike

from numbanorm.core.checks import ActivationLike, check_shape, float_array
from numbanorm.core.layouts import Saved
from numbanorm.core.types import Array
from numbanorm.functional.common import normalize_and_track
from numbanorm.methods import trailing_geometry


def layer_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`layer_norm` and what :func:`layer_norm_backward` needs.

    Parameters
    ----------
    x, normalized_shape, weight, bias, eps, mask, activation, residual, out
        As in :func:`layer_norm`. x and residual must stay as it is until the backward.

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
    geometry = trailing_geometry(array.shape, check_shape(normalized_shape, "normalized_shape"))
    return normalize_and_track(
        array, geometry, None, True, 0.0, weight, bias, eps, mask, activation, residual, out
    )


def layer_norm(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise each sample over its trailing axes, with a weight for each element of them.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and biased variance over the axes
    of ``normalized_shape``.

    Parameters
    ----------
    x : array of floats, ``(..., *normalized_shape)``
        Any number of axes may stand before the normalised ones.
    normalized_shape : int or sequence of int
        The sizes of the trailing axes.
    weight, bias : array of shape normalized_shape, optional
        Scale and shift.
    eps, mask, activation, residual, out
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
    return layer_norm_forward(
        x, normalized_shape, weight, bias, eps, mask=mask,
        activation=activation, residual=residual, out=out,
    )[0]  # fmt: skip


def rms_norm_forward(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`rms_norm` and what :func:`rms_norm_backward` needs.

    Parameters
    ----------
    x, normalized_shape, weight, eps, mask, activation, residual, out
        As in :func:`rms_norm`. x and residual must stay as it is until the backward.

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
    geometry = trailing_geometry(array.shape, check_shape(normalized_shape, "normalized_shape"))
    return normalize_and_track(
        array, geometry, None, True, 0.0, weight, None, eps, mask, activation, residual, out,
        center=False,
    )  # fmt: skip


def rms_norm(
    x: ArrayLike,
    normalized_shape: int | Iterable[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    mask: ArrayLike | None = None,
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Divide each sample by its root mean square: y = x / sqrt(mean(x**2) + eps) * weight.

    Parameters
    ----------
    x : array of floats, ``(..., *normalized_shape)``
        Any number of axes may stand before the normalised ones.
    normalized_shape : int or sequence of int
        The sizes of the trailing axes.
    weight : array of shape normalized_shape, optional
        Scale.
    eps : float, optional
        By default the machine epsilon of x's type, as in PyTorch.
    mask, activation, residual, out
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
    return rms_norm_forward(
        x, normalized_shape, weight, eps,
        mask=mask, activation=activation, residual=residual, out=out,
    )[0]  # fmt: skip
