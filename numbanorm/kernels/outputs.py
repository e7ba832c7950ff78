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
    read_dy,
    read_mask,
    read_x,
    take_row,
    vectors_end,
    write,
    write_aligned,
)
from numbanorm.kernels.formulas import (
    ElementAffine,
    ElementGradient,
    ElementScale,
    Gradient,
    Scale,
    ScaleShift,
    element_affine,
    element_gradient,
    gradient,
    scale_shift,
)
from numbanorm.numba_ext.jit import by_type, called, inline
from numbanorm.numba_ext.vectors import load
from numbanorm.numba_ext.views import flat_slice
from numbanorm.tuning import LANES, ROWS


def _scale_shift(row, i, n, coef, c):
    return scale_shift(
        read_x(row, i, n), load(coef.m, c, n), load(coef.s, c, n), load(coef.t, c, n)
    )


def _element_affine(row, i, n, coef, c):
    return element_affine(
        read_x(row, i, n), load(coef.weight, c, n), load(coef.bias, c, n),
        load(coef.m, c, n), load(coef.rstd, c, n), load(coef.t, c, n),
    )  # fmt: skip


def _scale(row, i, n, coef, c):
    return load(coef.a, c, n) * read_dy(row, i, n)


def _element_scale(row, i, n, coef, c):
    return load(coef.rstd, c, n) * (read_dy(row, i, n) * load(coef.weight, c, n))


def _gradient(row, i, n, coef, c):
    return gradient(
        read_dy(row, i, n), read_x(row, i, n), read_mask(row, i, n), load(coef.a, c, n),
        load(coef.r, c, n), load(coef.m, c, n), load(coef.b, c, n), load(coef.c, c, n),
    )  # fmt: skip


def _element_gradient(row, i, n, coef, c):
    return element_gradient(
        read_dy(row, i, n), read_x(row, i, n), read_mask(row, i, n), load(coef.weight, c, n),
        load(coef.m, c, n), load(coef.rstd, c, n), load(coef.t, c, n),
        load(coef.c0, c, n), load(coef.c1, c, n),
    )  # fmt: skip


FORMULAS = {
    ScaleShift: _scale_shift,
    ElementAffine: _element_affine,
    Scale: _scale,
    ElementScale: _element_scale,
    Gradient: _gradient,
    ElementGradient: _element_gradient,
}


@by_type
def output(row, i, n, coef, c):
    """Return a vector of y or dx of a row from i on, see read_x; coefficients are read from c on.

    Which of the two, and how, is the type of ``coef``.
    """
    return FORMULAS[getattr(coef, "instance_class", type(coef))]


@inline
def write_row(streamed, row, n, coef, y, place, upcoming):
    """Write the output of a row of n elements to y (N,) from ``place`` on.

    The same elements of the ``upcoming`` row are prefetched.
    """
    start, head = np.intp(0), elements_to_line(streamed, y, place, n)
    if head > 0:
        prefetch_parts(y, place, n)
        write(output(row, start, head, coef, start), y, place, head)
    end = vectors_end(head, n)
    for i in range(head, end, LANES):
        prefetch_row(upcoming, i)
        write_aligned(streamed, output(row, i, None, coef, i), y, place + i)
    if end < n:
        write(output(row, end, n - end, coef, end), y, place + end, n - end)


@called
def write_row_called(streamed, row, n, coef, y, place, upcoming):
    """Call write_row for a rare case: inlined twice into one kernel, both copies are slower."""
    write_row(streamed, row, n, coef, y, place, upcoming)


@called
def write_block(streamed, dy, x, mask, a, lo, hi, c0, c1, coef, y):
    """Write rows lo to hi of y[a] (A, L, C), columns c0 to c1, with rows of coefficients.

    Whole rows are one run of memory, in which the coefficients repeat: they are rows of at least
    ``periodic_size(c1 - c0)`` elements then.
    """
    out, step, n = flat_slice(y, 0, y.size), x.shape[2], c1 - c0
    first = (a * x.shape[1] + lo) * step + c0
    if n < step:
        for i in range(hi - lo):
            at = first + i * step
            row, upcoming = take_row(dy, x, mask, at, n), take_row(dy, x, None, at + ROWS * step, 0)
            write_row(streamed, row, n, coef, out, at, upcoming)
        return
    n, period = (hi - lo) * step, periodic_size(step) - LANES
    row, upcoming = take_row(dy, x, mask, first, n), take_row(dy, x, None, first + ROWS * step, 0)
    start, head = np.intp(0), elements_to_line(streamed, out, first, n)
    if head > 0:
        write(output(row, start, head, coef, start), out, first, head)
    i, end, c = head, vectors_end(head, n), head
    while i < end:
        # Up to where the coefficients repeat, or a vector further.
        stop = min(i + (period - c + LANES - 1) // LANES * LANES, end)
        for k in range(i, stop, LANES):
            prefetch_row(upcoming, k)
            write_aligned(streamed, output(row, k, None, coef, c + k - i), out, first + k)
        c += stop - i
        c -= period if c >= period else 0
        i = stop
    if end < n:
        write(output(row, end, n - end, coef, c), out, first + end, n - end)


@inline
def periodic_size(n):
    """Return the size of a row of coefficients of n columns that repeat, as write_block wants it.

    A vector may begin anywhere in a period: n, or the next multiple of it from LANES on.
    """
    least, each = max(n, LANES), max(n, 1)
    return (least + each - 1) // each * each + LANES
