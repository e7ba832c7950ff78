"""The one place that reads x, dy and mask, and writes y and dx.

Vectors that are read or written have the *arithmetic* type of an array, whatever type it is stored
in. Scratch, coefficients and weights have that type, or float64.
"""

from typing import Any, NamedTuple

import numpy as np

from numbanorm.numba_ext.jit import by_type, inline
from numbanorm.numba_ext.lines import stream, to_next_line
from numbanorm.numba_ext.vectors import load, prefetch, store, widen
from numbanorm.numba_ext.views import flat_slice
from numbanorm.tuning import LANES

# The arithmetic type of what is stored.
ARITHMETIC = {np.dtype(np.float32): np.float32, np.dtype(np.float64): np.float64}


@by_type
def arithmetic(array):
    """Return the type that elements of an array are calculated with."""
    dtype = ARITHMETIC[np.dtype(str(array.dtype))]
    return lambda array: dtype


class Row(NamedTuple):
    """Elements next to each other: dy, x and mask (n,), of which dy and mask may be None."""

    dy: Any
    x: Any
    mask: Any


@inline
def take_row(dy, x, mask, at, n):
    """Return the row of n elements that begins at element ``at`` in memory."""
    return Row(flat_slice(dy, at, n), flat_slice(x, at, n), flat_slice(mask, at, n))


@inline
def read_x(row, i, n):
    """Return a vector of x from i on; if n is not None, its first n elements and zeros."""
    return load(row.x, i, n)


@inline
def read_dy(row, i, n):
    """Return dy from i on, see read_x."""
    return load(row.dy, i, n)


@inline
def read_mask(row, i, n):
    """Return the mask from i on, or None if there is none; see read_x."""
    return load(row.mask, i, n)


@inline
def read_wide(row, i, n):
    """Return x from i on in float64, see read_x."""
    return widen(read_x(row, i, n))


@inline
def read_one(x, i):
    """Return x[i] in float64, x (N,)."""
    return np.float64(x[i])


@inline
def first_value(x, mask):
    """Return the first element of x (n,) that counts, or 0, in float64; mask (n,) may be None."""
    for i in range(x.shape[0]):
        if mask is None or mask[i]:
            return read_one(x, i)
    return 0.0


@inline
def prefetch_row(row, i):
    """Prefetch a vector of a row from i on, which may be outside of it."""
    prefetch(row.dy, i)
    prefetch(row.x, i)
    prefetch(row.mask, i)


@inline
def prefetch_parts(y, place, n):
    """Prefetch the line in which the next row ends, after a row of n elements at ``place``.

    A store to a part of a line waits for that line, and later stores wait behind it.
    """
    prefetch(y, place + 2 * n)


@inline
def write(vector, y, i, n):
    """Write a vector to y[i] and after it: all of it, or if n is not None its first n elements."""
    store(vector, y, i, n)


@inline
def write_aligned(streamed, vector, y, i):
    """Write a whole vector to y[i]: if ``streamed``, by a streaming store where a line begins."""
    if streamed:
        stream(vector, y, i)
    else:
        store(vector, y, i, None)


@inline
def elements_to_line(streamed, y, i, n):
    """Return how many of n elements from y[i] on precede a line; 0 unless ``streamed``."""
    return min(to_next_line(y, i), n) if streamed else 0


@inline
def vectors_end(begin, n):
    """Return where the last whole vector ends, of vectors from ``begin`` on in n elements."""
    return n - (n - begin) % LANES
