"""Reductions: moments of x, and the sums of dy and dy * (x - mean), over rows and columns."""

import numpy as np

from numbanorm.kernels.access import (
    first_value,
    gradient_terms,
    plus_three,
    prefetch_row,
    take_row,
    terms,
)
from numbanorm.kernels.formulas import unshift, unshift_all
from numbanorm.kernels.scratch import (
    add_folds,
    clear,
    copy_columns,
    copy_values,
    three_rows,
)
from numbanorm.numba_ext.jit import inline, inline_contract, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, line_size, release
from numbanorm.numba_ext.vectors import load, prefetch, splat, store, total, where, widen
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LANES, PREFETCH_FAR, ROWS, STEP


@inline
def begin_sums(row, n, center):
    """Return two sums of the terms of a row of n elements, with those that are less than a step."""
    rest, whole = n % STEP, n // STEP * STEP
    # They come first, so that nothing waits for a branch.
    a = terms(*row, whole, min(rest, LANES), center)
    return a, terms(*row, whole + LANES, max(rest - LANES, 0), center)


@inline
def add_step(row, i, center, sums):
    """Add the terms of a step to two sums: one would wait for itself."""
    a, b = sums
    a = plus_three(a, terms(*row, i, None, center))
    return a, plus_three(b, terms(*row, i + LANES, None, center))


@inline
def end_sums(counts, n, sums):
    """Return how many of n elements count, and the sums of w and w * (x - center)."""
    a, b = sums
    count = n if counts is None else np.intp(total(a[0] + b[0]))
    return count, total(a[1] + b[1]), total(a[2] + b[2])


