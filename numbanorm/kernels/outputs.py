"""Write rows and blocks of y or dx: coefficients say by their type what is calculated.

With streaming (non-temporal) stores a row is written as elements up to the first line of memory,
whole vectors, and the rest: an ordinary store first reads the line that it writes to, and evicts
what is still needed from the caches. Elements and rest are written by ordinary stores.
"""

import numpy as np

from numbanorm.kernels.access import (
    elements_to_line,
    prefetch_parts,
    prefetch_row,
    read,
    take_row,
    vectors_end,
    write,
)
from numbanorm.kernels.formulas import (
    ElementAffine,
    ElementGradient,
    ElementScale,
    Gradient,
    Scale,
    ScaleShift,
    make_dx,
)
from numbanorm.kernels.fused import make_y, read_dy, write_dresidual
from numbanorm.numba_ext.jit import by_record, called, if_none, inline
from numbanorm.numba_ext.vectors import load
from numbanorm.numba_ext.views import flat_slice
from numbanorm.tuning import LANES, PERIOD, ROWS, STEP


def _write_y(coef, streamed, row, i, n, c, y, k):
    write(streamed, make_y(row.fused, row, i, n, coef, c), y, k, n)


def _write_dx(coef, streamed, row, i, n, c, dx, k):
    dy = read_dy(row.fused, row.forward, row, i, n, c)
    values = make_dx(load(coef, c, n), dy, read(row.x, i, n), read(row.mask, i, n))
    write(streamed, values, dx, k, n)
    write_dresidual(row.fused, streamed, row, dy, i, n)


# Write a vector of y or dx, of a row from i on, to y[k]; see fused.norm_row and access.write. Which
# of the two, and how, is the type of the coefficients.
write_output = by_record(
    {
        ScaleShift: _write_y,
        ElementAffine: _write_y,
        Scale: _write_dx,
        ElementScale: _write_dx,
        Gradient: _write_dx,
        ElementGradient: _write_dx,
    }
)


@inline
def write_part(streamed, row, i, n, coef, c, y, k):
    """Write n elements, less than a line or a vector, by ordinary stores; see write_output."""
    for d in range(0, n, LANES):
        write_output(coef, streamed, row, i + d, min(LANES, n - d), c + d, y, k + d)


@inline
def write_row(streamed, row, n, coef, y, place, upcoming):
    """Write the output of a row of n elements to y (N,) from ``place`` on.

    The same elements of the ``upcoming`` row are prefetched.
    """
    start, head = np.intp(0), elements_to_line(streamed, y, place, n)
    if head > 0:
        prefetch_parts(y, place, n)
        write_part(streamed, row, start, head, coef, start, y, place)
    end = vectors_end(streamed, y, head, n)
    for i in range(head, end, LANES):
        prefetch_row(upcoming, i)
        write_output(coef, streamed, row, i, None, i, y, place + i)
    write_part(streamed, row, end, n - end, coef, end, y, place + end)


@called
def write_row_called(streamed, row, n, coef, y, place, upcoming):
    """Call write_row for a rare case: inlined twice into one kernel, both copies are slower."""
    write_row(streamed, row, n, coef, y, place, upcoming)


def _whole_y(coef, row, i, c):
    return make_y(row.fused, row, i, None, coef, c)


def _whole_dx(coef, row, i, c):
    dy = read_dy(row.fused, row.forward, row, i, None, c)
    return make_dx(load(coef, c, None), dy, read(row.x, i, None), read(row.mask, i, None))


# A whole vector of y or dx, see write_output.
_whole_output = by_record({ScaleShift: _whole_y, Scale: _whole_dx, Gradient: _whole_dx})


@inline
def _prefetch_two(row, i):
    prefetch_row(row, i)
    prefetch_row(row, i + LANES)


@inline
def _two_outputs(row, i, coef, c):
    return _whole_output(coef, row, i, c), _whole_output(coef, row, i + LANES, c + LANES)


