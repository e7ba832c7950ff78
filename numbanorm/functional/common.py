"""What all methods share: gradients, checks of running statistics, and the one backward."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from numbanorm.core.checks import (
    ActivationLike,
    bool_mask,
    check_activation,
    check_eps,
    check_momentum,
    like_x,
    others,
    output_array,
    parameter,
)
from numbanorm.core.extremes import normalize
from numbanorm.core.geometry import Geometry
from numbanorm.core.layouts import Saved
from numbanorm.core.normalize import backward, find_recipe
from numbanorm.core.running import track
from numbanorm.core.types import Array, Float64


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


class GradientsWithResidual(NamedTuple):
    """:class:`Gradients` after a forward with a residual, whose gradient comes last.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> x = np.array([[1.0, 3.0]])
    >>> y, saved = F.layer_norm_forward(x, 2, eps=0.0, activation="relu", residual=x)
    >>> F.layer_norm_backward(x, saved).dresidual
    array([[0., 3.]])
    """

    dx: Array
    dweight: Float64 | None
    dbias: Float64 | None
    dresidual: Array


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


class SwitchableGradientsWithResidual(NamedTuple):
    """:class:`SwitchableGradients` after a forward with a residual, whose gradient comes last.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> x = np.array([[[1.0, 3.0]], [[3.0, 5.0]]])
    >>> y, saved = F.switchable_norm_forward(x, [0.0], [0.0], over=("in",), residual=x)
    >>> F.switchable_norm_backward(x, saved).dresidual[0]
    array([[1., 3.]])
    """

    dx: Array
    dweight: Float64 | None
    dbias: Float64 | None
    dmean_weight: Float64
    dvar_weight: Float64
    dresidual: Array


def running_pair(
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


def normalize_and_track(
    x: Array,
    geometry: Geometry,
    running: tuple[Array, Array] | None,
    training: bool,
    momentum: float,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float | None,
    mask: ArrayLike | None,
    activation: ActivationLike,
    residual: ArrayLike | None,
    out: Array | None,
    mixture: Float64 | None = None,
    center: bool = True,
) -> tuple[Array, Saved]:
    """Normalise with the batch's statistics and track them, or with the running ones."""
    factor = check_momentum(momentum)
    if factor is None:
        raise ValueError("momentum: a number from 0 to 1 is needed here, got None")
    counts, added = bool_mask(mask, x.shape), like_x(residual, "residual", x)
    y, in_place = output_array(out, x, *others(added))
    scale = parameter(weight, "weight", geometry.param_shape)
    shift = parameter(bias, "bias", geometry.param_shape)
    given = None if training else running
    # RMSNorm's may be None.
    added_to_var = eps if eps is None and not center else check_eps(eps)
    recipe = find_recipe(
        x,
        y,
        geometry,
        added_to_var,
        has_weight=scale is not None,
        has_bias=shift is not None,
        masked=counts is not None,
        use_batch_stats=given is None,
        center=center,
        activation=check_activation(activation),
    )
    saved = normalize(
        x, y, recipe, scale, shift,
        running=given, mixture=mixture, mask=counts, residual=added, in_place=in_place,
    )  # fmt: skip
    if training and running is not None:
        track(saved, *running, factor)
    return y, saved


def norm_backward(
    dy: ArrayLike, saved: Saved, *, out: Array | None = None, out_residual: Array | None = None
) -> Gradients | GradientsWithResidual:
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
    out, out_residual : array, optional
        Where dx and the residual's gradient are written; one of them may be ``dy``.

    Returns
    -------
    Gradients
        ``(dx, dweight, dbias)``, the last two in float64 and of the parameters' shape; after a
        forward with a residual ``dresidual`` comes last.

    Raises
    ------
    TypeError, ValueError
        If dy or out does not fit.
    RuntimeError
        If the forward wrote y over x or the residual.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm.functional as F
    >>> y, saved = F.layer_norm_forward(np.array([[1.0, 3.0]]), 2, np.ones(2), np.zeros(2), eps=0.0)
    >>> F.layer_norm_backward(np.array([[1.0, 2.0]]), saved).dweight
    array([-1.,  2.])
    """
    dx, dresidual, gradients = backward(dy, saved, out, out_residual)
    if dresidual is None:
        return Gradients(dx, gradients.weight, gradients.bias)
    return GradientsWithResidual(dx, gradients.weight, gradients.bias, dresidual)
