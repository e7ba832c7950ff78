"""Groups of columns next to each other, forward and backward in one kernel each."""

import numpy as np

from numbanorm.kernels.apply import apply_vector, backward_vector, scale_vector
from numbanorm.kernels.formulas import (
    group_coefficients,
    store_scale_shift,
    unshift_all,
    write_rstds,
    write_statistics,
)
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
from numbanorm.kernels.stream import buffer_size, write_columns
from numbanorm.numba_ext.jit import inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, release
from numbanorm.numba_ext.vectors import load
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LANES


@inline
def column_block(unit, n_columns, width):
    """Return the outer index and the columns of a unit of work."""
    n_blocks = (n_columns + width - 1) // width
    a = unit // n_blocks
    c0 = (unit - a * n_blocks) * width
    return a, c0, min(c0 + width, n_columns)


@inline
def _shifts_of_groups(x, mask, a, c0, c1, n_columns, size, shift):
    """Write an element of its group that counts, or 0, for columns c0 to c1 of x[a], to shift."""
    if mask is None:
        for c in range(0, c1 - c0, size):
            shift[c] = x[a, 0, c0 + c]
    else:
        found = allocate(None, c1 - c0, np.bool_)
        first_of_columns(x[a, :, c0:c1], mask[a, :, c0:c1], shift, found)
        for c in range(0, c1 - c0, size):
            for k in range(c + size - 1, c - 1, -1):
                if found[k]:
                    shift[c] = shift[k]
            found[c] = np.any(found[c : c + size])
        for c in range(n_columns, c1 - c0, size):
            if found[c] and not found[c % n_columns]:
                found[c % n_columns] = True
                shift[c % n_columns] = shift[c]
        release((found,))
    for lo in range(0, c1 - c0, n_columns):
        for c in range(lo, min(lo + n_columns, c1 - c0), size):
            for k in range(c, c + size):
                shift[k] = shift[c - lo]


