"""Groups that are columns with a weight for each row: (A, D, B), as LayerNorm over channels."""

import numpy as np

from numbanorm.kernels.access import (
    Row,
    arithmetic,
    read,
    read_one,
    stream_row,
    take_row,
    write,
)
from numbanorm.kernels.formulas import (
    ElementAffine,
    ElementGradient,
    column_coefficients,
    invert_roots,
    make_dx,
    unshift,
    write_rstds,
    write_statistics,
    x_hat,
)
from numbanorm.kernels.fused import make_y, read_dy, write_dresidual
from numbanorm.kernels.modes import ColumnTiles, Mode
from numbanorm.kernels.outputs import write_row
from numbanorm.kernels.reduce import ColumnAffine, add_to_columns, add_to_vector
from numbanorm.kernels.scratch import three_rows
from numbanorm.numba_ext.jit import if_none, inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, fence, line_size, release, to_next_line
from numbanorm.numba_ext.vectors import load, splat, total
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LANES, ROWS

# Software pipelining, with streaming stores: while a row of one block of columns is written, some
# vectors of ROWS rows of the next block are reduced. The row that is written goes through a buffer,
# as the sums over it must not depend on where lines of memory begin.


@inline
def _begin_columns(x, place, n_rows, center, s0, s1):
    """Write 0 to the sums, and a row at ``place`` to center (n,), or 0 if there are no rows.

    The row is the first of x (N,); in backward x are the means (A * B,).
    """
    for c in range(center.size):
        center[c] = read_one(x, place + c) if n_rows > 0 else 0.0
        s0[c], s1[c] = 0.0, 0.0


