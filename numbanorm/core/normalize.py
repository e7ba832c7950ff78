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
from numbanorm.core.layouts import Instances, Job, Layout, Saved, Statistic, find_layout
from numbanorm.core.types import Array, Float64, arithmetic
from numbanorm.kernels.activations import Activation
from numbanorm.kernels.modes import Mode
from numbanorm.numba_ext.lines import LINE

# A residual alone.
NO_ACTIVATION = Activation()


class ParameterGradients(NamedTuple):
    """Gradients of weight, bias, and the logits of means and variances, in float64, or None."""

    weight: Float64 | None
    bias: Float64 | None
    mean_weight: Float64 | None
    var_weight: Float64 | None


def normalize(
    x: Array,
    y: Array,
    geometry: Geometry,
    weight: Array | None,
    bias: Array | None,
    eps: float | None,
    *,
    running: tuple[Array, Array] | None = None,
    mixture: Float64 | None = None,
    center: bool = True,
    sample_variance: bool = False,
    mask: Array | None = None,
    activation: Activation | None = None,
    residual: Array | None = None,
    in_place: bool = False,
    exchange: Exchange | None = None,
) -> Saved:
    """Write y, the normalised x; return what backward needs.

    Parameters
    ----------
    x, y : array of float32, float64 or a float of 16 bits
        As ``float_array`` and ``output_array`` of :mod:`numbanorm.core.checks` return them.
    geometry : Geometry
        Made for the shape of x.
    weight, bias : array, optional
        Of shape ``geometry.param_shape``.
    eps : float or None
        Added to the variance; None means the machine epsilon of x's type.
    running : (mean, var), optional
        Running statistics, which take the place of the tracked statistic.
    mixture : array (2, S), optional
        Weights of the means and of the variances of several statistics.
    center : bool
        Whether the mean is subtracted; if not, the variance is the mean square.
    sample_variance : bool
        Whether the variance of an instance (or, where those are single values, of each group)
        is divided by n - 1 instead of n.
    mask : array of bool, optional
        True where an element counts, as :func:`~numbanorm.core.checks.bool_mask` returns it.
    activation : Activation, optional
        What follows the norm: y = activation(norm(x) + residual).
    residual : array of the shape and type of x, optional
        What is added before that.
    in_place : bool
        Whether y is x.
    exchange : Exchange, optional
        With processes that share the tracked statistic, if that reduces axis 0.
    """
    affine = weight is not None or bias is not None
    if 0 not in geometry.reductions[geometry.tracked]:
        exchange = None
    layout = _layout(x, y, geometry, affine, mask is not None, whole_groups=exchange is None)
    target, copied = layout.to_target(y)
    views = layout.to_view(x), None if mask is None else layout.to_view(mask)
    added, lost, fused = None, "x" if in_place else "", None
    if activation is not None or residual is not None:
        if residual is not None:
            added = layout.to_view(residual)
            lost = lost or ("residual" if _same_memory(y, residual) else "")
        fused = _fused(activation, added, views[0], None)
    job = Job(
        _mode(x.dtype, eps, center, running is None),
        weight,
        bias,
        running,
        mixture,
        sample_variance,
        fused,
        exchange,
    )
    streamed = _is_streamed(layout, target, bool(lost) and copied is None)
    statistics = layout.forward(*views, job, streamed, target)
    if copied is not None:
        copied[...] = target.reshape(copied.shape)
    return Saved(
        layout, x.shape, x.dtype, *views, lost, activation, added, job.mode, mixture,
        sample_variance, weight is not None, bias is not None, statistics, exchange,
    )  # fmt: skip


def _same_memory(a: Array, b: Array) -> bool:
    """Tell whether two arrays that do not overlap in part are the same."""
    return a.size > 0 and a.ctypes.data == b.ctypes.data


def _fused(
    activation: Activation | None, residual: Array | None, x: Array, dx: Array | None,
    dresidual: Array | None = None,
) -> Any:  # fmt: skip
    """Return the fields of kernels.access.Fused; in the place of what is not there are others."""
    aligned = False
    if dx is not None and dresidual is not None:
        aligned = (dx.ctypes.data - dresidual.ctypes.data) % LINE == 0
    return (
        tuple(activation or NO_ACTIVATION), residual is not None,
        x if residual is None else residual, dx if dresidual is None else dresidual, aligned,
    )  # fmt: skip


