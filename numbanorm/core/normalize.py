"""The one forward and the one backward of all methods.

A :class:`~numbanorm.core.geometry.Geometry` says over which axes. A layout, which is asked for
once, says how the kernels see x, and runs them: :mod:`numbanorm.core.layouts`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from numbanorm.core.checks import empty_array, float_array, output_array
from numbanorm.core.exchange import Exchange
from numbanorm.core.geometry import Geometry, memory_order
from numbanorm.core.layouts import (
    Instances,
    Job,
    Layout,
    Recipe,
    Saved,
    Statistic,
    Statistics,
    find_layout,
    finish_target,
)
from numbanorm.core.types import Array, Float64, arithmetic
from numbanorm.kernels.activations import Activation
from numbanorm.kernels.modes import Mode
from numbanorm.numba_ext.lines import LINE

# A residual alone.
NO_ACTIVATION = Activation()


class ParameterGradients(NamedTuple):
    """Gradients of weight, bias, and the logits of means and variances, or None.

    They are float64, but for weight and bias as large as x, see ``gradient_dtype`` of a recipe.
    """

    weight: Array | None
    bias: Array | None
    mean_weight: Float64 | None
    var_weight: Float64 | None


def find_recipe(
    x: Array,
    y: Array,
    geometry: Geometry,
    eps: float | None,
    *,
    has_weight: bool = False,
    has_bias: bool = False,
    masked: bool = False,
    use_batch_stats: bool = True,
    center: bool = True,
    sample_variance: bool = False,
    activation: Activation | None = None,
    exchange: Exchange | None = None,
    gradient_dtype: Any = np.float64,
) -> Recipe:
    """Return how all x with the shape, the type and the order in memory of this one are normalised.

    Parameters
    ----------
    x, y : array of float32, float64 or a float of 16 bits
        As ``float_array`` and ``output_array`` of :mod:`numbanorm.core.checks` return them; the
        order in memory is that of y, or of x where y has gaps.
    geometry : Geometry
        Made for the shape of x.
    eps : float or None
        Added to the variance; None means the machine epsilon of x's type.
    masked : bool
        Whether there is a mask.
    center : bool
        Whether the mean is subtracted; if not, the variance is the mean square.
    has_weight, has_bias, use_batch_stats, sample_variance, activation, gradient_dtype
        As in :class:`Recipe` and its mode.
    exchange : Exchange or None
        With processes that share the tracked statistic.
    """
    order = memory_order(y, geometry.shape) or memory_order(x, geometry.shape)
    order = order or tuple(range(len(geometry.shape)))
    whole_groups = exchange is None or not _is_shared(geometry)
    layout = find_layout(geometry, order, has_weight or has_bias, masked, whole_groups)
    return Recipe(
        layout, x.shape, x.dtype, arithmetic(x.dtype), _mode(x.dtype, eps, center, use_batch_stats),
        has_weight, has_bias, sample_variance, activation,
        _is_streamed(layout, y.nbytes, use_batch_stats), gradient_dtype,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _mode(dtype: np.dtype[Any], eps: float | None, center: bool, use_batch_stats: bool) -> Mode:
    added = float(np.finfo(arithmetic(dtype)).eps) if eps is None else eps
    return Mode(added, center, use_batch_stats)


def _is_streamed(layout: Layout, n_bytes: int, use_batch_stats: bool) -> bool:
    """Tell whether outputs of so many bytes are written by streaming stores."""
    # Forward and backward must agree: dx may have the memory of y, and streaming stores to lines
    # that are in a cache take twice as long.
    return n_bytes >= layout.tuning.stream_bytes and layout.streams(use_batch_stats)


def normalize(
    x: Array,
    y: Array,
    recipe: Recipe,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    running: tuple[Array, Array] | None = None,
    mixture: Float64 | None = None,
    mask: Array | None = None,
    residual: Array | None = None,
    in_place: bool = False,
    exchange: Exchange | None = None,
) -> Saved:
    """Write y, the normalised x; return what backward needs.

    Parameters
    ----------
    x, y : array
        Two that :func:`find_recipe` found the recipe for, or like them.
    recipe : Recipe
        How.
    weight, bias : array, optional
        Of shape ``geometry.param_shape``.
    running : (mean, var), optional
        Running statistics, which take the place of the tracked statistic.
    mixture : array (2, S), optional
        Weights of the means and of the variances of several statistics.
    mask : array of bool, optional
        True where an element counts, as :func:`~numbanorm.core.checks.bool_mask` returns it.
    residual : array of the shape and type of x, optional
        What is added before the activation.
    in_place : bool
        Whether y is x.
    exchange : Exchange, optional
        With processes that share the tracked statistic, if that reduces axis 0.
    """
    layout = recipe.layout
    if exchange is not None and not _is_shared(layout.geometry):
        exchange = None
    view, (target, copied) = layout.to_view(x), layout.to_target(y)
    counts = None if mask is None else layout.to_view(mask)
    added, lost = None, "x" if in_place else ""
    if residual is not None:
        added = layout.to_view(residual)
        lost = lost or ("residual" if _same_memory(y, residual) else "")
    statistics = run_forward(
        recipe, view, counts, added, target, weight, bias, running, mixture, exchange,
        bool(lost) and copied is None,
    )  # fmt: skip
    finish_target(target, copied)
    return Saved(recipe, view, counts, added, lost, mixture, statistics, exchange)


def run_forward(
    recipe: Recipe,
    x: Array,
    mask: Array | None,
    residual: Array | None,
    y: Array,
    weight: Array | None,
    bias: Array | None,
    running: tuple[Array, Array] | None,
    mixture: Float64 | None,
    exchange: Exchange | None = None,
    in_place: bool = False,
) -> Statistics:
    """Write y, which is x or the residual if ``in_place``; return what was found.

    x, mask, residual and y are views in the layout's order; see :func:`normalize` on the others.
    """
    fused = None
    if recipe.activation is not None or residual is not None:
        fused = _fused(recipe.activation, residual, x, None)
    job = Job(recipe, weight, bias, running, mixture, fused, exchange)
    return recipe.layout.forward(x, mask, job, recipe.is_streamed and not in_place, y)


def _is_shared(geometry: Geometry) -> bool:
    """Tell whether processes may share the tracked statistic."""
    return 0 in geometry.reductions[geometry.tracked]


def _same_memory(a: Array, b: Array) -> bool:
    """Tell whether two arrays that do not overlap in part are the same."""
    return a.size > 0 and a.ctypes.data == b.ctypes.data


def _fused(
    activation: Activation | None, residual: Array | None, x: Array, dx: Array | None,
    dresidual: Array | None = None, keeps_dy: bool = False,
) -> Any:  # fmt: skip
    """Return what kernels.access calls ``fused``; in the place of what is not there are others."""
    aligned = False
    if dx is not None and dresidual is not None:
        aligned = (dx.ctypes.data - dresidual.ctypes.data) % LINE == 0
    return (
        tuple(activation or NO_ACTIVATION), residual is not None,
        x if residual is None else residual, dx if dresidual is None else dresidual, aligned,
        keeps_dy,
    )  # fmt: skip


def restore(
    x: Array,
    recipe: Recipe,
    weight: Array | None,
    bias: Array | None,
    statistics: list[Statistic],
    *,
    mixture: Float64 | None = None,
    mask: Array | None = None,
    instances: Instances | None = None,
    residual: Array | None = None,
    exchange: Exchange | None = None,
) -> Saved:
    """Return what :func:`normalize` returned, from x and its statistics.

    The recipe is found for x and the dx to come. ``instances`` goes with ``sample_variance``, and
    ``bias`` is needed with an activation alone. With an ``exchange`` the tracked statistic is that
    of several processes, which backward adds up over.
    """
    layout = recipe.layout
    restored = layout.restore(statistics, Job(recipe, weight, bias, mixture=mixture))
    saved = Saved(
        recipe, None, None, None, "", mixture, restored._replace(instances=instances), exchange
    )
    return saved.with_inputs(x, mask, residual)


def backward(
    dy: ArrayLike,
    saved: Saved,
    out: Array | None = None,
    out_residual: Array | None = None,
    empty: Callable[[Array], Array] = empty_array,
) -> tuple[Array, Array | None, ParameterGradients]:
    """Return dx, dresidual and the others' gradients, once dy, saved and both outputs fit.

    Without ``out`` dx is what ``empty`` returns for dy. dresidual is None without a residual.
    """
    if not isinstance(saved, Saved):
        raise TypeError(
            f"saved: the second result of a forward is needed, got {type(saved).__name__}"
        )
    if saved.lost:
        raise RuntimeError(
            f"backward: forward wrote y over {saved.lost} (out={saved.lost}), so "
            f"{saved.lost} is gone; call forward with another out, or without"
        )
    if out_residual is not None and saved.residual is None:
        raise ValueError("out_residual: there was no residual in forward, so that it has no use")
    x = saved.x
    assert x is not None
    gradient = float_array(dy, "dy")
    shape, dtype = saved.recipe.shape, saved.recipe.dtype
    if gradient.shape != shape:
        raise ValueError(f"dy: the shape of x, {shape}, is needed, got {gradient.shape}")
    if gradient.dtype != dtype:
        with np.errstate(over="ignore"):
            gradient = gradient.astype(dtype)
    if saved.residual is None:
        dx, in_place = output_array(out, gradient, x, empty=empty)
        return dx, None, differentiate(gradient, saved, dx, in_place)
    inputs: tuple[Array, ...] = x, saved.residual
    dx, in_place = output_array(out, gradient, *inputs, empty=empty)
    if out_residual is not None:
        inputs = *inputs, dx
    dresidual, second_in_place = output_array(
        out_residual, gradient, *inputs, name="out_residual", empty=empty
    )
    if out_residual is not None and _same_memory(dx, dresidual):
        raise ValueError("out_residual: memory of its own is needed, got that of out")
    in_place = in_place or second_in_place
    return dx, dresidual, differentiate(gradient, saved, dx, in_place, dresidual)


def differentiate(
    dy: Array, saved: Saved, dx: Array, in_place: bool, dresidual: Array | None = None
) -> ParameterGradients:
    """Write dx and dresidual; return the gradients of all parameters.

    One of them is dy if ``in_place``. ``dresidual`` is needed where there was a residual.
    """
    layout = saved.layout
    target, copied = layout.to_target(dx)
    second, second_copied = (None, None) if dresidual is None else layout.to_target(dresidual)
    in_place = in_place and copied is None
    gradients = run_backward(layout.to_view(dy), saved, in_place, target, second)
    finish_target(target, copied)
    finish_target(second, second_copied)
    if saved.scale is not None:
        dx *= saved.scale
    return gradients


def run_backward(
    dy: Array, saved: Saved, in_place: bool, dx: Array, dresidual: Array | None
) -> ParameterGradients:
    """Write dx and dresidual, of which one is dy if ``in_place``; return all other gradients.

    All arrays, with those of ``saved``, are views in the layout's order.
    """
    recipe, x, fused = saved.recipe, saved.x, None
    assert x is not None
    if recipe.activation is not None or saved.residual is not None:
        fused = _fused(recipe.activation, saved.residual, x, dx, dresidual, recipe.keeps_dy)
    # In evaluation forward may write longer runs of memory than backward.
    streamed = recipe.is_streamed and not in_place and recipe.layout.streams()
    gradients = recipe.layout.backward(dy, x, saved, fused, streamed, dx)
    if saved.is_constant:
        np.copyto(dx, 0, where=np.isfinite(dx))
    dmixture: tuple[Float64 | None, Float64 | None] = None, None
    if saved.mixture is not None:
        # A single statistic has a logit whose gradient is 0.
        dmixture = tuple(
            np.zeros_like(saved.mixture) if gradients.mixture is None else gradients.mixture
        )
    return ParameterGradients(
        gradients.weight if recipe.has_weight else None,
        gradients.bias if recipe.has_bias else None,
        *dmixture,
    )
