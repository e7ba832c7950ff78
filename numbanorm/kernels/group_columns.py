"""Groups of columns next to each other: (A, L, F * C), reduced and written in one kernel each.

A row holds each column F times, once for each of the rows of x that are folded into it, and is one
block then. ``span`` columns next to each other share a weight, and some more are a group.
"""

from typing import NamedTuple

import numpy as np

from numbanorm.kernels.access import arithmetic, read_one
from numbanorm.kernels.formulas import (
    Gradient,
    Scale,
    ScaleShift,
    group_coefficients,
    store_scale_shift,
    unshift_all,
    write_all_statistics,
    write_rstds,
)
from numbanorm.kernels.modes import ColumnTiles, Mode
from numbanorm.kernels.outputs import periodic_size, write_block
from numbanorm.kernels.reduce import add_rows, add_to_columns, first_of_columns
from numbanorm.kernels.scratch import (
    add_folds,
    add_up,
    clear,
    repeat_columns,
    spread,
    take_features,
    three_rows,
)
from numbanorm.numba_ext.jit import called, inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, fence, release
from numbanorm.numba_ext.vectors import load
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LANES


class Block(NamedTuple):
    """Columns ``c0`` to ``c1`` of x[a], in groups of ``size``, of which ``n`` are not repeated.

    They are ``n_groups`` groups from ``group`` on, and ``n_spans`` spans from ``first_span`` on.
    """

    a: int
    c0: int
    c1: int
    size: int
    n: int
    group: int
    n_groups: int
    first_span: int
    n_spans: int


