"""Scratch arrays: copies, repeats and sums of what fits in a cache."""

from numbanorm.kernels.formulas import ScaleShift
from numbanorm.numba_ext.jit import called, inline
from numbanorm.numba_ext.vectors import load, splat, store, total
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LANES


@inline
def copy_values(values, target):
    """Write n values to the first n elements of target."""
    # Not ``target[:n] = values``, which takes seconds to compile: it has an error to format.
    for i in range(values.size):
        target[i] = values[i]


@inline
def clear(rows):
    """Write 0 to rows."""
    elements = flat_slice(rows, 0, rows.size)
    for i in range(elements.size):
        elements[i] = 0


@inline
def three_rows(rows, n):
    """Return the first n elements of each of three rows."""
    size = rows.shape[1]
    return flat_slice(rows, 0, n), flat_slice(rows, size, n), flat_slice(rows, 2 * size, n)


@called
def repeat_columns(row, n):
    """Repeat the first n columns of a row over all others.

    Where several rows of x are folded into one there are more columns than C, and a row of
    coefficients is longer than a row of x, see outputs.periodic_size.
    """
    for c in range(n, row.size):
        row[c] = row[c - n]


@called
def add_folds(sums, n):
    """Add the repeats of n columns to the first n of a row: the adjoint of repeat_columns."""
    for at in range(n, sums.size, max(n, 1)):
        for c in range(n):
            sums[c] += sums[at + c]


@inline
def copy_columns(values, c0, c1, row):
    """Copy columns c0 to c1 of values (C,) to a row (c1 - c0 or more,); see repeat_columns."""
    n = min(values.size, c1 - c0)
    copy_values(flat_slice(values, c0, n), flat_slice(row, 0, n))
    repeat_columns(row, n)


@inline
def copy_coefficients(coef, a, c0, c1, rows):
    """Copy columns c0 to c1 of row a of each of N arrays (N, A, C) to N rows."""
    n, n_outer, n_columns = coef.shape
    for k in range(n):
        values = flat_slice(coef, (k * n_outer + a) * n_columns, n_columns)
        row = flat_slice(rows, k * rows.shape[1], rows.shape[1])
        copy_columns(values, c0, c1, row)


@inline
def copy_forward(forward, a, c0, c1, rows):
    """Return ScaleShift of forward (3, A, C), copied to rows, as copy_coefficients does.

    If ``forward`` is None nothing is copied, and nobody reads them.
    """
    if forward is not None:
        copy_coefficients(forward, a, c0, c1, rows)
    return ScaleShift(*unstack(rows, 3))


@called
def spread(values, span, row):
    """Write each of values (n,) to ``span`` elements of a row (n * span,) next to each other."""
    if span == 1:
        copy_values(values, row)
    else:
        for i in range(values.size):
            value = splat(values[i])
            for j in range(0, span, LANES):
                store(value, row, i * span + j, min(span - j, LANES))


@inline
def _sum_values(values):
    """Return the sum of values (n,)."""
    n = values.size
    n_vector = n // LANES * LANES
    sums = load(values, n_vector, n - n_vector)
    for i in range(0, n_vector, LANES):
        sums += load(values, i, None)
    return total(sums)


@called
def add_up(values, totals):
    """Write the sums of n / m values (n,) next to each other to totals (m,)."""
    span = values.size // max(totals.size, 1)
    if span == 1:
        copy_values(values, totals)
    else:
        for i in range(totals.size):
            totals[i] = _sum_values(flat_slice(values, i * span, span))


@called
def take_features(values, feature, row):
    """Write values[feature] (n,) to a row."""
    n, is_run = feature.size, True
    for i in range(n):
        is_run &= feature[i] == feature[0] + i
    if is_run and n > 0:
        copy_values(flat_slice(values, feature[0], n), row)
    else:
        for i in range(n):
            row[i] = values[feature[i]]
