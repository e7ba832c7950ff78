"""Reductions of rows and columns: moments of x, and with dy the sums of dy and dy * (x - mean).

Statistics are taken around the first element of a piece and accumulated in float64, in one pass.
The shift bounds the cancellation (it is an element of the data, so m2 >= (x0 - mean)**2) and makes
constant data exact at any offset; sums in float64 still run at the speed of memory.
"""

from typing import Any, NamedTuple

import numpy as np

from numbanorm.kernels.access import (
    arithmetic,
    first_value,
    prefetch_row,
    read,
    read_one,
    take_row,
)
from numbanorm.kernels.formulas import (
    ElementAffine,
    ScaleShift,
    gradient_terms,
    moment_terms,
    unshift,
    unshift_all,
)
from numbanorm.kernels.fused import keep_dy, read_dy
from numbanorm.kernels.scratch import add_folds, clear, copy_columns, copy_forward, three_rows
from numbanorm.numba_ext.jit import by_record, called, inline, inline_contract, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, line_size, release
from numbanorm.numba_ext.vectors import load, splat, store, total, where, widen
from numbanorm.numba_ext.views import flat_slice, item, unstack
from numbanorm.tuning import COLUMNS, LANES, PREFETCH_FAR, ROWS, STEP

# -- Rows ------------------------------------------------------------------------------------------


@inline
def _terms(dy, row, i, n, center):
    """Return vectors of three terms of sums for n elements from i on, and of 0.

    They are 1, x - center and its square, or if there is dy anything, dy and dy * (x - center).
    """
    x, counts = read(row.x, i, n), read(row.mask, i, n)
    if dy is None:
        return moment_terms(widen(x), counts, n, center)
    w, d = gradient_terms(read_dy(row.fused, row.forward, row, i, n, i), x, counts, center)
    return w, w, w * d


