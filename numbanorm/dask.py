"""Statistics of Dask arrays: each chunk in one pass, merged as a tree by the current scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbanorm.core.checks import as_array, bool_mask
from numbanorm.core.geometry import normalize_axes
from numbanorm.core.layouts.pieces import merge_stacked
from numbanorm.core.types import Float64
from numbanorm.moments import Moments
from numbanorm.moments import moments as moments_of_array

__all__ = ["moments"]

# What a task gives to the next one, for each group.
NAMES = "count", "mean", "m2", "rest"
FIELDS = np.dtype([(name, np.float64) for name in NAMES])


def moments(
    x: Any,
    axes: int | Iterable[int] | None = None,
    *,
    mask: Any = None,
    keepdims: bool = False,
) -> Moments:
    """Take count, mean and second central moment of a Dask array, in one pass over each chunk.

    A chunk's moments are a task, and so is the merging of some of them: a tree, which the current
    scheduler runs (threads, processes or ``dask.distributed``). No chunk is kept, and what tasks
    give to each other are four numbers for each group.

    Parameters
    ----------
    x : dask.array.Array
        Of what :func:`numbanorm.moments` takes; chunks of any sizes, also of unknown ones.
    axes : int or tuple of int, optional
        The axes to reduce, negative allowed; by default all.
    mask : array of bool, optional
        A Dask or NumPy array that broadcasts to x; True where an element counts. Then ``count`` is
        an array.
    keepdims : bool
        Keep reduced axes with size 1.

    Returns
    -------
    Moments
        Computed, in float64, as exact as those of :func:`numbanorm.moments`.

    Raises
    ------
    TypeError, ValueError
        As :func:`numbanorm.moments` raises them, before anything is computed.

    Examples
    --------
    >>> import dask.array
    >>> import numbanorm.dask
    >>> x = dask.array.arange(6.0, chunks=2)
    >>> numbanorm.dask.moments(x)
    Moments(count=6, mean=array(2.5), m2=array(17.5))
    """
    import dask.array as da

    if not isinstance(x, da.Array):
        raise TypeError(
            f"x: a Dask array is needed, got {type(x).__name__}; "
            "dask.array.from_array(x) would do, or numbanorm.moments"
        )
    reduced = tuple(range(x.ndim)) if axes is None else normalize_axes(axes, x.ndim)
    moments_of_array(np.empty((0,) * x.ndim, x.dtype), reduced)  # says what is wrong with x
    if mask is not None:
        mask = mask if isinstance(mask, da.Array) else da.asarray(as_array(mask, "mask"))
        unknown = any(math.isnan(n) for n in (*x.shape, *mask.shape))
        shapes = ((), ()) if unknown else (mask.shape, x.shape)
        bool_mask(np.broadcast_to(np.zeros((), mask.dtype), shapes[0]), shapes[1])
    found = da.reduction(
        x, _of_chunk, _merge, reduced, keepdims=True, dtype=FIELDS, combine=_merge,
        meta=np.empty((0,) * x.ndim, FIELDS), weights=mask,
    ).compute()  # fmt: skip
    kept = (
        found
        if keepdims
        else found[tuple(0 if a in reduced else slice(None) for a in range(x.ndim))]
    )
    count = kept["count"].astype(np.int64)
    if mask is None:
        size = math.prod(x.shape[axis] for axis in reduced)
        count = int(count.flat[0]) if math.isnan(size) else size
    return Moments._of(count, *(np.array(kept[name], order="C") for name in NAMES[1:]))


def _of_chunk(
    chunk: Any, weights: Any = None, *, axis: tuple[int, ...], keepdims: bool
) -> NDArray[Any]:
    """Return the moments of a chunk, as FIELDS, with size 1 along the reduced axes."""
    found = moments_of_array(chunk, axis, mask=weights, keepdims=True)
    fields = np.empty(found.mean.shape, FIELDS)
    for name, values in zip(NAMES, (found.count, found.mean, found.m2, found._rest), strict=True):
        fields[name] = values
    return fields


def _merge(parts: NDArray[Any], *, axis: tuple[int, ...], keepdims: bool) -> NDArray[Any]:
    """Merge the moments of some chunks, which stand next to each other along the reduced axes."""
    first = np.moveaxis(parts, axis, range(len(axis)))
    n = math.prod(first.shape[: len(axis)])
    stacked: Float64 = np.stack([first[name].reshape(n, -1) for name in NAMES], axis=1)
    count, mean, _, m2, rest = merge_stacked(stacked)
    merged = np.empty([1 if a in axis else size for a, size in enumerate(parts.shape)], FIELDS)
    for name, values in zip(NAMES, (count, mean, m2, rest), strict=True):
        merged[name] = values.reshape(merged.shape)
    return merged
