"""The one place that reads x, dy and mask, and writes y and dx.

Vectors that are read or written have the *arithmetic* type of an array, whatever type it is stored
in. Scratch, coefficients and weights have that type, or float64.
"""

from typing import Any, NamedTuple

import numpy as np

from numbanorm.numba_ext.halves import decode, encode
from numbanorm.numba_ext.jit import by_type, inline
from numbanorm.numba_ext.lines import line_size, stream, to_next_line
from numbanorm.numba_ext.vectors import load, prefetch, store
from numbanorm.numba_ext.views import flat_slice, member
from numbanorm.tuning import LANES

# The arithmetic type of what is stored: float16 as int16, bfloat16 as uint16.
ARITHMETIC: dict[Any, Any] = {
    np.dtype(np.float32): np.float32,
    np.dtype(np.float64): np.float64,
    np.dtype(np.int16): np.float32,
    np.dtype(np.uint16): np.float32,
}


@by_type
def arithmetic(array):
    """Return the type that elements of an array are calculated with."""
    dtype = ARITHMETIC[np.dtype(str(array.dtype))]
    return lambda array: dtype


# What follows a norm in the same pass, y = activation(norm(x) + residual), is a plain tuple:
# activations.Activation, whether there is a residual, that, its gradient, whether the gradient
# begins in a line where dx does, and whether it is kept: written before sums are taken, and read as
# dy after that. Where there is no residual, both arrays are others, which are left alone, but for
# dx where it is kept; the gradient is None in forward.
ACTIVATION, HAS_RESIDUAL, RESIDUAL, DRESIDUAL, IS_ALIGNED, IS_KEPT = range(6)


class Row(NamedTuple):
    """Elements next to each other: dy, x and mask (n,), of which dy and mask may be None.

    ``fused`` is what is above, or None, and ``residual`` and ``dresidual`` (n,) are of it.
    ``forward`` are the coefficients of forward, which backward needs then.
    """

    dy: Any
    x: Any
    mask: Any
    fused: Any
    residual: Any
    dresidual: Any
    forward: Any


@inline
def take_row(dy, x, mask, fused, forward, at, n):
    """Return the row of n elements that begins at element ``at`` in memory."""
    return Row(
        flat_slice(dy, at, n), flat_slice(x, at, n), flat_slice(mask, at, n), fused,
        flat_slice(member(fused, RESIDUAL), at, n),
        flat_slice(member(fused, DRESIDUAL), at, n), forward,
    )  # fmt: skip


@inline
def read(array, i, n):
    """Return a vector of an array from i on; if n is not None, its first n elements and zeros.

    Of None it is None.
    """
    return decode(load(array, i, n))


@inline
def read_one(x, i):
    """Return x[i] in float64, x (N,)."""
    return np.float64(decode(x[i]))


@inline
def first_value(x, mask):
    """Return the first element of x (n,) that counts, or 0, in float64; mask (n,) may be None."""
    for i in range(x.size):
        if mask is None or mask[i]:
            return read_one(x, i)
    return 0.0


@inline
def prefetch_row(row, i):
    """Prefetch a vector of a row from i on, which may be outside of it."""
    prefetch(row.dy, i)
    prefetch(row.x, i)
    prefetch(row.mask, i)
    prefetch(row.residual, i)


@inline
def prefetch_parts(y, place, n):
    """Prefetch the line in which the next row ends, after a row of n elements at ``place``.

    A store to a part of a line waits for that line, and later stores wait behind it.
    """
    prefetch(y, place + 2 * n)


@inline
def write(streamed, vector, y, i, n):
    """Write a vector to y[i] and after it: all of it, or if n is not None its first n elements.

    If ``streamed``, a whole one is written by a streaming store; it begins where a line does.
    """
    if n is None and streamed:
        stream(encode(vector, y), y, i)
    else:
        store(encode(vector, y), y, i, n)


@inline
def elements_to_line(streamed, y, i, n):
    """Return how many of n elements from y[i] on precede a line; 0 unless ``streamed``."""
    return min(to_next_line(y, i), n) if streamed else 0


@inline
def vectors_end(streamed, y, begin, n):
    """Return where the last whole vector ends, of vectors from ``begin`` on in n elements.

    If ``streamed``, of whole lines, which take two vectors of 16 bits: what streaming and ordinary
    stores write parts of is written to memory and read again.
    """
    least = max(LANES, line_size(y)) if streamed else LANES
    return n - (n - begin) % least


@inline
def write_part_of_row(buffer, i, n, y, k):
    """Write n elements, less than a line or a vector, by ordinary stores."""
    for d in range(0, n, LANES):
        n_valid = min(LANES, n - d)
        write(False, load(buffer, i + d, n_valid), y, k + d, n_valid)


@inline
def stream_row(buffer, n, y, at, distance):
    """Write a row (n,) to y (N,) from ``at`` on: whole vectors by streaming stores.

    A store to a part of a line waits for that line, and later stores wait behind it: the lines in
    which the row ``distance`` ahead begins and ends are prefetched.
    """
    start, head = np.intp(0), elements_to_line(True, y, at, n)
    if head > 0:
        prefetch(y, at + distance)
        write_part_of_row(buffer, start, head, y, at)
    end = vectors_end(True, y, head, n)
    for i in range(head, end, LANES):
        write(True, load(buffer, i, None), y, at + i, None)
    if end < n:
        prefetch(y, at + end + distance)
        write_part_of_row(buffer, end, n - end, y, at + end)
