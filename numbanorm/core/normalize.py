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
from numbanorm.core.geometry import Geometry, memory_order
from numbanorm.core.layouts import Instances, Job, Layout, Saved, Statistic, find_layout
from numbanorm.core.types import Array, Float64
from numbanorm.kernels.modes import Mode


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
    in_place: bool = False,
) -> Saved:
    """Write y, the normalised x; return what backward needs.

    Parameters
    ----------
    x, y : array of float32 or float64
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
    in_place : bool
        Whether y is x.
    """
    affine = weight is not None or bias is not None
    layout = _layout(x, y, geometry, affine, mask is not None)
    job = Job(
        _mode(x.dtype, eps, center, running is None),
        weight,
        bias,
        running,
        mixture,
        sample_variance,
    )
    target, copied = layout.to_target(y)
    views = layout.to_view(x), None if mask is None else layout.to_view(mask)
    streamed = _is_streamed(layout, target, in_place and copied is None)
    statistics = layout.forward(*views, job, streamed, target)
    if copied is not None:
        copied[...] = target.reshape(copied.shape)
    return Saved(
        layout, x.shape, *views, in_place, job.mode, mixture, sample_variance,
        weight is not None, bias is not None, statistics,
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
    all_reduce: Callable[[Float64], object] | None = None,
) -> Saved:
    """Return what :func:`normalize` returned, from x and its statistics.

    ``dx`` is where backward is to write; ``instances`` goes with ``sample_variance``. With
    ``all_reduce`` the statistics are those of several processes, and backward adds up over them.
    """
    affine = weight is not None or has_bias
    layout = _layout(x, dx, geometry, affine, mask is not None, all_reduce is None)
    given = statistics[geometry.tracked]
    running = (given.mean, given.var) if given.n is None else None
    job = Job(
        _mode(x.dtype, eps, center, running is None), weight, None, None, mixture, sample_variance
    )
    restored = layout.restore(statistics, job, x.dtype)._replace(instances=instances)
    views = layout.to_view(x), None if mask is None else layout.to_view(mask)
    return Saved(
        layout, x.shape, *views, False, job.mode, mixture, sample_variance,
        weight is not None, has_bias, restored, all_reduce,
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
    return Mode(float(np.finfo(dtype).eps if eps is None else eps), center, use_batch_stats)


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
    empty: Callable[[Array], Array] = empty_array,
) -> tuple[Array, ParameterGradients]:
    """Return dx and what :func:`differentiate` does, once dy, saved and out are found to fit.

    Without ``out`` dx is what ``empty`` returns for dy.
    """
    if not isinstance(saved, Saved):
        raise TypeError(
            f"saved: the second result of a forward is needed, got {type(saved).__name__}"
        )
    if saved.x_is_lost:
        raise RuntimeError(
            "backward: forward wrote y over x (out=x), so x is gone; "
            "call forward with another out, or without"
        )
    x = saved.x
    assert x is not None
    gradient = float_array(dy, "dy")
    if gradient.shape != saved.shape:
        raise ValueError(f"dy: the shape of x, {saved.shape}, is needed, got {gradient.shape}")
    if gradient.dtype != x.dtype:
        with np.errstate(over="ignore"):
            gradient = gradient.astype(x.dtype)
    dx, in_place = output_array(out, gradient, x, empty=empty)
    return dx, differentiate(gradient, saved, dx, in_place)


def differentiate(dy: Array, saved: Saved, dx: Array, in_place: bool) -> ParameterGradients:
    """Write dx, which is dy if ``in_place``; return the gradients of all parameters."""
    layout = saved.layout
    assert saved.x is not None
    target, copied = layout.to_target(dx)
    streamed = _is_streamed(layout, target, in_place and copied is None)
    gradients = layout.backward(layout.to_view(dy), saved.x, saved, streamed, target)
    if copied is not None:
        copied[...] = target.reshape(copied.shape)
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
