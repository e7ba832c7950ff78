"""Software pipelining: reduce one row (latency bound) while writing another (bandwidth bound)."""

import numpy as np
from numba import types
from numba.extending import overload

from numbanorm.kernels.access import prefetch_row
from numbanorm.kernels.reduce import add_step, begin_sums, end_sums
from numbanorm.kernels.stream import _seek, flush, lines_at_once
from numbanorm.numba_ext.jit import INLINE, called, inline
from numbanorm.numba_ext.lines import line_size
from numbanorm.numba_ext.vectors import splat
from numbanorm.tuning import LANES, PREFETCH_NEAR, PREFETCH_NEAR_UP_TO, STEP


@inline
def _step_both(next_row, n_next, upcoming, center, sums, write, row, n, coef, ys, offset, lo, hi):
    """Add elements lo to hi of a coming row to its sums, while those of another row are written.

    A row is dys (or None), xs and counts, of n elements, which may be 0; one is ``asked`` for.
    ``write`` is the function that writes a vector of it, from ``by``, to ys, where ``offset`` is
    added to its place.
    """
    whole, whole_coming = n // STEP * STEP, n_next // STEP * STEP
    for i in range(lo, min(hi, max(whole, whole_coming)), STEP):
        prefetch_row(upcoming, i)
        prefetch_row(upcoming, i + LANES)
        if i < whole_coming:
            sums = add_step(next_row, i, center, sums)
        if i < whole:
            write(row, i, None, coef, ys, i + offset)
            write(row, i + LANES, None, coef, ys, i + LANES + offset)
    if lo <= whole < min(hi, n):
        if n - whole >= LANES:
            write(row, whole, None, coef, ys, whole + offset)
        i = n // LANES * LANES
        if i < n:
            write(row, i, n - i, coef, ys, i + offset)
    return sums


@inline
def _in_cache(streamed, stream, next_row, n_next, upcoming, center, write, row, n, coef, y, place):
    middle = splat(center)
    sums = begin_sums(next_row, n_next, middle)
    n_most = max(n, n_next)
    sums = _step_both(
        next_row, n_next, upcoming, middle, sums, write, row, n, coef, y, place, np.intp(0), n_most
    )
    return *end_sums(next_row[2], n_next, sums), stream


@called
def _in_stream(streamed, stream, next_row, n_next, upcoming, center, write, row, n, coef, y, place):
    buffer, pending, at = _seek(stream, y, place) if n > 0 else stream
    middle = splat(center)
    sums = begin_sums(next_row, n_next, middle)
    n_at_once = lines_at_once(y)
    for lo in range(0, max(n, n_next), n_at_once):
        hi = lo + n_at_once
        sums = _step_both(
            next_row,
            n_next,
            upcoming,
            middle,
            sums,
            write,
            row,
            n,
            coef,
            buffer,
            pending - lo,
            lo,
            hi,
        )
        pending, at = flush(buffer, pending + max(0, min(hi, n) - lo), y, at)
    return *end_sums(next_row[2], n_next, sums), (buffer, pending, at)


@inline
def prefetch_distance(streamed, n_lines, y):
    """Return how many elements ahead to ask for: so many lines, or NEAR of them."""
    near = streamed is None and y.size < PREFETCH_NEAR_UP_TO
    return np.intp((PREFETCH_NEAR if near else n_lines) * line_size(y))


def reduce_while_writing(streamed, stream, *args):
    """Return the sums of a coming row, while another one is written to y (N,) from place on.

    The sums are as from end_sums; see _step_both about the rows. ``stream`` is what is between them
    and memory unless ``streamed`` is None: a buffer, how many of its elements are kept, and where
    they belong. A kernel is compiled for either, as having both made it slower.
    """
    return (_in_cache if streamed is None else _in_stream)(streamed, stream, *args)


@overload(reduce_while_writing, jit_options=INLINE)
def _compiled_reduce_while_writing(
    streamed, stream, next_row, n_next, upcoming, center, write, row, n, coef, y, place
):
    function = _in_cache if isinstance(streamed, types.NoneType) else _in_stream

    def call(streamed, stream, next_row, n_next, upcoming, center, write, row, n, coef, y, place):
        return function(
            streamed, stream, next_row, n_next, upcoming, center, write, row, n, coef, y, place
        )

    return call
