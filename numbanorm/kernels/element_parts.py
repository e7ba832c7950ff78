"""Groups that are long rows with a weight for each element: (M, D), of few samples.

A task is a part of all rows, which have the weights of that part in common. As rows do not fit in a
core's own cache they are read twice, and weights, and their gradients, may be as large as x.
"""

import numpy as np

from numbanorm.kernels.access import arithmetic, prefetch_row, take_row
from numbanorm.kernels.element_rows import terms
from numbanorm.kernels.formulas import (
    ElementAffine,
    ElementGradient,
    ElementScale,
    round_coefficients,
    write_rstds,
)
from numbanorm.kernels.modes import Mode
from numbanorm.kernels.outputs import write_row, write_row_called
from numbanorm.kernels.scratch import clear, copy_values
from numbanorm.numba_ext.jit import if_none, inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, fence, release
from numbanorm.numba_ext.vectors import load, store, total, widen
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LANES


@inline
def _next_part(i, n_rows, length, part):
    """Return how far the next part is from that of row i: the same of the next row, if any."""
    return length if i + 1 < n_rows else part - i * length


@inline
def _add_vector(row, i, n, dweight, dbias):
    """Add dy * x_hat and dy to dweight and dbias from i on; see access.read about n.

    Return vectors of g = dy * weight, and of g * x_hat.
    """
    dy, product = terms(row, i, n)
    store(load(dweight, i, n) + widen(product), dweight, i, n)
    store(load(dbias, i, n) + widen(dy), dbias, i, n)
    w = load(row.forward.weight, i, n)
    return dy * w, product * w


@inline
def _add_part(row, n, dweight, dbias, upcoming):
    """Add what backward sums up over n elements of a row; return the sums of g and g * x_hat."""
    n_vector = n // LANES * LANES
    g, g_hat = _add_vector(row, n_vector, n - n_vector, dweight, dbias)
    for i in range(0, n_vector, LANES):
        prefetch_row(upcoming, i)
        next_g, next_g_hat = _add_vector(row, i, None, dweight, dbias)
        g, g_hat = g + next_g, g_hat + next_g_hat
    return total(g), total(g_hat)


@kernel
def reduce_element_parts(
    threads, dy, x, mask, fused, weight, bias, mode, tiles, group_stats, sums, dparameters
):
    """Reduce what backward needs of parts of rows: dy, x, mask or None (M, D), weight, bias (D,).

    ``group_stats`` (3, M) are those of forward. ``sums`` (2, M, K) are those of dy * weight and
    dy * weight * x_hat over each part; dweight and dbias (2, D) are written unless they are empty.
    """
    mode, (n_rows, length), part = Mode(*mode), x.shape, tiles[0]
    begin, end = thread_range(threads, sums.shape[2])
    (count, mean, var), (s0, s1) = unstack(group_stats, 3), unstack(sums, 2)
    rstd, gradients = allocate(None, n_rows, np.float64), allocate(2, part, np.float64)
    write_rstds(count, var, mode.eps, rstd)
    dweight, dbias = unstack(gradients, 2)
    for task in range(begin, end):
        lo = task * part
        n = min(part, length - lo)
        part_weight, part_bias = flat_slice(weight, lo, n), flat_slice(bias, lo, n)
        clear(gradients)
        for i in range(n_rows):
            at = i * length + lo
            rounded = round_coefficients(mean[i], rstd[i], 0.0, arithmetic(x))
            affine = ElementAffine(part_weight, part_bias, *rounded)
            row = take_row(dy, x, mask, fused, affine, at, n)
            next_at = at + _next_part(i, n_rows, length, part)
            upcoming, to = take_row(dy, x, mask, fused, None, next_at, 0), i * sums.shape[2] + task
            s0[to], s1[to] = _add_part(row, n, dweight, dbias, upcoming)
        if dparameters.shape[1] > 0:
            for k in range(2):
                of_part = flat_slice(gradients, k * gradients.shape[1], n)
                copy_values(of_part, flat_slice(dparameters, k * length + lo, n))
    release((rstd, gradients))


def _y_of_part(dy, streamed, mode, row, n, coef, c0, c1, y, at, upcoming):
    write_row(streamed, row, n, coef, y, at, upcoming)


def _dx_of_part(dy, streamed, mode, row, n, coef, c0, c1, dx, at, upcoming):
    weight, _, m, r, t = coef
    if mode.use_batch_stats:
        row_coef = ElementGradient(weight, m, r, t, c0, c1)
        write_row(streamed, row, n, row_coef, dx, at, upcoming)
    else:
        write_row_called(streamed, row, n, ElementScale(weight, r), dx, at, upcoming)


_write_part = if_none(_y_of_part, _dx_of_part)


@kernel
def apply_element_parts(
    threads, dy, x, mask, fused, weight, bias, mode, tiles, streamed, group_stats, sums, y, kept
):
    """Write y, or with dy dx, of rows: dy or None, x, mask or None, y (M, D), weight, bias (D,).

    ``group_stats`` (3, M) are count, mean and variance of each row; ``sums`` (2, M) those of
    reduce_element_parts over whole rows, which are not read without dy. Copies of weight and bias
    are written to ``kept`` (0, 1 or 2, D), for backward.
    """
    mode, (n_rows, length), part = Mode(*mode), x.shape, tiles[0]
    begin, end = thread_range(threads, (length + part - 1) // part)
    (count, mean, var), (s0, s1) = unstack(group_stats, 3), unstack(sums, 2)
    rstd, out = allocate(None, n_rows, np.float64), flat_slice(y, 0, y.size)
    write_rstds(count, var, mode.eps, rstd)
    for task in range(begin, end):
        lo = task * part
        n = min(part, length - lo)
        part_weight, part_bias = flat_slice(weight, lo, n), flat_slice(bias, lo, n)
        for i in range(n_rows):
            at = i * length + lo
            rounded = round_coefficients(mean[i], rstd[i], 0.0, arithmetic(x))
            n_all = max(count[i], 1.0)
            c0 = arithmetic(x)(s0[i] / n_all if mode.center else 0.0)
            affine = ElementAffine(part_weight, part_bias, *rounded)
            row = take_row(dy, x, mask, fused, affine, at, n)
            next_at = at + _next_part(i, n_rows, length, part)
            upcoming = take_row(dy, x, mask, fused, None, next_at, 0)
            c1 = arithmetic(x)(s1[i] / n_all)
            _write_part(dy, streamed, mode, row, n, affine, c0, c1, out, at, upcoming)
        # While they are in a core's first cache.
        if kept.shape[0] > 0:
            copy_values(part_weight, flat_slice(kept, lo, n))
        if kept.shape[0] > 1:
            copy_values(part_bias, flat_slice(kept, length + lo, n))
    if streamed:
        fence()
    release((rstd,))