def restore(
    x: Array,
    dx: Array,
    geometry: Geometry,
    weight: Array | None,
    has_bias: bool,
    eps: float | None,
    statistics: list[Statistic],
    *,
    mixture: Float64 | None = None,
    center: bool = True,
    sample_variance: bool = False,
    mask: Array | None = None,
    instances: Instances | None = None,
    bias: Array | None = None,
    activation: Activation | None = None,
    residual: Array | None = None,
    exchange: Exchange | None = None,
) -> Saved:
    """Return what :func:`normalize` returned, from x and its statistics.

    ``dx`` is where backward is to write; ``instances`` goes with ``sample_variance``, and ``bias``
    is needed with an ``activation`` alone. With an ``exchange`` the tracked statistic is that of
    several processes, which backward adds up over.
    """
    affine = weight is not None or has_bias
    layout = _layout(x, dx, geometry, affine, mask is not None, exchange is None)
    given = statistics[geometry.tracked]
    running = (given.mean, given.var) if given.n is None else None
    job = Job(
        _mode(x.dtype, eps, center, running is None), weight, bias, None, mixture, sample_variance
    )
    restored = layout.restore(statistics, job, arithmetic(x.dtype))._replace(instances=instances)
    views = layout.to_view(x), None if mask is None else layout.to_view(mask)
    added = None if residual is None else layout.to_view(residual)
    return Saved(
        layout, x.shape, x.dtype, *views, "", activation, added, job.mode, mixture,
        sample_variance, weight is not None, has_bias, restored, exchange,
    )  # fmt: skip


def _layout(
    x: Array, y: Array, geometry: Geometry, affine: bool, masked: bool, whole_groups: bool = True
) -> Layout:
    """Return the layout for the order of y in memory; x is copied if its own differs."""
    order = memory_order(y, geometry.shape) or memory_order(x, geometry.shape)
    order = order or tuple(range(len(geometry.shape)))
    return find_layout(geometry, order, affine, masked, whole_groups)


@functools.lru_cache(maxsize=256)
def _mode(dtype: np.dtype[Any], eps: float | None, center: bool, use_batch_stats: bool) -> Mode:
    added = float(np.finfo(arithmetic(dtype)).eps) if eps is None else eps
    return Mode(added, center, use_batch_stats)


def _is_streamed(layout: Layout, y: Array, in_place: bool) -> bool:
    """Tell whether y, the view of an output, is written by streaming stores."""
    size = layout.tuning.cache_bytes
    # x, y, dy and dx fill a cache together. Forward and backward must agree: dx may have the memory
    # of y, and streaming stores to lines that are in a cache take twice as long.
    return size is not None and y.nbytes >= size // 4 and not in_place and layout.streams()


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
    if gradient.shape != saved.shape:
        raise ValueError(f"dy: the shape of x, {saved.shape}, is needed, got {gradient.shape}")
    if gradient.dtype != saved.dtype:
        with np.errstate(over="ignore"):
            gradient = gradient.astype(saved.dtype)
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
    layout, fused = saved.layout, None
    assert saved.x is not None
    target, copied = layout.to_target(dx)
    second: tuple[Array | None, Array | None] = None, None
    if saved.activation is not None or saved.residual is not None:
        if dresidual is not None:
            second = layout.to_target(dresidual)
        fused = _fused(saved.activation, saved.residual, saved.x, target, second[0])
    streamed = _is_streamed(layout, target, in_place and copied is None)
    gradients = layout.backward(layout.to_view(dy), saved.x, saved, fused, streamed, target)
    for written, to in ((target, copied), second):
        if written is not None and to is not None:
            to[...] = written.reshape(to.shape)
    if saved.scale is not None:
        dx *= saved.scale
    if saved.is_constant:
        np.copyto(dx, 0, where=np.isfinite(dx))
    dmixture: tuple[Float64 | None, Float64 | None] = None, None
    if saved.mixture is not None:
        # A single statistic has a logit whose gradient is 0.
        dmixture = tuple(
            np.zeros_like(saved.mixture) if gradients.mixture is None else gradients.mixture
        )
    return ParameterGradients(
        gradients.weight if saved.has_weight else None,
        gradients.bias if saved.has_bias else None,
        *dmixture,
    )
