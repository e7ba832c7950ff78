"""Groups that are columns with a weight for each row, forward and backward."""

import numpy as np

from numbanorm.kernels.access import take_row
from numbanorm.kernels.columns import column_block
from numbanorm.kernels.formulas import (
    column_coefficients,
    element_gradient,
    scale_shift,
    unshift,
    write_rstds,
    write_statistics,
)
from numbanorm.kernels.reduce import add_to_columns, add_to_vector
from numbanorm.kernels.rows import normalize_vector
from numbanorm.kernels.scratch import three_rows
from numbanorm.kernels.stream import buffer_size, write_buffered_row, write_vectors
from numbanorm.numba_ext.jit import inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, fence, release, to_next_line
from numbanorm.numba_ext.vectors import leading, load, splat, store, total
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LANES, ROWS


@inline
def _begin_columns(values, place, n_rows, center, s0, s1):
    """Write values from ``place`` on, unless there are no rows, to center (n,), and 0 to sums."""
    for c in range(center.shape[0]):
        center[c] = values[place + c] if n_rows > 0 else 0.0
        s0[c], s1[c] = 0.0, 0.0


@inline
def _block_of_lines(unit, early, n_columns, width):
    """Return the outer index and the columns of a unit of work, where ``early`` a line begins."""
    n_blocks = max((n_columns - early + width - 1) // width, 1)
    a = unit // n_blocks
    c0 = (unit - a * n_blocks) * width
    return a, c0 + (early if c0 > 0 else 0), min(c0 + early + width, n_columns)


@inline
def _vectors_beside(i, length, n):
    """Return which vectors of n columns are summed up beside row i, from ... to.

    They are those of ROWS rows, of which a share is added beside each of as many rows.
    """
    q, n_vectors = i % ROWS, n // LANES
    if i - q + ROWS > length:
        return 0, 0
    return q * n_vectors // ROWS, (q + 1) * n_vectors // ROWS


@inline
def _add_rest(dy, x, weight, a, c0, c1, center, s0, s1):
    """Add what is not summed up beside rows: columns and rows that are too few for it."""
    length, n = x.shape[1], c1 - c0
    whole, whole_rows = n // LANES * LANES, length // ROWS * ROWS
    for lo, hi, c in ((0, whole_rows, whole), (whole_rows, length, 0)):
        rest = n - c
        add_to_columns(
            dy, x, None, weight, a, lo, hi, c0 + c, c1,
            flat_slice(center, c, rest), flat_slice(s0, c, rest), flat_slice(s1, c, rest),
        )  # fmt: skip


@inline
def _columns_beside(
    dys, xs, weight, i, step, next_row, first, last, center, s0, s1, write, totals, row, n, coef, ys
):
    """Add vectors of ROWS rows from ``coming`` on to their sums, while a row (n,) is written.

    ``write`` is the function that writes a vector of the row, and adds to ``totals``, which are
    returned.
    """
    n_steps = n // (ROWS * LANES)
    for k in range(max(last - first, n_steps)):
        if first + k < last:
            c = (first + k) * LANES
            at = next_row + c
            add_to_vector(
                dys, xs, None, weight, i, ROWS, at, step, at + ROWS * step, step, c, None,
                center, s0, s1,
            )  # fmt: skip
        if k < n_steps:
            for j in range(k * ROWS * LANES, (k + 1) * ROWS * LANES, LANES):
                totals = write(totals, row, j, None, coef, ys)
    for j in range(n_steps * ROWS * LANES, n, LANES):
        totals = write(totals, row, j, min(LANES, n - j), coef, ys)
    return totals


@inline
def _normalize_column_vector(totals, row, i, n, coef, ys):
    """Write a vector as normalize_vector does, with nothing to add up."""
    normalize_vector(row, i, n, coef, ys, i)
    return totals


@kernel
def forward_element_columns(
    threads, x, parameters, eps, center, use_batch_stats, width, streamed, statistics, y
):
    """Normalise columns: x, y (A, D, B), weight and bias (2, D).

    ``statistics`` (3, A * B) are taken and written if ``use_batch_stats``, else read. If ``streamed``, which
    is True or None, a block of columns is summed up while the one before it is written.
    """
    n_outer, length, n_columns = x.shape
    # A store to a part of a line waits for the line, and what is stored later waits, too: blocks
    # end where lines do. A column's sums do not depend on its block.
    early = np.intp(0) if streamed is None else to_next_line(y, 0)
    n_blocks = max((n_columns - early + width - 1) // width, 1)
    begin, end = thread_range(threads, n_outer * n_blocks)
    (weight, bias), (count, mean, var) = unstack(parameters, 2), unstack(statistics, 3)
    most = width + LANES
    sums, rstd = allocate(3, most, mean.dtype), allocate(None, most, mean.dtype)
    rows = allocate(3, most, y.dtype)
    buffer = allocate(None, buffer_size(most, streamed, y), y.dtype)
    xs, ys, is_summed = flat_slice(x, 0, x.size), flat_slice(y, 0, y.size), False
    for unit in range(begin, end):
        a, c0, c1 = _block_of_lines(unit, early, n_columns, width)
        n, first, place = c1 - c0, a * n_columns + c0, a * length * n_columns + c0
        s1, s2, shift = three_rows(sums, n)
        groups = flat_slice(count, first, n), flat_slice(mean, first, n), flat_slice(var, first, n)
        if use_batch_stats:
            if not is_summed:
                _begin_columns(xs, place, length, shift, s1, s2)
                add_to_columns(None, x, None, None, a, 0, length, c0, c1, shift, s1, s2)
            for c in range(n):
                mu, _, m2 = unshift(length, shift[c], s1[c], s2[c])
                write_statistics(c, length, mu, m2, center, *groups)
        write_rstds(groups[0], groups[2], eps, rstd)
        m, r, t = three_rows(rows, n)
        column_coefficients(groups[1], rstd, m, r, t)
        is_summed = streamed is not None and use_batch_stats and unit + 1 < end
        if is_summed:
            a, c0, c1 = _block_of_lines(unit + 1, early, n_columns, width)
        n_next, next_row = c1 - c0 if is_summed else 0, a * length * n_columns + c0
        s1, s2, shift = three_rows(sums, n_next)
        _begin_columns(xs, next_row, length, shift, s1, s2)
        for i in range(length):
            coef, row = (weight[i], bias[i], m, r, t), take_row(None, x, None, place, n)
            if streamed is None:
                # The block is in a cache since its sums were taken.
                nothing_asked, start = (None, None, None), np.intp(0)
                write_vectors(normalize_vector, row, nothing_asked, start, n, coef, ys, place)
            else:
                lo, hi = _vectors_beside(i, length, n_next)
                from_row = i // ROWS * ROWS
                _columns_beside(
                    None, xs, None, 0, n_columns, next_row + from_row * n_columns, lo, hi, shift,
                    s1, s2, _normalize_column_vector, None, row, n, coef, buffer,
                )  # fmt: skip
                write_buffered_row(buffer, n, ys, place, ROWS * n_columns)
            place += n_columns
        if is_summed:
            _add_rest(None, x, None, a, c0, c1, shift, s1, s2)
    if streamed is not None:
        fence()
    release((sums, rstd, rows, buffer))


@inline
def _backward_column_vector(totals, row, i, n, coef, dxs):
    """Write dx of a vector to dxs[i]; add to vectors of the sums of dy * x_hat and of dy.

    They are added up in the type of the elements, see _add_four_rows.
    If not ``use_batch_stats``, which is the last of a row, the statistics do not come from x.
    """
    (dys, xs, use_batch_stats), (weight, m, r, t, c0, c1) = row, coef
    dy, x = load(dys, i, n), load(xs, i, n)
    m, r, t = load(m, i, n), load(r, i, n), load(t, i, n)
    c0, c1 = load(c0, i, n), load(c1, i, n)
    dx = element_gradient(dy, x, leading(use_batch_stats * LANES), splat(weight), m, r, t, c0, c1)
    store(dx, dxs, i, n)
    return totals[0] + dy * scale_shift(x, m, r, t), totals[1] + dy


@inline
def _backward_column_row(totals, row, n, coef, dxs):
    """Write the gradient of a row of n elements; add to totals as _backward_column_vector does."""
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        totals = _backward_column_vector(totals, row, i, None, coef, dxs)
    if whole < n:
        totals = _backward_column_vector(totals, row, whole, n - whole, coef, dxs)
    return totals


@kernel
def backward_element_columns(
    threads, dy, x, parameters, eps, center, use_batch_stats, affine, width, streamed,
    statistics, dx, dparameters,
):  # fmt: skip
    """Write dx and parameter gradients of columns: dy, x, dx (A, D, B), weight first in (2, D).

    ``statistics`` (3, A * B) are those of forward; dweight and dbias (2, T, D), a row for each
    of T tasks, start at 0 and are left alone unless ``affine``. See forward_element_columns about
    ``streamed``.
    """
    n_outer, length, n_columns = x.shape
    n_tasks = dparameters.shape[1]
    # Blocks do not end where lines do: a row's sums depend on them, and must not on dx's address.
    n_units = n_outer * ((n_columns + width - 1) // width)
    task, last_task = thread_range(threads, n_tasks)
    begin, end = task * n_units // n_tasks, last_task * n_units // n_tasks
    (weight,), (dweight, dbias) = unstack(parameters, 1), unstack(dparameters, 2)
    count, mean, var = unstack(statistics, 3)
    sums, rstd = allocate(3, width, mean.dtype), allocate(None, width, mean.dtype)
    rows = allocate(5, width, dx.dtype)
    buffer = allocate(None, buffer_size(width, streamed, dx), dx.dtype)
    m, r, t, g0, g1 = unstack(rows, 5)
    dys, xs, dxs = flat_slice(dy, 0, dy.size), flat_slice(x, 0, x.size), flat_slice(dx, 0, dx.size)
    is_summed, zero = False, dx.dtype.type(0.0)
    for unit in range(begin, end):
        while (task + 1) * n_units // n_tasks <= unit:
            task += 1
        a, c0, c1 = column_block(unit, n_columns, width)
        n, first, place = c1 - c0, a * n_columns + c0, a * length * n_columns + c0
        s0, s1, means = three_rows(sums, n)
        if not is_summed:
            _begin_columns(mean, first, length, means, s0, s1)
            add_to_columns(dy, x, None, weight, a, 0, length, c0, c1, means, s0, s1)
        write_rstds(flat_slice(count, first, n), flat_slice(var, first, n), eps, rstd)
        column_coefficients(means, rstd, m, r, t)
        for c in range(n):
            n_all = max(count[first + c], 1.0)
            g0[c] = s0[c] / n_all if center else 0.0
            g1[c] = s1[c] * rstd[c] / n_all
        is_summed = streamed is not None and unit + 1 < end
        if is_summed:
            a, c0, c1 = column_block(unit + 1, n_columns, width)
        n_next, next_row = c1 - c0 if is_summed else 0, a * length * n_columns + c0
        s0, s1, means = three_rows(sums, n_next)
        _begin_columns(mean, a * n_columns + c0, length, means, s0, s1)
        for i in range(length):
            row = flat_slice(dy, place, n), flat_slice(x, place, n), use_batch_stats
            coef, totals = (weight[i], m, r, t, g0, g1), (splat(zero), splat(zero))
            if streamed is None:
                totals = _backward_column_row(totals, row, n, coef, flat_slice(dx, place, n))
            else:
                lo, hi = _vectors_beside(i, length, n_next)
                from_row = i // ROWS * ROWS
                totals = _columns_beside(
                    dys, xs, weight, from_row, n_columns, next_row + from_row * n_columns, lo, hi,
                    means, s0, s1, _backward_column_vector, totals, row, n, coef, buffer,
                )  # fmt: skip
                write_buffered_row(buffer, n, dxs, place, ROWS * n_columns)
            if affine:
                dweight[task, i] += total(totals[0])
                dbias[task, i] += total(totals[1])
            place += n_columns
        if is_summed:
            _add_rest(dy, x, weight, a, c0, c1, means, s0, s1)
    if streamed is not None:
        fence()
    release((sums, rstd, rows, buffer))