@inline
def _block(unit, early, n_columns, width):
    """Return outer index and columns of a block; the first of a row has ``early`` more."""
    n_blocks = max((n_columns - early + width - 1) // width, 1)
    a = unit // n_blocks
    c0 = (unit - a * n_blocks) * width
    return a, c0 + (early if c0 > 0 else 0), min(c0 + early + width, n_columns)


@inline
def _add_tail(dy, x, fused, forward, weight, a, c0, c1, center, s0, s1):
    """Add what _reduce_while_writing leaves: columns and rows after the last vector of ROWS."""
    length, n = x.shape[1], c1 - c0
    n_vector, n_rows = n // LANES * LANES, length // ROWS * ROWS
    for lo, hi, c in ((0, n_rows, n_vector), (n_rows, length, 0)):
        n_tail = n - c
        add_to_columns(
            dy, x, None, fused, _columns_from(forward, c, n_tail), weight, a, lo, hi, c0 + c, c1,
            flat_slice(center, c, n_tail), flat_slice(s0, c, n_tail), flat_slice(s1, c, n_tail),
        )  # fmt: skip


_columns_from = if_none(
    lambda forward, c, n: None,
    lambda forward, c, n: ColumnAffine(
        forward.weight, forward.bias,
        flat_slice(forward.m, c, n), flat_slice(forward.rstd, c, n), flat_slice(forward.t, c, n),
    ),
)  # fmt: skip


@inline
def _forward_coefficients(fused, parameters, mean, var, eps, rows):
    """Return ColumnAffine of forward, in rows that are written if they are needed."""
    (weight, bias), (m, r, t) = unstack(parameters, 2), three_rows(rows, mean.size)
    if fused is not None:
        rstd = allocate(None, mean.size, np.float64)
        for c in range(mean.size):
            rstd[c] = 1.0  # there is no empty group without a mask
        invert_roots(var, eps, rstd)
        column_coefficients(mean, rstd, m, r, t)
        release((rstd,))
    return ColumnAffine(weight, bias, m, r, t)


def _write_y(totals, row, i, n, coef, target):
    write(False, make_y(row.fused, row, i, n, coef, i), target, i, n)
    return totals


def _write_dx(totals, row, i, n, coef, target):
    dy, x, values = (
        read_dy(row.fused, row.forward, row, i, n, i),
        read(row.x, i, n),
        load(coef, i, n),
    )
    totals = totals[0] + dy * x_hat(x, values.m, values.rstd, values.t), totals[1] + dy
    # After dy was read: dx may be that.
    write(False, make_dx(values, dy, x, read(row.mask, i, n)), target, i, n)
    write_dresidual(row.fused, False, row, dy, i, n)
    return totals


# Write a vector of a row to target[i]; return ``totals`` with dy * x_hat and dy of it added. They
# are accumulated in the type of the elements: each of a vector's many lanes gets too few of them
# for float32 to lose digits.
_write_vector = if_none(_write_y, _write_dx)


@inline
def _write_whole_row(totals, row, n, coef, target):
    """Write a row of n elements; return totals as _write_vector does."""
    end = n // LANES * LANES
    for i in range(0, end, LANES):
        totals = _write_vector(totals, row, i, None, coef, target)
    if end < n:
        totals = _write_vector(totals, row, end, n - end, coef, target)
    return totals


@inline
def _reduce_while_writing(data, weight, i, length, step, at, n_next, sums, totals, row, n, coef, y):
    """Write row i (n,) of a block to y, and meanwhile reduce some vectors of the next block.

    ``data`` is all of dy and x; the next block has ``n_next`` columns, and the first of its rows
    begins at ``at``. ``sums`` are its center, s0 and s1; totals are as in _write_vector.
    """
    # While ROWS rows are written, as many of the next block are reduced: a share with each.
    q, n_vectors = i % ROWS, n_next // LANES
    first, last = q * n_vectors // ROWS, (q + 1) * n_vectors // ROWS
    if i - q + ROWS > length:
        first, last = 0, 0
    at += (i - q) * step
    n_steps = n // (ROWS * LANES)
    for k in range(max(last - first, n_steps)):
        if first + k < last:
            c = (first + k) * LANES
            upcoming = at + c + ROWS * step
            add_to_vector(data, weight, i - q, ROWS, at + c, step, upcoming, step, c, None, *sums)
        if k < n_steps:
            for j in range(k * ROWS * LANES, (k + 1) * ROWS * LANES, LANES):
                totals = _write_vector(totals, row, j, None, coef, y)
    for j in range(n_steps * ROWS * LANES, n, LANES):
        totals = _write_vector(totals, row, j, min(LANES, n - j), coef, y)
    return totals


@kernel
def forward_element_columns(threads, x, fused, parameters, mode, tiles, streamed, group_stats, y):
    """Normalise columns: x, y (A, D, B), weight and bias (2, D).

    ``group_stats`` (3, A * B) are taken and written if ``mode.use_batch_stats``, else read. A block
    has ``tiles.width`` columns. If ``streamed``, the next block is reduced while one is written.
    """
    mode, tiles = Mode(*mode), ColumnTiles(*tiles)
    n_outer, length, n_columns = x.shape
    use_batch_stats, width = mode.use_batch_stats, tiles.width
    # Blocks end where lines do: a store to a part of a line waits for that line, and later stores
    # wait behind it. A column's sums do not depend on its block.
    early = np.intp(0) if not streamed else to_next_line(y, 0)
    begin, end = thread_range(threads, n_outer * max((n_columns - early + width - 1) // width, 1))
    (weight, bias), (count, mean, var) = unstack(parameters, 2), unstack(group_stats, 3)
    size = width + line_size(y)
    sums, rstd = allocate(3, size, np.float64), allocate(None, size, np.float64)
    rows, buffer = allocate(3, size, arithmetic(x)), allocate(None, size, arithmetic(x))
    xs, ys, is_reduced = flat_slice(x, 0, x.size), flat_slice(y, 0, y.size), False
    data = take_row(None, x, None, None, None, 0, x.size)
    for unit in range(begin, end):
        a, c0, c1 = _block(unit, early, n_columns, width)
        n, first, place = c1 - c0, a * n_columns + c0, a * length * n_columns + c0
        s1, s2, shift = three_rows(sums, n)
        groups = flat_slice(count, first, n), flat_slice(mean, first, n), flat_slice(var, first, n)
        if use_batch_stats:
            if not is_reduced:
                _begin_columns(xs, place, length, shift, s1, s2)
                place_of_block = a, 0, length, c0, c1
                add_to_columns(None, x, None, None, None, None, *place_of_block, shift, s1, s2)
            for c in range(n):
                mu, m2, _ = unshift(length, shift[c], s1[c], s2[c])
                write_statistics(c, length, mu, m2, mode.center, *groups)
        write_rstds(groups[0], groups[2], mode.eps, rstd)
        m, r, t = three_rows(rows, n)
        column_coefficients(groups[1], rstd, m, r, t)
        is_reduced = streamed and use_batch_stats and unit + 1 < end
        if is_reduced:
            a, c0, c1 = _block(unit + 1, early, n_columns, width)
        n_next, next_at = c1 - c0 if is_reduced else 0, a * length * n_columns + c0
        s1, s2, shift = three_rows(sums, n_next)
        _begin_columns(xs, next_at, length, shift, s1, s2)
        for i in range(length):
            coef = ElementAffine(weight[i], bias[i], m, r, t)
            row = take_row(None, x, None, fused, None, place, n)
            if not streamed:
                # The block is in a cache since it was reduced.
                upcoming = take_row(None, x, None, fused, None, place, 0)
                write_row(streamed, row, n, coef, ys, place, upcoming)
            else:
                _reduce_while_writing(
                    data, None, i, length, n_columns, next_at, n_next, (shift, s1, s2), None, row,
                    n, coef, buffer,
                )  # fmt: skip
                stream_row(buffer, n, ys, place, ROWS * n_columns)
            place += n_columns
        if is_reduced:
            _add_tail(None, x, None, None, None, a, c0, c1, shift, s1, s2)
    if streamed:
        fence()
    release((sums, rstd, rows, buffer))


@kernel
def backward_element_columns(
    threads, dy, x, fused, parameters, mode, tiles, streamed, group_stats, dx, dparameters
):
    """Write dx and parameter gradients of columns: dy, x, dx (A, D, B), weight first in (2, D).

    ``group_stats`` (3, A * B) are those of forward; dweight and dbias (2, T, D), a row for each
    of T tasks, start at 0, and are left alone if they are empty. See forward_element_columns about
    ``streamed``.
    """
    mode, tiles = Mode(*mode), ColumnTiles(*tiles)
    n_outer, length, n_columns = x.shape
    n_tasks, width, has_weights = dparameters.shape[1], tiles.width, dparameters.shape[2] > 0
    # Blocks do not end where lines do: a row's sums depend on them, and must not on dx's address.
    n_units = n_outer * ((n_columns + width - 1) // width)
    task, last_task = thread_range(threads, n_tasks)
    begin, end = task * n_units // n_tasks, last_task * n_units // n_tasks
    (weight, bias), (dweight, dbias) = unstack(parameters, 2), unstack(dparameters, 2)
    count, mean, var = unstack(group_stats, 3)
    sums, rstd = allocate(3, width, np.float64), allocate(None, width, np.float64)
    rows, buffer = allocate(5, width, arithmetic(x)), allocate(None, width + LANES, arithmetic(x))
    # Where the statistics do not come from x, nothing counts in them.
    counts = allocate(None, width, np.bool_)
    for c in range(width):
        counts[c] = mode.use_batch_stats
    m, r, t, g0, g1 = unstack(rows, 5)
    dxs, is_reduced, zero = flat_slice(dx, 0, dx.size), False, arithmetic(x)(0.0)
    forward_rows = allocate(3, width, arithmetic(x))
    for unit in range(begin, end):
        while (task + 1) * n_units // n_tasks <= unit:
            task += 1
        a, c0, c1 = _block(unit, np.intp(0), n_columns, width)
        n, first, place = c1 - c0, a * n_columns + c0, a * length * n_columns + c0
        s0, s1, means = three_rows(sums, n)
        if not is_reduced:
            _begin_columns(mean, first, length, means, s0, s1)
            forward = _forward_coefficients(
                fused, parameters, means, flat_slice(var, first, n), mode.eps, forward_rows
            )
            place_of_block = a, 0, length, c0, c1
            add_to_columns(dy, x, None, fused, forward, weight, *place_of_block, means, s0, s1)
        write_rstds(flat_slice(count, first, n), flat_slice(var, first, n), mode.eps, rstd)
        column_coefficients(means, rstd, m, r, t)
        for c in range(n):
            n_all = max(count[first + c], 1.0)
            g0[c] = s0[c] / n_all if mode.center else 0.0
            g1[c] = s1[c] * rstd[c] / n_all
        is_reduced = streamed and unit + 1 < end
        if is_reduced:
            a, c0, c1 = _block(unit + 1, np.intp(0), n_columns, width)
        n_next, next_at = c1 - c0 if is_reduced else 0, a * length * n_columns + c0
        s0, s1, means = three_rows(sums, n_next)
        next_group = a * n_columns + c0
        _begin_columns(mean, next_group, length, means, s0, s1)
        forward = _forward_coefficients(
            fused, parameters, means, flat_slice(var, next_group, n_next), mode.eps, forward_rows
        )
        next_data = take_row(dy, x, None, fused, forward, 0, x.size)
        for i in range(length):
            affine = ElementAffine(weight[i], bias[i], m, r, t)
            row, counted = take_row(dy, x, None, fused, None, place, n), flat_slice(counts, 0, n)
            row = Row(row.dy, row.x, counted, row.fused, row.residual, row.dresidual, affine)
            coef, totals = ElementGradient(weight[i], m, r, t, g0, g1), (splat(zero), splat(zero))
            if not streamed:
                target = flat_slice(dx, place, n)
                totals = _write_whole_row(totals, row, n, coef, target)
            else:
                totals = _reduce_while_writing(
                    next_data, weight, i, length, n_columns, next_at, n_next, (means, s0, s1),
                    totals, row, n, coef, buffer,
                )  # fmt: skip
                stream_row(buffer, n, dxs, place, ROWS * n_columns)
            if has_weights:
                dweight[task * length + i] += total(totals[0])
                dbias[task * length + i] += total(totals[1])
            place += n_columns
        if is_reduced:
            _add_tail(dy, x, fused, forward, weight, a, c0, c1, means, s0, s1)
    if streamed:
        fence()
    release((sums, rstd, rows, buffer, counts, forward_rows))
