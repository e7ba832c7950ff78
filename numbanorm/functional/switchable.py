"""SwitchableNorm: learned mixtures of statistics."""

from __future__ import annotations

from collections.abc import Iterable

from numpy.typing import ArrayLike

from numbanorm.core.checks import (
    ActivationLike,
    as_array,
    check_over,
    float_array,
    parameter,
)
from numbanorm.core.layouts import Saved
from numbanorm.core.normalize import backward
from numbanorm.core.types import Array
from numbanorm.functional.common import (
    SwitchableGradients,
    SwitchableGradientsWithResidual,
    normalize_and_track,
    running_pair,
)
from numbanorm.methods import channel_axis, channel_geometry, mix


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
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Return y of :func:`switchable_norm` and what :func:`switchable_norm_backward` needs.

    Parameters
    ----------
    x, mean_weight, var_weight, weight, bias, running_mean, running_var
        As in :func:`switchable_norm`. x and residual must stay as it is until the backward.
    training, momentum, eps, over, num_groups, axis, mask, activation, residual, out
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
    geometry = channel_geometry(array.shape, channel_axis(array, axis), names, num_groups)
    running = running_pair(running_mean, running_var, geometry.running_shape, training)
    if running is not None and "bn" not in names:
        raise ValueError(f"running_mean: it goes with 'bn' in over, got over={names!r}")
    if running is None and "bn" in names and not training:
        raise ValueError("running_mean: 'bn' needs running statistics in evaluation, got None")
    n = len(names)
    mixture = mix(_logits(mean_weight, "mean_weight", n), _logits(var_weight, "var_weight", n))
    return normalize_and_track(
        array, geometry, running, training, momentum, weight, bias, eps, mask,
        activation, residual, out, mixture,
    )  # fmt: skip


def _logits(value: ArrayLike, name: str, n: int) -> Array:
    """Return the logits of n statistics."""
    logits = parameter(as_array(value, name), name, (n,))
    assert logits is not None
    return logits


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
    activation: ActivationLike = None,
    residual: ArrayLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise with learned mixtures of instance, layer, batch and group statistics.

    mean = sum of softmax(mean_weight)[k] * mean_k and var = sum of softmax(var_weight)[k] * var_k
    over the statistics k; y = (x - mean) / sqrt(var + eps) * weight + bias.

    Parameters
    ----------
    x : array of floats, (N, C, ...)
        With ``axis=-1``, (N, ..., C).
    mean_weight, var_weight : array (K,)
        A logit for each statistic, in the order of ``over``.
    weight, bias : array (C,), optional
        Scale and shift.
    running_mean, running_var : array (C,), optional
        Averages of the batch statistics; updated in place in training, used in evaluation.
    training, momentum, eps, axis, mask, activation, residual, out
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
        eps, over=over, num_groups=num_groups, axis=axis, mask=mask, activation=activation,
        residual=residual, out=out,
    )[0]  # fmt: skip


def switchable_norm_backward(
    dy: ArrayLike, saved: Saved, *, out: Array | None = None, out_residual: Array | None = None
) -> SwitchableGradients | SwitchableGradientsWithResidual:
    """Return the gradients of :func:`switchable_norm_forward`.

    Parameters
    ----------
    dy, saved, out, out_residual
        As in :func:`batch_norm_backward`.

    Returns
    -------
    SwitchableGradients
        ``(dx, dweight, dbias, dmean_weight, dvar_weight)``, all but dx in float64; after a forward
        with a residual ``dresidual`` comes last.

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
    dx, dresidual, gradients = backward(dy, saved, out, out_residual)
    dweight, dbias, dmean_weight, dvar_weight = gradients
    assert dmean_weight is not None and dvar_weight is not None
    all_five = dx, dweight, dbias, dmean_weight, dvar_weight
    if dresidual is None:
        return SwitchableGradients(*all_five)
    return SwitchableGradientsWithResidual(*all_five, dresidual)