@inline
def _n_tasks(width, shape):
    """Return how many blocks an array of this shape has."""
    return shape[0] * ((shape[2] + width - 1) // width)


@inline
def _block(task, tiles, shape, n_features, n_groups):
    """Return the block of a task."""
    n_outer, _, n_folded = shape
    n_spans = n_features // n_outer
    n_columns, n_groups = n_spans * tiles.span, n_groups // n_outer
    size = n_columns // n_groups
    n_blocks = (n_folded + tiles.width - 1) // tiles.width
    a, c0 = task // n_blocks, task % n_blocks * tiles.width
    c1 = min(c0 + tiles.width, n_folded)
    n = min(c1, n_columns) - c0
    return Block(
        a, c0, c1, size, n,
        a * n_groups + c0 // size, n // size, a * n_spans + c0 // tiles.span, n // tiles.span,
    )  # fmt: skip


@inline
def _shifts_of_groups(x, mask, t, shift):
    """Write the shift of each column of a block: an element of its group that counts, or 0."""
    n, at = t.c1 - t.c0, t.a * x.shape[1] * x.shape[2] + t.c0
    flat = flat_slice(x, 0, x.size)
    if mask is None and t.size == 1:
        first_row = flat_slice(x, at, t.n)
        for c in range(t.n):
            shift[c] = read_one(first_row, c)
        repeat_columns(shift, t.n)
        return
    if mask is None:
        for c in range(0, n, t.size):
            shift[c] = read_one(flat, at + c)
    else:
        has_shift = allocate(None, n, np.bool_)
        counts = flat_slice(mask, 0, mask.size)
        first_of_columns(flat, counts, at, x.shape[2], x.shape[1], shift, has_shift)
        for c in range(0, n, t.size):
            for k in range(c + t.size - 1, c - 1, -1):
                if has_shift[k]:
                    shift[c], has_shift[c] = shift[k], True
        for c in range(t.n, n, t.size):
            if has_shift[c] and not has_shift[c % t.n]:
                has_shift[c % t.n] = True
                shift[c % t.n] = shift[c]
        release((has_shift,))
    for lo in range(0, n, t.n):
        for c in range(lo, min(lo + t.n, n), t.size):
            for k in range(c, c + t.size):
                shift[k] = shift[c - lo]


@inline
def _take_statistics(x, mask, t, center, count, mean, var):
    """Write count, mean and variance of the groups of a block."""
    n = t.c1 - t.c0
    scratch = allocate(4, n, np.float64)
    clear(scratch)
    s1, s2, shift = three_rows(scratch, n)
    counts = flat_slice(scratch, 3 * scratch.shape[1], n)
    _shifts_of_groups(x, mask, t, shift)
    add_rows(x, mask, t.a, 0, x.shape[1], t.c0, t.c1, shift, counts, s1, s2)
    for values in (counts, s1, s2):
        add_folds(values, t.n)
        add_up(flat_slice(values, 0, t.n), flat_slice(values, 0, t.n_groups))
    if t.size > 1:
        for g in range(t.n_groups):
            shift[g] = shift[g * t.size]
    n = flat_slice(counts, 0, t.n_groups)
    unshift_all(n, shift, s2, s1)
    write_all_statistics(
        n, shift, s2, center, flat_slice(count, t.group, t.n_groups),
        flat_slice(mean, t.group, t.n_groups), flat_slice(var, t.group, t.n_groups),
    )  # fmt: skip
    release((scratch,))


@called
def _write_coefficients(t, span, feature, parameters, eps, group_stats, rows):
    """Write m, s and t of each column of a block to rows (3, ...) of coefficients."""
    (weight, bias), (count, mean, var) = unstack(parameters, 2), unstack(group_stats, 3)
    scratch = allocate(5, t.n_spans, np.float64)
    rounded = allocate(3, t.n_spans, rows.dtype)
    rstd, means, rstds, weights, biases = unstack(scratch, 5)
    group_mean, group_var = (
        flat_slice(mean, t.group, t.n_groups), flat_slice(var, t.group, t.n_groups)
    )  # fmt: skip
    write_rstds(flat_slice(count, t.group, t.n_groups), group_var, eps, rstd)
    spread(group_mean, t.size // span, means)
    spread(flat_slice(rstd, 0, t.n_groups), t.size // span, rstds)
    features = flat_slice(feature, t.first_span, t.n_spans)
    take_features(weight, features, weights)
    take_features(bias, features, biases)
    m, s, offset = unstack(rounded, 3)
    for i in range(0, t.n_spans, LANES):
        n_valid = min(LANES, t.n_spans - i)
        store_scale_shift(
            load(means, i, n_valid), load(rstds, i, n_valid), load(weights, i, n_valid),
            load(biases, i, n_valid), m, s, offset, i, n_valid,
        )  # fmt: skip
    for k in range(3):
        row = flat_slice(rows, k * rows.shape[1], rows.shape[1])
        spread(flat_slice(rounded, k * rounded.shape[1], t.n_spans), span, row)
        repeat_columns(row, t.n)
    release((scratch, rounded))


@inline
def _forward_coefficients(fused, t, span, feature, parameters, eps, group_stats, rows):
    """Return ScaleShift of forward, in rows that are written if they are needed."""
    if fused is not None:
        _write_coefficients(t, span, feature, parameters, eps, group_stats, rows)
    return ScaleShift(*unstack(rows, 3))


@kernel
def forward_group_columns(
    threads, x, mask, fused, feature, parameters, mode, tiles, streamed, group_stats, y
):
    """Normalise groups of columns: x, mask or None, y (A, L, F * C), weight and bias (2, F).

    ``feature`` (A * C / span,) says which weight a span has. ``group_stats`` (3, G) are taken and
    written if ``mode.use_batch_stats``, else read. A task has ``tiles.width`` columns.
    """
    mode, tiles = Mode(*mode), ColumnTiles(*tiles)
    n_groups = group_stats.shape[1]
    begin, end = thread_range(threads, _n_tasks(tiles.width, x.shape))
    count, mean, var = unstack(group_stats, 3)
    for task in range(begin, end):
        t = _block(task, tiles, x.shape, len(feature), n_groups)
        if mode.use_batch_stats:
            _take_statistics(x, mask, t, mode.center, count, mean, var)
        rows = allocate(3, periodic_size(t.c1 - t.c0), arithmetic(x))
        _write_coefficients(t, tiles.span, feature, parameters, mode.eps, group_stats, rows)
        coef, place = ScaleShift(*unstack(rows, 3)), (t.a, 0, x.shape[1], t.c0, t.c1)
        write_block(streamed, None, x, None, fused, None, *place, coef, y)
        release((rows,))
    if streamed:
        fence()


@kernel
def backward_group_columns(
    threads, dy, x, mask, fused, feature, parameters, mode, tiles, streamed, group_stats, dx, sums
):
    """Write dx of groups of columns, and the sums of dy and dy * x_hat over each span.

    ``sums`` (2, A * C / span) are written; the other arguments are as in forward_group_columns.
    """
    mode, tiles = Mode(*mode), ColumnTiles(*tiles)
    length, n_groups = x.shape[1], group_stats.shape[1]
    begin, end = thread_range(threads, _n_tasks(tiles.width, x.shape))
    (weight,), (count, mean, var), (s0, s1) = (
        unstack(parameters, 1), unstack(group_stats, 3), unstack(sums, 2)
    )  # fmt: skip
    for task in range(begin, end):
        t = _block(task, tiles, x.shape, len(feature), n_groups)
        n, n_spans = t.c1 - t.c0, t.n_spans
        scratch, small = allocate(3, n, np.float64), allocate(4, n_spans, np.float64)
        rows = allocate(5, periodic_size(n), arithmetic(x))
        rounded = allocate(5, n_spans, arithmetic(x))
        forward_rows = allocate(3, periodic_size(n), arithmetic(x))
        forward = _forward_coefficients(
            fused, t, tiles.span, feature, parameters, mode.eps, group_stats, forward_rows
        )
        clear(scratch)
        sum_0, sum_1, means = three_rows(scratch, n)
        rstd, g0, g1, weights = unstack(small, 4)
        group_count, group_mean, group_var = (
            flat_slice(count, t.group, t.n_groups), flat_slice(mean, t.group, t.n_groups),
            flat_slice(var, t.group, t.n_groups),
        )  # fmt: skip
        write_rstds(group_count, group_var, mode.eps, rstd)
        spread(group_mean, t.size, means)
        repeat_columns(means, t.n)
        place = t.a, 0, length, t.c0, t.c1
        add_to_columns(dy, x, mask, fused, forward, None, *place, means, sum_0, sum_1)
        take_features(weight, flat_slice(feature, t.first_span, n_spans), weights)
        for column_sums, all_span_sums, group_sums in ((sum_0, s0, g0), (sum_1, s1, g1)):
            span_sums = flat_slice(all_span_sums, t.first_span, n_spans)
            add_folds(column_sums, t.n)
            add_up(flat_slice(column_sums, 0, t.n), span_sums)
            for i in range(n_spans):
                column_sums[i] = weights[i] * span_sums[i]
            add_up(flat_slice(column_sums, 0, n_spans), flat_slice(group_sums, 0, t.n_groups))
        scales, r, m, b, c = unstack(rounded, 5)
        group_coefficients(group_count, group_mean, rstd, g0, g1, mode.center, r, m, b, c)
        rstds = sum_0
        spread(flat_slice(rstd, 0, t.n_groups), t.size // tiles.span, rstds)
        for i in range(n_spans):
            s1[t.first_span + i] *= rstds[i]
            scales[i] = rstds[i] * weights[i]
        for k in range(5):
            row = flat_slice(rows, k * rows.shape[1], rows.shape[1])
            n_values, n_repeats = (n_spans, tiles.span) if k == 0 else (t.n_groups, t.size)
            spread(flat_slice(rounded, k * rounded.shape[1], n_values), n_repeats, row)
            repeat_columns(row, t.n)
        coef = Gradient(*unstack(rows, 5))
        if mode.use_batch_stats:
            write_block(streamed, dy, x, mask, fused, forward, *place, coef, dx)
        else:
            write_block(streamed, dy, x, None, fused, forward, *place, Scale(coef.a), dx)
        release((scratch, small, rows, rounded, forward_rows))
    if streamed:
        fence()