@inline
def sum_row(row, n, center):
    """Return what end_sums does of a row of n elements, around a number."""
    middle, distance = splat(center), PREFETCH_FAR * line_size(row[1])
    sums = begin_sums(row, n, middle)
    for i in range(0, n // STEP * STEP, STEP):
        prefetch_row(row, i + distance)
        prefetch_row(row, i + LANES + distance)
        sums = add_step(row, i, middle, sums)
    return end_sums(row[2], n, sums)


@inline
def rows_of_task(task, n_parts, part, block, shape):
    """Return what a task works on: the first and the last row, the part, and where that is.

    It is ``block`` whole rows of an array (P, L), or one part of a row, from ``lo`` on, of n
    elements.
    """
    k, first, lo = task % n_parts, task // n_parts * block, task % n_parts * part
    return first, min(first + block, shape[0]), k, lo, min(part, shape[1] - lo)


@kernel
def moments_rows(threads, x, mask, part, block, moments):
    """Moments of each part: x, mask or None (P, L) -> count, mean, rest, m2, (4, P, K, 1)."""
    _, n_pieces, n_parts, _ = moments.shape
    begin, end = thread_range(threads, (n_pieces + block - 1) // block * n_parts)
    count, mean, rest, m2 = unstack(moments, 4)
    for task in range(begin, end):
        first, last, k, lo, n = rows_of_task(task, n_parts, part, block, x.shape)
        for p in range(first, last):
            row = take_row(None, x, mask, p * x.shape[1] + lo, n)
            shift = first_value(row[1], row[2])
            mean[p, k, 0] = shift
            count[p, k, 0], rest[p, k, 0], m2[p, k, 0] = sum_row(row, n, shift)
        # Of all at once, in vectors. Where rows have parts, there is one.
        at, n = first * n_parts + k, last - first
        unshift_all(
            flat_slice(count, at, n),
            flat_slice(mean, at, n),
            flat_slice(rest, at, n),
            flat_slice(m2, at, n),
        )


@inline
def add_to_vector(
    dy, x, counts, weight, i, n_rows, at, step, next_row, stride, c, n, center, s0, s1
):
    """Add rows to a vector of columns, see add_to_columns, from c on; see load about n.

    Rows i to i + n_rows of dy, x and counts (N,) begin at ``at``, ``step`` apart; what is read next
    is at ``coming``.
    """
    middle, sum_0, sum_1 = load(center, c, n), load(s0, c, n), load(s1, c, n)
    for k in range(i, i + n_rows):
        prefetch(dy, next_row)
        prefetch(x, next_row)
        prefetch(counts, next_row)
        if dy is None:
            d = widen(load(x, at, n)) - middle
            if counts is not None:
                d = where(load(counts, at, n), d, splat(0.0))
            sum_0 += d
            sum_1 += d * d
        else:
            w, d = gradient_terms(dy, x, counts, at, n, middle)
            if weight is not None:
                w = w * splat(np.float64(weight[k]))
            sum_0 += w
            sum_1 += w * d
        at += step
        next_row += stride
    store(sum_0, s0, c, n)
    store(sum_1, s1, c, n)


@inline
def add_to_columns(dy, x, counts, weight, a, lo, hi, c0, c1, center, s0, s1):
    """Add rows lo to hi of x[a], columns c0 to c1, to sums of w and w * (x - center).

    w is dy, or x - center if that is None. ``counts`` is the mask, or None. A row of dy counts as
    often as its ``weight`` (L,) says, unless that is None.
    """
    step, width = x.shape[2], c1 - c0
    dys, xs, counts = (
        flat_slice(dy, 0, x.size),
        flat_slice(x, 0, x.size),
        flat_slice(counts, 0, x.size),
    )
    # The rows that come next are asked for in the order of memory, if they are whole.
    spread, stride = (ROWS, LANES) if width == step else (1, step)
    # ROWS ahead, or more of them where they are short; half as far where dy is read as well.
    far, some = (
        (PREFETCH_FAR if dy is None else PREFETCH_FAR // 2) * line_size(x),
        max(ROWS * step, 1),
    )
    distance = max(far // some, 1) * some
    whole = width // LANES * LANES
    for i in range(lo, hi, ROWS):
        at, n_rows = (a * x.shape[1] + i) * step + c0, min(ROWS, hi - i)
        for c in range(0, whole, LANES):
            next_row = at + distance + spread * c
            add_to_vector(
                dys, xs, counts, weight, i, n_rows, at + c, step, next_row, stride, c, None,
                center, s0, s1,
            )  # fmt: skip
        if whole < width:
            next_row = at + distance + spread * whole
            add_to_vector(
                dys, xs, counts, weight, i, n_rows, at + whole, step, next_row, stride, whole,
                width - whole, center, s0, s1,
            )  # fmt: skip


@inline_contract
def _add_counts(counts, n):
    """Add four rows of counts (4, n) to n (n,)."""
    for c in range(n.shape[0]):
        n[c] += (np.int32(counts[0, c]) + counts[1, c]) + (np.int32(counts[2, c]) + counts[3, c])


@inline_contract
def _find_first(xs, counts, found, shift):
    """Write x to shift where counts is the first True, and mark it as found: rows (n,)."""
    for c in range(shift.shape[0]):
        x = np.float64(xs[c])
        shift[c] = x if counts[c] > found[c] else shift[c]
    for c in range(shift.shape[0]):
        found[c] |= counts[c]


@inline
def add_rows(x, mask, a, lo, hi, c0, c1, shift, n, s1, s2):
    """Add rows lo to hi of x[a], columns c0 to c1, to their counts and shifted sums."""
    add_to_columns(None, x, mask, None, a, lo, hi, c0, c1, shift, s1, s2)
    if mask is None:
        for c in range(c1 - c0):
            n[c] += hi - lo
    else:
        for i in range(lo, hi - 3, 4):
            _add_counts(mask[a, i : i + 4, c0:c1], n)
        for i in range(hi - (hi - lo) % 4, hi):
            for c in range(c1 - c0):
                n[c] += mask[a, i, c0 + c]


@inline
def first_of_columns(x, counts, shift, found):
    """Write the first element of each column of x (L, C) that counts to shift (C,), which is 0.

    Write where there is one to found (C,).
    """
    clear(found)
    n_rows = min(4, x.shape[0])
    for i in range(n_rows):
        _find_first(x[i], counts[i], found, shift)
    for c in range(shift.shape[0]):
        if not found[c]:
            shift[c] = first_value(x[n_rows:, c], counts[n_rows:, c])
            found[c] = np.any(counts[n_rows:, c])


@inline
def _shifts_of_columns(x, mask, a, lo, hi, c0, c1, n_columns, shift):
    """Write an element of each column that counts, or 0, for rows lo to hi of x[a], to shift.

    A row holds each of n columns several times, with one shift for all.
    """
    n = c1 - c0
    if mask is None:
        copy_values(
            flat_slice(x, (a * x.shape[1] + lo) * x.shape[2] + c0, min(n, n_columns)), shift
        )
    else:
        found = allocate(None, c1 - c0, np.bool_)
        first_of_columns(x[a, lo:hi, c0:c1], mask[a, lo:hi, c0:c1], shift, found)
        for c in range(n_columns, n):
            if found[c] and not found[c % n_columns]:
                found[c % n_columns] = True
                shift[c % n_columns] = shift[c]
        release((found,))
    for c in range(n_columns, n):
        shift[c] = shift[c - n_columns]


@kernel
def moments_columns(threads, x, mask, part, width, moments):
    """Moments of each part: x, mask or None (A, L, F * C) -> count, mean, rest, m2, (4, A, K, C).

    A row holds each column F times, once for each of the rows of x that are folded into it, and is
    one block then.
    """
    _, n_outer, n_parts, n_columns = moments.shape
    length, n_folded = x.shape[1:]
    n_blocks = (n_folded + width - 1) // width
    begin, end = thread_range(threads, n_outer * n_parts * n_blocks)
    count, mean, rest, m2 = unstack(moments, 4)
    for task in range(begin, end):
        a = task // (n_parts * n_blocks)
        k = task // n_blocks - a * n_parts
        c0 = (task % n_blocks) * width
        c1 = min(n_folded, c0 + width)
        lo = k * part
        hi = min(length, lo + part)
        n_valid = c1 - c0
        own = allocate(4, n_valid, mean.dtype)
        clear(own)
        s1, s2, shift = three_rows(own, n_valid)
        n = flat_slice(own, 3 * own.shape[1], n_valid)
        if lo < hi:
            _shifts_of_columns(x, mask, a, lo, hi, c0, c1, n_columns, shift)
        add_rows(x, mask, a, lo, hi, c0, c1, shift, n, s1, s2)
        for values in (n, s1, s2):
            add_folds(values, n_columns)
        for c in range(min(n_valid, n_columns)):
            to = a, k, c0 + c
            count[to] = n[c]
            mean[to], rest[to], m2[to] = unshift(n[c], shift[c], s1[c], s2[c])
        release((own,))


@kernel
def gradient_sums_rows(threads, dy, x, mask, part, block, pieces, sums):
    """Sum dy and dy (x - mean): dy, x, mask or None (P, L) -> (2, P, K, 1).

    The means are the first of ``pieces`` (3, P, 1).
    """
    _, n_pieces, n_parts, _ = sums.shape
    begin, end = thread_range(threads, (n_pieces + block - 1) // block * n_parts)
    (mean,), (s0, s1) = unstack(pieces, 1), unstack(sums, 2)
    for task in range(begin, end):
        first, last, k, lo, n = rows_of_task(task, n_parts, part, block, x.shape)
        for p in range(first, last):
            at = p * x.shape[1] + lo
            row = take_row(dy, x, mask, at, n)
            _, s0[p, k, 0], s1[p, k, 0] = sum_row(row, n, mean[p, 0])


@kernel
def gradient_sums_columns(threads, dy, x, mask, part, width, pieces, sums):
    """Sum dy and dy (x - mean): dy, x, mask or None (A, L, F * C) -> (2, A, K, C).

    The means are the first of ``pieces`` (3, A, C); see moments_columns about F.
    """
    _, n_outer, n_parts, n_columns = sums.shape
    length, n_folded = x.shape[1:]
    n_blocks = (n_folded + width - 1) // width
    begin, end = thread_range(threads, n_outer * n_parts * n_blocks)
    (mean,), (s0, s1) = unstack(pieces, 1), unstack(sums, 2)
    for task in range(begin, end):
        a = task // (n_parts * n_blocks)
        k = task // n_blocks - a * n_parts
        c0 = (task % n_blocks) * width
        c1 = min(n_folded, c0 + width)
        own = allocate(3, c1 - c0, mean.dtype)
        clear(own)
        sum_0, sum_1, means = three_rows(own, c1 - c0)
        copy_columns(flat_slice(mean, a * n_columns, n_columns), c0, c1, means)
        lo, hi = k * part, min(length, (k + 1) * part)
        add_to_columns(dy, x, mask, None, a, lo, hi, c0, c1, means, sum_0, sum_1)
        add_folds(sum_0, n_columns)
        add_folds(sum_1, n_columns)
        for c in range(c0, min(c1, n_columns)):
            s0[a, k, c] = sum_0[c - c0]
            s1[a, k, c] = sum_1[c - c0]
        release((own,))
