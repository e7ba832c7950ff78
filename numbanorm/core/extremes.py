"""Float64 values that are so large that their squares are not numbers: x is made smaller first.

The sums of float32 are float64 and cannot overflow. Those of float64 do so from deviations of 1e154
on, and the cube of a reciprocal deviation, in backward, underflows from 1e103 on. A normalised x
does not depend on the scale of x, as eps is nothing beside such a variance.
"""

from typing import Any

import numpy as np

from numbanorm.core import normalize as core
from numbanorm.core.layouts import Recipe, Saved
from numbanorm.core.types import Array, Float64

# Variances, and values, from which x is made smaller: to values of 2**166, or 1e50.
LARGE_VAR, LARGE, EXPONENT = 1e180, 1e90, 166


def normalize(x: Array, y: Array, recipe: Recipe, *parameters: Any, **options: Any) -> Saved:
    """Return :func:`numbanorm.core.normalize.normalize` of x, of any magnitude."""
    if x.dtype != np.float64 or options.get("exchange") is not None:
        return core.normalize(x, y, recipe, *parameters, **options)
    residual = options.get("residual")
    in_place = options.pop("in_place", False)
    overwritten = in_place or (residual is not None and np.may_share_memory(y, residual))
    if overwritten and x.size and max(x.max(), -x.min()) > LARGE:
        # What is written over is needed again.
        written = np.empty_like(y)
        saved = normalize(x.copy(), written, recipe, *parameters, **options)
        y[...] = written
        return saved._replace(lost="x" if in_place else "residual")
    saved = core.normalize(x, y, recipe, *parameters, in_place=in_place, **options)
    if overwritten or (saved.statistics.groups[2] < LARGE_VAR).all():
        return saved
    scale = _scale(x, saved, options.get("mask"))
    if (scale == 1).all():
        return saved
    geometry = recipe.geometry
    if options.get("running") is not None:
        mean, var = options["running"]
        grid = geometry.running_grid
        factor = np.broadcast_to(scale, grid).reshape(mean.shape)
        options["running"] = mean * factor, var * factor**2
    by_element = np.broadcast_to(scale, geometry.shape).reshape(x.shape)
    scaled = core.normalize(x * by_element, y, recipe, *parameters, **options)
    groups = saved.statistics.groups.copy()
    overflown = np.isnan(groups[2]) & np.isfinite(groups[1])
    groups[2, overflown] = np.inf
    return scaled._replace(scale=by_element, unscaled=groups)


@np.errstate(all="ignore")
def _scale(x: Array, saved: Saved, mask: Array | None) -> Float64:
    """Return powers of 2 for x, the same wherever elements share a statistic."""
    geometry = saved.layout.geometry
    shared = tuple({axis for reduced in geometry.reductions for axis in reduced})
    too_large = np.zeros((), np.bool_)
    for statistic in saved.all_statistics():
        too_large = too_large | (~(statistic.var < LARGE_VAR)).any(shared, keepdims=True)
    counts = np.isfinite(x) if mask is None else np.isfinite(x) & mask
    peak = (
        np.abs(x)
        .reshape(geometry.shape)
        .max(shared, keepdims=True, initial=0, where=counts.reshape(geometry.shape))
    )
    smaller = np.ldexp(1.0, EXPONENT - np.frexp(peak)[1])
    scale: Float64 = np.where(too_large & (peak > LARGE), smaller, 1.0)
    return scale