@inline
def _add(a, b):
    """Return the sums of three vectors and three others."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@inline
def begin_sums(row, n, center):
    """Return two sums of terms, begun with the tail of a row of n elements, less than a step."""
    tail, n_steps = n % STEP, n // STEP * STEP
    # The tail comes first, so that nothing waits for its branch.
    a = _terms(row.dy, row, n_steps, min(tail, LANES), center)
    b = splat(0.0), splat(0.0), splat(0.0)
    if tail > LANES:
        b = _terms(row.dy, row, n_steps + LANES, tail - LANES, center)
    return a, b


@inline
def add_step(row, i, center, sums):
    """Add the terms of a step to two sums: a single one would be bound by its latency."""
    a, b = sums
    a = _add(a, _terms(row.dy, row, i, None, center))
    return a, _add(b, _terms(row.dy, row, i + LANES, None, center))


@inline
def end_sums(row, n, sums):
    """Return how many of n elements count, and the sums of w and w * (x - center)."""
    a, b = sums
    count = n if row.mask is None else np.intp(total(a[0] + b[0]))
    return count, total(a[1] + b[1]), total(a[2] + b[2])


@inline
def _reduce_row(row, n, center):
    """Return the sums of a row of n elements around a number, see end_sums."""
    centers, distance = splat(center), PREFETCH_FAR * line_size(row.x)
    keep_dy(row.dy, row.fused, row, n, distance)
    sums = begin_sums(row, n, centers)
    for i in range(0, n // STEP * STEP, STEP):
        prefetch_row(row, i + distance)
        prefetch_row(row, i + LANES + distance)
        sums = add_step(row, i, centers, sums)
    return end_sums(row, n, sums)


class RowTask(NamedTuple):
    """Whole rows ``first`` to ``last`` (P, L), or ``n`` elements of one from ``lo`` on: part k."""

    first: int
    last: int
    k: int
    lo: int
    n: int


@inline
def row_task(task, n_parts, tiles, shape):
    """Return what a task works on."""
    part, block = tiles
    first, lo = task // n_parts * block, task % n_parts * part
    last = min(first + block, shape[0])
    return RowTask(first, last, task % n_parts, lo, min(part, shape[1] - lo))


@inline
def n_row_tasks(n_parts, tiles, shape):
    """Return how many tasks the rows of an array of this shape are."""
    return (shape[0] + tiles[1] - 1) // tiles[1] * n_parts


@kernel
def reduce_rows(threads, dy, x, mask, fused, forward, tiles, piece_stats, out):
    """Reduce each part of rows: dy or None, x, mask or None (P, L).

    Without dy, ``out`` (4, P, K, 1) are count, mean, m2 and rest; else (2, P, K, 1) the sums of dy
    and dy * (x - mean), and the mean is the first of ``piece_stats`` (3, P, 1). With ``fused``,
    ``forward`` (3, P, 1) are the fields of ScaleShift in forward.
    """
    n_parts, length = out.shape[2], x.shape[1]
    begin, end = thread_range(threads, n_row_tasks(n_parts, tiles, x.shape))
    shifts, (means,) = ScaleShift(*unstack(forward, 3)), unstack(piece_stats, 1)
    for task in range(begin, end):
        t = row_task(task, n_parts, tiles, x.shape)
        for p in range(t.first, t.last):
            row = take_row(dy, x, mask, fused, item(shifts, p), p * length + t.lo, t.n)
            to = p * n_parts + t.k
            if dy is None:
                count, mean, m2, rest = unstack(out, 4)
                mean[to] = first_value(row.x, row.mask)
                count[to], rest[to], m2[to] = _reduce_row(row, t.n, mean[to])
            else:
                s0, s1 = unstack(out, 2)
                _, s0[to], s1[to] = _reduce_row(row, t.n, means[p])
        if dy is None:
            # All rows of the task at once, in vectors; where rows have parts, it has a single row.
            count, mean, m2, rest = unstack(out, 4)
            at, n = t.first * n_parts + t.k, t.last - t.first
            unshift_all(
                flat_slice(count, at, n), flat_slice(mean, at, n),
                flat_slice(m2, at, n), flat_slice(rest, at, n),
            )  # fmt: skip


# -- Columns ---------------------------------------------------------------------------------------


@inline
def _zero_where_masked(counts, d):
    return d if counts is None else where(counts, d, splat(0.0))


@inline
def _pair(dy, forward, row, at, n, c, center):
    """Return vectors of x - center twice, or if there is dy of dy and x - center.

    They are 0 where an element does not enter the sums. Not moment_terms: there is no tail, and
    what counts is counted elsewhere.
    """
    x, counts = read(row.x, at, n), read(row.mask, at, n)
    if dy is None:
        d = _zero_where_masked(counts, widen(x) - center)
        return d, d
    return gradient_terms(read_dy(row.fused, forward, row, at, n, c), x, counts, center)


class ColumnAffine(NamedTuple):
    """ElementAffine of all rows of columns: weight and bias (L,) have a number for each row."""

    weight: Any
    bias: Any
    m: Any
    rstd: Any
    t: Any


# The coefficients of forward for row k of columns.
_forward_of_row = by_record(
    {
        ScaleShift: lambda forward, k: forward,
        ColumnAffine: lambda forward, k: ElementAffine(
            forward.weight[k], forward.bias[k], forward.m, forward.rstd, forward.t
        ),
        type(None): lambda forward, k: None,
    }
)


@inline
def _add_row(data, weight, k, at, upcoming, c, n, centers, sums):
    """Return the sums of a vector of columns from c on with those of row k, see add_to_vector."""
    prefetch_row(data, upcoming)
    w, d = _pair(data.dy, _forward_of_row(data.forward, k), data, at, n, c, centers)
    if weight is not None:
        w = w * splat(np.float64(weight[k]))
    return sums[0] + w, sums[1] + w * d


@inline
def add_to_vector(data, weight, i, n_rows, at, step, upcoming, stride, c, n, center, s0, s1):
    """Add rows to a vector of columns, see add_to_columns, from c on; see access.read about n.

    Rows i to i + n_rows, of at most ROWS, of ``data`` (all of dy, x and mask in one row) begin at
    ``at``, ``step`` apart; for each of them a vector is prefetched, from ``upcoming`` on and
    ``stride`` apart.
    """
    centers, sums = load(center, c, n), (load(s0, c, n), load(s1, c, n))
    if n is None:
        # No loop: each row has load instructions of its own, whose next address the core foresees.
        # It takes up to twice as long where one instruction reads all rows in turn, on an EPYC.
        if n_rows > 1:
            sums = _add_row(data, weight, i, at, upcoming, c, n, centers, sums)
            i, at, upcoming = i + 1, at + step, upcoming + stride
            sums = _add_row(data, weight, i, at, upcoming, c, n, centers, sums)
            i, at, upcoming = i + 1, at + step, upcoming + stride
        if n_rows > 3:
            sums = _add_row(data, weight, i, at, upcoming, c, n, centers, sums)
            i, at, upcoming = i + 1, at + step, upcoming + stride
            sums = _add_row(data, weight, i, at, upcoming, c, n, centers, sums)
            i, at, upcoming = i + 1, at + step, upcoming + stride
        if n_rows % 2 == 1:
            sums = _add_row(data, weight, i, at, upcoming, c, n, centers, sums)
    else:
        for k in range(n_rows):
            place = at + k * step
            sums = _add_row(data, weight, i + k, place, upcoming + k * stride, c, n, centers, sums)
    store(sums[0], s0, c, n)
    store(sums[1], s1, c, n)


@inline
def _add_by_rows(rows, dy, x, mask, fused, forward, weight, a, lo, hi, c0, c1, center, s0, s1):
    """Do what add_to_columns does, so many rows at a time."""
    step, width = x.shape[2], c1 - c0
    data = take_row(dy, x, mask, fused, forward, 0, x.size)
    # Upcoming rows are prefetched, in the order of memory if they are whole.
    spread, stride = (rows, LANES) if width == step else (1, step)
    # Some rows ahead, or a multiple where they are short; half as far where dy is read as well.
    n_lines, block = (PREFETCH_FAR if dy is None else PREFETCH_FAR // 2), max(rows * step, 1)
    distance = max(n_lines * line_size(x) // block, 1) * block
    n_vector = width // LANES * LANES
    for i in range(lo, hi, rows):
        at, n_rows = (a * x.shape[1] + i) * step + c0, min(rows, hi - i)
        for c in range(0, n_vector, LANES):
            upcoming = at + distance + spread * c
            add_to_vector(
                data, weight, i, n_rows, at + c, step, upcoming, stride, c, None, center, s0, s1
            )
        if n_vector < width:
            upcoming = at + distance + spread * n_vector
            add_to_vector(
                data, weight, i, n_rows, at + n_vector, step, upcoming, stride, n_vector,
                width - n_vector, center, s0, s1,
            )  # fmt: skip


@called
def add_to_columns(dy, x, mask, fused, forward, weight, a, lo, hi, c0, c1, center, s0, s1):
    """Add rows lo to hi of x[a], columns c0 to c1, to sums of w and w * (x - center).

    w is dy, or x - center if that is None. A row of dy counts as often as its ``weight`` (L,) says,
    unless that is None. ``forward`` are rows of coefficients of forward, if ``fused`` is not None.
    """
    # Fewer rows at a time where dy is read as well, unless sums hardly fit in the first cache. The
    # number is a constant in both, as a choice by a variable takes 1.3 times as long.
    if dy is None or c1 - c0 > COLUMNS:
        _add_by_rows(ROWS, dy, x, mask, fused, forward, weight, a, lo, hi, c0, c1, center, s0, s1)
    else:
        _add_by_rows(
            ROWS // 2, dy, x, mask, fused, forward, weight, a, lo, hi, c0, c1, center, s0, s1
        )


@inline_contract
def _add_counts(a, b, c, d, n):
    """Add four rows of a mask (n,) to n (n,)."""
    for i in range(n.size):
        n[i] += (np.int32(a[i]) + b[i]) + (np.int32(c[i]) + d[i])


@called
def count_columns(mask, at, step, n_rows, n):
    """Add the number of elements that count in each column to n (n,).

    Rows of ``mask``, all of it, begin at ``at``, ``step`` apart.
    """
    width = n.size
    for _ in range(n_rows // ROWS):
        _add_counts(
            flat_slice(mask, at, width), flat_slice(mask, at + step, width),
            flat_slice(mask, at + 2 * step, width), flat_slice(mask, at + 3 * step, width), n,
        )  # fmt: skip
        at += 4 * step
    for _ in range(n_rows % ROWS):
        for c in range(width):
            n[c] += mask[at + c]
        at += step


@inline
def add_rows(x, mask, a, lo, hi, c0, c1, shift, n, s1, s2):
    """Add rows lo to hi of x[a], columns c0 to c1, to their counts and shifted sums."""
    add_to_columns(None, x, mask, None, None, None, a, lo, hi, c0, c1, shift, s1, s2)
    if mask is None:
        for c in range(c1 - c0):
            n[c] += hi - lo
    else:
        step = x.shape[2]
        at = (a * x.shape[1] + lo) * step + c0
        count_columns(flat_slice(mask, 0, mask.size), at, step, hi - lo, n)


@called
def first_of_columns(x, mask, at, step, n_rows, shift, has_shift):
    """Write the first element of each column that counts to shift (n,), which is 0.

    ``has_shift`` (n,) says where there is one. Rows of x and mask, all of them, begin at ``at``,
    ``step`` apart.
    """
    clear(has_shift)
    # The first rows as rows; the few columns that are left one by one.
    n_first = min(ROWS, n_rows)
    for i in range(n_first):
        for c in range(shift.size):
            counts, value = mask[at + i * step + c], read_one(x, at + i * step + c)
            shift[c] = value if counts > has_shift[c] else shift[c]
            has_shift[c] |= counts
    for c in range(shift.size):
        for i in range(n_first, n_rows):
            if has_shift[c]:
                break
            if mask[at + i * step + c]:
                has_shift[c], shift[c] = True, read_one(x, at + i * step + c)


@inline
def _shifts_of_columns(x, mask, a, lo, hi, c0, c1, n_columns, shift):
    """Write an element of each column that counts, or 0, for rows lo to hi of x[a], to shift.

    A row holds each of n columns several times, with one shift for all.
    """
    n, at = c1 - c0, (a * x.shape[1] + lo) * x.shape[2] + c0
    flat = flat_slice(x, 0, x.size)
    if mask is None:
        for c in range(min(n, n_columns)):
            shift[c] = read_one(flat, at + c)
    else:
        has_shift = allocate(None, n, np.bool_)
        counts = flat_slice(mask, 0, mask.size)
        first_of_columns(flat, counts, at, x.shape[2], hi - lo, shift, has_shift)
        for c in range(n_columns, n):
            if has_shift[c] and not has_shift[c % n_columns]:
                has_shift[c % n_columns] = True
                shift[c % n_columns] = shift[c]
        release((has_shift,))
    for c in range(n_columns, n):
        shift[c] = shift[c - n_columns]


class ColumnTask(NamedTuple):
    """Rows ``lo`` to ``hi`` of x[a], columns ``c0`` to ``c1``: part k of these."""

    a: int
    k: int
    lo: int
    hi: int
    c0: int
    c1: int


@inline
def column_task(task, n_parts, tiles, shape):
    """Return what a task works on, of an array (A, L, C) of this shape."""
    part, width = tiles
    n_blocks = (shape[2] + width - 1) // width
    a, c0 = task // (n_parts * n_blocks), task % n_blocks * width
    k = task // n_blocks - a * n_parts
    return ColumnTask(a, k, k * part, min(shape[1], (k + 1) * part), c0, min(shape[2], c0 + width))


@inline
def n_column_tasks(n_parts, tiles, shape):
    """Return how many tasks the columns of an array of this shape are."""
    return shape[0] * n_parts * ((shape[2] + tiles[1] - 1) // tiles[1])


@kernel
def reduce_columns(threads, dy, x, mask, fused, forward, tiles, piece_stats, out):
    """Reduce each part of columns: dy or None, x, mask or None (A, L, F * C).

    Without dy, ``out`` (4, A, K, C) are count, mean, m2 and rest; else (2, A, K, C) the sums of dy
    and dy * (x - mean), and the mean is the first of ``piece_stats`` (3, A, C). A row holds each
    column F times, once for each of the rows of x that are folded into it, and is one block then.
    ``forward`` (3, A, C) are as in reduce_rows.
    """
    _, _, n_parts, n_columns = out.shape
    begin, end = thread_range(threads, n_column_tasks(n_parts, tiles, x.shape))
    for task in range(begin, end):
        t = column_task(task, n_parts, tiles, x.shape)
        n = t.c1 - t.c0
        n_unfolded = min(n, n_columns)
        scratch = allocate(4, n, np.float64)
        rows = allocate(3, n, arithmetic(x))
        clear(scratch)
        s0, s1, center = three_rows(scratch, n)
        if dy is None:
            count, mean, m2, rest = unstack(out, 4)
            counts = flat_slice(scratch, 3 * scratch.shape[1], n)
            if t.lo < t.hi:
                _shifts_of_columns(x, mask, t.a, t.lo, t.hi, t.c0, t.c1, n_columns, center)
            add_rows(x, mask, t.a, t.lo, t.hi, t.c0, t.c1, center, counts, s0, s1)
            add_folds(counts, n_columns)
        else:
            (means,), (out_0, out_1) = unstack(piece_stats, 1), unstack(out, 2)
            copy_columns(flat_slice(means, t.a * n_columns, n_columns), t.c0, t.c1, center)
            shifts = copy_forward(forward, t.a, t.c0, t.c1, rows)
            place = t.a, t.lo, t.hi, t.c0, t.c1
            add_to_columns(dy, x, mask, fused, shifts, None, *place, center, s0, s1)
        add_folds(s0, n_columns)
        add_folds(s1, n_columns)
        for c in range(n_unfolded):
            to = (t.a * n_parts + t.k) * n_columns + t.c0 + c
            if dy is None:
                count[to] = counts[c]
                mean[to], m2[to], rest[to] = unshift(counts[c], center[c], s0[c], s1[c])
            else:
                out_0[to], out_1[to] = s0[c], s1[c]
        release((scratch, rows))
