"""Rows of x, dy and mask, and the terms of sums that are read from them."""

import numpy as np

from numbanorm.numba_ext.jit import inline
from numbanorm.numba_ext.vectors import is_finite, leading, load, prefetch, splat, where, widen
from numbanorm.numba_ext.views import flat_slice


@inline
def take_row(dy, x, mask, at, n):
    """Return a row of n elements, from ``at`` on."""
    return flat_slice(dy, at, n), flat_slice(x, at, n), flat_slice(mask, at, n)


@inline
def prefetch_row(row, i):
    """Ask memory for a vector of a row, which may be outside."""
    prefetch(row[0], i)
    prefetch(row[1], i)
    prefetch(row[2], i)


@inline
def first_value(xs, counts):
    """Return the first element of xs (n,) that counts, or 0; counts (n,) may be None."""
    for i in range(xs.shape[0]):
        if counts is None or counts[i]:
            return np.float64(xs[i])
    return 0.0


@inline
def enters_sums(x, counts):
    """Tell which elements of vectors enter the sums of backward.

    A masked-out element is normalised too, so that its dy counts, unless there is nothing finite to
    normalise: what stands there must not turn the sums into NaN.
    """
    return counts | is_finite(x)


@inline
def shifted_terms(xs, counts, i, n, center):
    """Return vectors of 1, x - center and its square for n elements from i on, and of 0.

    An element counts where counts is True, or is None; see load about n.
    """
    # x is read in any case: a load that depends on the mask is not fetched ahead.
    d, zero, one = widen(load(xs, i, n)) - center, splat(0.0), splat(1.0)
    if counts is None:
        if n is None:
            return one, d, d * d
        n_valid = leading(n)
    else:
        n_valid = load(counts, i, n)
    d = where(n_valid, d, zero)
    return where(n_valid, one, zero), d, d * d


@inline
def gradient_terms(dys, xs, counts, i, n, center):
    """Return vectors of dy and x - center from i on, and 0 where they do not enter the sums.

    ``counts`` is the mask or None; see load about n.
    """
    dy, x = load(dys, i, n), load(xs, i, n)
    w, d = widen(dy), widen(x) - center
    if counts is not None:
        enters = enters_sums(x, load(counts, i, n))
        w, d = where(enters, w, splat(0.0)), where(enters, d, splat(0.0))
    return w, d


@inline
def terms(dys, xs, counts, i, n, center):
    """Return vectors of 1, w and w * (x - center) for n elements from i on, and of 0.

    w is dy, or x - center if dys is None: the three are a row.
    """
    if dys is None:
        return shifted_terms(xs, counts, i, n, center)
    w, d = gradient_terms(dys, xs, counts, i, n, center)
    return w, w, w * d


@inline
def plus_three(v, w):
    return v[0] + w[0], v[1] + w[1], v[2] + w[2]
