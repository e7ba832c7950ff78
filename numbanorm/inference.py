"""Folding: at test time BatchNorm is linear, and becomes part of the layer before it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from numbanorm.core.checks import float_array
from numbanorm.core.types import Array


def fold_linear(weight: ArrayLike, bias: ArrayLike | None, norm: Any) -> tuple[Array, Array]:
    """Fold a BatchNorm, as it is in evaluation, into the dense layer before it.

    With s = norm.weight / sqrt(running_var + eps): weight * s for each output, and
    (bias - running_mean) * s + norm.bias.

    Parameters
    ----------
    weight : array (out, in)
        The dense layer computes ``x @ weight.T + bias``.
    bias : array (out,), optional
        None means zeros.
    norm : BatchNorm
        With running statistics of ``out`` channels; a layer of PyTorch does too.

    Returns
    -------
    weight, bias : array (out, in), array (out,)
        New arrays, in the dtype of ``weight``.

    Raises
    ------
    TypeError, ValueError
        If norm has no running statistics, or if a shape or dtype does not fit.

    References
    ----------
    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-
    Only Inference", arXiv:1712.05877, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> norm = numbanorm.BatchNorm1d(2, eps=0.0)
    >>> norm.running_var[:] = 4.0
    >>> numbanorm.fold_linear(np.ones((2, 1)), None, norm)[0]
    array([[0.5],
           [0.5]])
    """
    array = float_array(weight, "weight")
    if array.ndim != 2:
        raise ValueError(f"weight: shape (out, in) is needed, got {array.shape}")
    return _fold(array, bias, norm, transposed=False)


def fold_conv(
    weight: ArrayLike, bias: ArrayLike | None, norm: Any, *, transposed: bool = False
) -> tuple[Array, Array]:
    """Fold a BatchNorm, as it is in evaluation, into the convolution before it.

    As :func:`fold_linear`, for any number of spatial axes, groups included.

    Parameters
    ----------
    weight : array (out, in / groups, ...)
        With ``transposed`` (in, out / groups, ...), as PyTorch has it.
    bias : array (out,), optional
        None means zeros.
    norm : BatchNorm
        With running statistics of ``out`` channels; a layer of PyTorch does too.
    transposed : bool
        Whether the convolution is a transposed one.

    Returns
    -------
    weight, bias : array of the shape of weight, array (out,)
        New arrays, in the dtype of ``weight``.

    Raises
    ------
    TypeError, ValueError
        If norm has no running statistics, or if a shape or dtype does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> norm = numbanorm.BatchNorm2d(2, eps=0.0)
    >>> norm.running_mean[:] = 3.0
    >>> numbanorm.fold_conv(np.ones((2, 1, 3, 3)), None, norm)[1]
    array([-3., -3.])
    """
    array = float_array(weight, "weight")
    if array.ndim < 3:
        needed = "(in, out / groups, ...)" if transposed else "(out, in / groups, ...)"
        raise ValueError(f"weight: shape {needed} is needed, got {array.shape}")
    return _fold(array, bias, norm, transposed)


def _fold(
    weight: Array, bias: ArrayLike | None, norm: Any, transposed: bool
) -> tuple[Array, Array]:
    mean, var = (_float64(norm, name) for name in ("running_mean", "running_var"))
    if mean is None or var is None or not hasattr(norm, "num_features") or hasattr(norm, "over"):
        raise TypeError(f"norm: a BatchNorm with running statistics is needed, got {norm!r}")
    channels = mean.size
    scale = np.ones(channels) if (w := _float64(norm, "weight")) is None else w
    # As in the layer: where var + eps is 0, y is the bias.
    std = np.sqrt(var + norm.eps)
    scale = np.divide(scale, std, out=np.zeros(channels), where=std != 0)
    shift = np.zeros(channels) if (b := _float64(norm, "bias")) is None else b
    if transposed:
        # Input channels come first; each group of them makes its own output channels.
        per_group = weight.shape[1]
        groups = channels // max(per_group, 1)
        if per_group * groups != channels or weight.shape[0] % max(groups, 1):
            raise ValueError(
                f"weight: (in, {channels} / groups, ...) is needed for the {channels} channels "
                f"of norm, got {weight.shape}"
            )
        grouped = (groups, weight.shape[0] // groups, per_group, math.prod(weight.shape[2:]))
        folded = weight.reshape(grouped) * scale.reshape(groups, 1, per_group, 1)
    else:
        if weight.shape[0] != channels:
            raise ValueError(
                f"weight: {channels} outputs are needed, as norm has channels, got {weight.shape}"
            )
        folded = weight.reshape(channels, -1) * scale[:, None]
    old = np.zeros(channels) if bias is None else float_array(bias, "bias")
    if old.shape != (channels,):
        raise ValueError(f"bias: shape {(channels,)} is needed, got {old.shape}")
    return (
        folded.reshape(weight.shape).astype(weight.dtype),
        ((old - mean) * scale + shift).astype(weight.dtype),
    )


def _float64(norm: Any, name: str) -> Array | None:
    value = getattr(norm, name, None)
    if value is None:
        return None
    return np.asarray(value.detach() if hasattr(value, "detach") else value, np.float64)