@kernel
def forward_group_columns(
    threads, x, mask, feature, parameters, eps, center, use_batch_stats, width, span, streamed,
    statistics, y,
):  # fmt: skip
    """Normalise groups of columns: x, mask or None, y (A, L, F * C), weight and bias (2, F).

    A row holds each column F times, as in moments_columns. ``span`` columns next to each other
    share a weight, and ``feature`` (A * C / span,) says which; some more are one of the groups,
    whose ``statistics`` (3, G) are taken and written if ``use_batch_stats``, else read. A task has ``width``
    columns.
    """
    n_outer, length, n_folded = x.shape
    n_spans, n_groups = len(feature) // n_outer, statistics.shape[1] // n_outer
    n_columns = n_spans * span
    size = n_columns // n_groups
    begin, end = thread_range(threads, n_outer * ((n_folded + width - 1) // width))
    (weight, bias), (count, mean, var) = unstack(parameters, 2), unstack(statistics, 3)
    for task in range(begin, end):
        a, c0, c1 = column_block(task, n_folded, width)
        n_own = min(c1, n_columns) - c0
        n_here, first = n_own // size, a * n_groups + c0 // size
        if use_batch_stats:
            own = allocate(4, c1 - c0, mean.dtype)
            clear(own)
            s1, s2, shift = three_rows(own, c1 - c0)
            n = flat_slice(own, 3 * own.shape[1], c1 - c0)
            _shifts_of_groups(x, mask, a, c0, c1, n_columns, size, shift)
            add_rows(x, mask, a, 0, length, c0, c1, shift, n, s1, s2)
            for values in (n, s1, s2):
                add_folds(values, n_columns)
                add_up(flat_slice(values, 0, n_own), flat_slice(values, 0, n_here))
            for g in range(n_here):
                shift[g] = shift[g * size]
            unshift_all(flat_slice(n, 0, n_here), shift, s1, s2)
            for g in range(n_here):
                write_statistics(first + g, n[g], shift[g], s2[g], center, count, mean, var)
            release((own,))
        n_own_spans = n_own // span
        own, of_spans = allocate(5, n_own_spans, mean.dtype), allocate(3, n_own_spans, y.dtype)
        rows = allocate(3, c1 - c0, y.dtype)
        buffer = allocate(None, buffer_size(c1 - c0, streamed, y), y.dtype)
        rstd, means, rstds, weights, biases = unstack(own, 5)
        write_rstds(flat_slice(count, first, n_here), flat_slice(var, first, n_here), eps, rstd)
        spread(flat_slice(mean, first, n_here), size // span, means)
        spread(flat_slice(rstd, 0, n_here), size // span, rstds)
        own_features = flat_slice(feature, a * n_spans + c0 // span, n_own_spans)
        take_features(weight, own_features, weights)
        take_features(bias, own_features, biases)
        m, s, t = unstack(of_spans, 3)
        for i in range(0, n_own_spans, LANES):
            n_valid = min(LANES, n_own_spans - i)
            store_scale_shift(
                load(means, i, n_valid), load(rstds, i, n_valid), load(weights, i, n_valid),
                load(biases, i, n_valid), m, s, t, i, n_valid,
            )  # fmt: skip
        for k in range(3):
            row = flat_slice(rows, k * rows.shape[1], c1 - c0)
            spread(flat_slice(of_spans, k * of_spans.shape[1], n_own_spans), span, row)
            repeat_columns(row, n_columns)
        write_columns(
            streamed, buffer, apply_vector, None, x, None, a, 0, length, c0, c1, unstack(rows, 3), y
        )
        release((own, of_spans, rows, buffer))


@kernel
def backward_group_columns(
    threads, dy, x, mask, feature, parameters, eps, center, use_batch_stats, width, span, streamed,
    statistics, dx, sums,
):  # fmt: skip
    """Write dx of groups of columns, and the sums of dy and dy * x_hat over each span.

    ``sums`` (2, A * C / span) are written; the other arguments are as in forward_group_columns.
    """
    n_outer, length, n_folded = x.shape
    n_spans, n_groups = len(feature) // n_outer, statistics.shape[1] // n_outer
    n_columns = n_spans * span
    size = n_columns // n_groups
    begin, end = thread_range(threads, n_outer * ((n_folded + width - 1) // width))
    (weight,), (count, mean, var), (s0, s1) = (
        unstack(parameters, 1), unstack(statistics, 3), unstack(sums, 2)
    )  # fmt: skip
    for task in range(begin, end):
        a, c0, c1 = column_block(task, n_folded, width)
        n_own = min(c1, n_columns) - c0
        n_here, first = n_own // size, a * n_groups + c0 // size
        p, n_own_spans = a * n_spans + c0 // span, n_own // span
        own, small = allocate(3, c1 - c0, mean.dtype), allocate(4, n_own_spans, mean.dtype)
        rows, of_groups = allocate(5, c1 - c0, dx.dtype), allocate(5, n_own_spans, dx.dtype)
        buffer = allocate(None, buffer_size(c1 - c0, streamed, dx), dx.dtype)
        clear(own)
        sum_0, sum_1, means = three_rows(own, c1 - c0)
        rstd, g0, g1, weights = unstack(small, 4)
        write_rstds(flat_slice(count, first, n_here), flat_slice(var, first, n_here), eps, rstd)
        spread(flat_slice(mean, first, n_here), size, means)
        repeat_columns(means, n_columns)
        add_to_columns(dy, x, mask, None, a, 0, length, c0, c1, means, sum_0, sum_1)
        take_features(weight, flat_slice(feature, p, n_own_spans), weights)
        for of_columns, of_all_spans, of_group in ((sum_0, s0, g0), (sum_1, s1, g1)):
            of_spans = flat_slice(of_all_spans, p, n_own_spans)
            add_folds(of_columns, n_columns)
            add_up(flat_slice(of_columns, 0, n_own), of_spans)
            for i in range(n_own_spans):
                of_columns[i] = weights[i] * of_spans[i]
            add_up(flat_slice(of_columns, 0, n_own_spans), flat_slice(of_group, 0, n_here))
        scales, r, m, b, c = unstack(of_groups, 5)
        group_coefficients(
            flat_slice(count, first, n_here), flat_slice(mean, first, n_here), rstd, g0, g1, center,
            r, m, b, c,
        )  # fmt: skip
        rstds = sum_0
        spread(flat_slice(rstd, 0, n_here), size // span, rstds)
        for i in range(n_own_spans):
            s1[p + i] *= rstds[i]
            scales[i] = rstds[i] * weights[i]
        for k in range(5):
            row = flat_slice(rows, k * rows.shape[1], c1 - c0)
            n, alike = (n_own_spans, span) if k == 0 else (n_here, size)
            spread(flat_slice(of_groups, k * of_groups.shape[1], n), alike, row)
            repeat_columns(row, n_columns)
        if use_batch_stats:
            write_columns(
                streamed, buffer, backward_vector, dy, x, mask, a, 0, length, c0, c1,
                unstack(rows, 5), dx,
            )  # fmt: skip
        else:
            write_columns(
                streamed, buffer, scale_vector, dy, x, None, a, 0, length, c0, c1,
                unstack(rows, 1), dx,
            )  # fmt: skip
        release((own, small, rows, of_groups, buffer))