@inline
def _write_two(streamed, vectors, y, k):
    write(streamed, vectors[0], y, k, None)
    write(streamed, vectors[1], y, k + LANES, None)


def _write_in_fours(fused, streamed, row, begin, end, coef, c, y, k, distance):
    n_fours = begin + (end - begin) // (2 * STEP) * (2 * STEP)
    for i in range(begin, n_fours, 2 * STEP):
        j = i + STEP
        if row.dy is None:
            _prefetch_two(row, i + distance)
            _prefetch_two(row, j + distance)
        ab, cd = _two_outputs(row, i, coef, c + i), _two_outputs(row, j, coef, c + j)
        _write_two(streamed, ab, y, k + i)
        _write_two(streamed, cd, y, k + j)
    for i in range(n_fours, end, LANES):
        write_output(coef, streamed, row, i, None, c + i, y, k + i)


def _write_one_by_one(fused, streamed, row, begin, end, coef, c, y, k, distance):
    for i in range(begin, end, LANES):
        prefetch_row(row, i + distance)
        write_output(coef, streamed, row, i, None, c + i, y, k + i)


_write_vectors = if_none(_write_in_fours, _write_one_by_one)


@inline
def _write_run(streamed, row, begin, end, coef, c, y, k, distance):
    """Write vectors of a row from ``begin`` to ``end``, see write_output, to y[k] and after it.

    Four are read before they are written: a load waits for an earlier store where the last 12 bits
    of their addresses are the same, and the core foresees better what is read next where several
    instructions do it. One by one takes 10 to 60 % longer on an EPYC. What is ``distance`` ahead is
    prefetched, unless dy is read, too, where that takes 15 % longer from the last cache.
    """
    _write_vectors(row.fused, streamed, row, begin, end, coef, c - begin, y, k - begin, distance)


@called
def write_block(streamed, dy, x, mask, fused, forward, a, lo, hi, c0, c1, coef, y):
    """Write rows lo to hi of y[a] (A, L, C), columns c0 to c1, with rows of coefficients.

    Whole rows are one run of memory, in which the coefficients repeat: they are rows of at least
    ``periodic_size(c1 - c0)`` elements then. ``forward`` are those of forward, or None.
    """
    out, step, n = flat_slice(y, 0, y.size), x.shape[2], c1 - c0
    first = (a * x.shape[1] + lo) * step + c0
    if n < step:
        for i in range(hi - lo):
            at = first + i * step
            row = take_row(dy, x, mask, fused, forward, at, n)
            upcoming = take_row(dy, x, None, fused, None, at + ROWS * step, 0)
            write_row(streamed, row, n, coef, out, at, upcoming)
        return
    n, period = (hi - lo) * step, periodic_size(step) - STEP
    row = take_row(dy, x, mask, fused, forward, first, n)
    start, head = np.intp(0), elements_to_line(streamed, out, first, n)
    if head > 0:
        write_part(streamed, row, start, head, coef, start, out, first)
    i, end = head, vectors_end(streamed, out, head, n)
    c = head - (period if head >= period else 0)
    while i < end:
        # Up to where the coefficients repeat, or a vector further.
        stop = min(i + (period - c + LANES - 1) // LANES * LANES, end)
        _write_run(streamed, row, i, stop, coef, c, out, first + i, ROWS * step)
        c += stop - i
        c -= period if c >= period else 0
        i = stop
    write_part(streamed, row, end, n - end, coef, c, out, first + end)


@inline
def periodic_size(n):
    """Return the size of a row of coefficients of n columns that repeat, as write_block wants it.

    A vector, or the part of a line of 16 bits that is less than a step, may begin anywhere in a
    period: n, or the next multiple of it from PERIOD on, as each takes some time to begin.
    """
    least, each = max(n, PERIOD), max(n, 1)
    return (least + each - 1) // each * each + STEP
