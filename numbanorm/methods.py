"""Methods: over which axes the statistics of each are, once, for layers, functions and PyTorch."""

import functools

import numpy as np

from numbanorm.core.checks import check_channel_axis
from numbanorm.core.geometry import Geometry, geometry, normalize_axes
from numbanorm.core.types import Array, Axes, Float64


def channel_axis(x: Array, axis: int) -> int:
    """Return the channel axis of x as a number from 1 on."""
    if type(axis) is int and 0 < axis < x.ndim:
        return axis  # the checks below take as long as a small kernel
    if x.ndim < 2:
        raise ValueError(f"x: a batch axis and a channel axis are needed, got shape {x.shape}")
    (channel,) = normalize_axes(check_channel_axis(axis), x.ndim, "axis")
    return check_channel_axis(channel)


@functools.lru_cache(maxsize=4096)
def trailing_geometry(shape: Axes, normalized_shape: Axes) -> Geometry:
    """Return the geometry of statistics over trailing axes of these sizes, of x of a shape."""
    start = len(shape) - len(normalized_shape)
    if shape[max(start, 0) :] != normalized_shape:
        raise ValueError(
            f"x: a shape that ends in normalized_shape {normalized_shape} is needed, got {shape}"
        )
    axes = tuple(range(start, len(shape)))
    return geometry(shape, (axes,), axes)


@functools.lru_cache(maxsize=4096)
def channel_geometry(
    shape: Axes,
    channel: int,
    over: tuple[str, ...],
    num_groups: int | None = None,
    by_instance: bool = False,
) -> Geometry:
    """Return the geometry of the statistics in ``over`` of an x of this shape with channels."""
    n_channels, n_groups = shape[channel], num_groups or 1 if "gn" in over else 1
    if n_channels % n_groups:
        raise ValueError(
            f"num_groups: a divisor of the {n_channels} channels of x is needed, got {n_groups}"
        )
    everything = range(len(shape))
    reductions = {
        "in": tuple(a for a in everything if a not in (0, channel)),
        "ln": tuple(a for a in everything if a != 0),
        "bn": tuple(a for a in everything if a != channel),
        "gn": tuple(a for a in everything if a != 0),
    }
    return geometry(
        shape,
        tuple(reductions[name] for name in over),
        (channel,),
        groups=n_groups,
        group_axis=channel,
        grouped=tuple(name == "gn" for name in over),
        tracked=over.index("bn") if "bn" in over else 0,
        instance_axes=(0, channel) if by_instance else (),
    )


def require_several(geometry: Geometry) -> None:
    """Raise if a group of the tracked statistic is a single value, whose variance says nothing."""
    if geometry.group_size == 1:
        raise ValueError(
            f"x: more than one value per channel is needed in training, got shape {geometry.shape}"
        )


def mix(mean_weight: Array, var_weight: Array) -> Float64:
    """Return the softmax weights (2, S) of S statistics from their logits, (S,)."""
    # Imported here, since it takes four times as long as all the rest of the library.
    from scipy.special import softmax

    # At once: a call takes longer than a small kernel.
    mixture: Float64 = softmax(np.array((mean_weight, var_weight), np.float64), axis=1)
    return mixture
