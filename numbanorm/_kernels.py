"""Every compiled kernel, and their one set of flags.

A kernel's first argument, ``threads``, says which share of its tasks a call does, or that the
tasks are to be shared out between threads, see :mod:`numbanorm._launch`.

Kernels see arrays of two to four axes and never an axis argument:

rows
    ``x`` is (P, L): piece p is the contiguous row p.
columns
    ``x`` is (A, L, C): piece (a, c) is a column; its neighbours in memory are other pieces.
elements
    ``x`` is (M, D): row i is a statistics group, and each of its D elements has a weight.
element columns
    ``x`` is (A, D, B): each column is a statistics group, and row i of its D has weight i.
groups
    ``x`` is (A, R, B, L): the R rows of each of A * B statistics groups have a weight each.
group columns
    ``x`` is (A, L, C): some columns next to each other are a statistics group.

Statistics are taken around the first element of a piece and accumulated in float64, in one
pass. The shift bounds the cancellation (it is an element of the data, so m2 >= (x0 - mean)**2)
and makes constant data exact at any offset; sums in float64 still run at the speed of memory.

A long axis L is cut into parts, whose length depends on the shape alone, and each part has a
place of its own in the result: the bits do not depend on the number of threads.

Where a mask may be None, what is made of it by ``stretch`` and ``load`` is None, too. A coefficient
is a number, or a row of numbers: ``load`` makes a vector of either.

Several numbers of each piece, or of each group, are the rows of one array: a call takes some time
for each of its arrays. See :func:`numbanorm._views.split`.

``streamed`` says whether the output is written past the caches, see :mod:`numbanorm._lines`.
"""

from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from numbanorm._cache import InlinedCompiler, cached_njit
from numbanorm._launch import call_share, share
from numbanorm._lines import allocate, fence, line_size, release, store_line, to_next_line
from numbanorm._vectors import (
    LANES,
    fetch,
    is_finite,
    leading,
    load,
    narrow,
    splat,
    store,
    total,
    where,
    widen,
)
from numbanorm._views import split, stretch

# With the numpy error model no division is tested for zero, which would keep loops scalar. No
# function written in C calls a kernel. No reference to an array is counted: that takes as long as a
# short row, and long to compile. What a kernel allocates it has to release.
FLAGS: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False,
}  # fmt: skip
# What only kernels call: there is no way in from elsewhere.
INNER: dict[str, Any] = {"pipeline_class": InlinedCompiler, "no_cpython_wrapper": True, **FLAGS}
# What a kernel calls for each row must be inlined: passing arrays costs more than a short row.
LEAF: dict[str, Any] = {"forceinline": True, **INNER}
CONTRACT: dict[str, Any] = {"fastmath": {"contract"}, **LEAF}

# How far ahead of a loop over a row memory is asked for, in lines: far where it comes from memory,
# and near where it comes from a cache, as an array of so many elements may, and a core's first
# cache has several rows to hold.
AHEAD, NEAR, NEAR_TO = 1 << 7, 1 << 5, 1 << 20
# Elements of a step of such a loop.
STEP = 2 * LANES
# Rows that are added to a vector of columns at a time, and how many ahead memory is asked for at
# least.
ROWS = 4


@cached_njit(parallel=True, **FLAGS)
def launch(function, n, args):
    """Call the function at this address for shares 0 to n - 1, each in a thread."""
    for i in prange(n):
        call_share(function, i, n, args)


# ---------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------


@njit(**LEAF)
def _copy(values, target):
    """Write n values to the first n elements of target."""
    # Numba compiles ``target[:n] = values`` for seconds: it has a message for what cannot be here.
    for i in range(values.shape[0]):
        target[i] = values[i]


@njit(**LEAF)
def _clear(rows):
    """Write 0 to rows."""
    elements = stretch(rows, 0, rows.size)
    for i in range(elements.shape[0]):
        elements[i] = 0


@njit(**LEAF)
def _three_rows(rows, n):
    """Return the first n elements of each of three rows."""
    size = rows.shape[1]
    return stretch(rows, 0, n), stretch(rows, size, n), stretch(rows, 2 * size, n)


@njit(**LEAF)
def _repeat_columns(row, n):
    """Copy the first n columns of a row to the others.

    Where several rows of x are folded into one there are more columns than C: those of each.
    """
    for at in range(n, row.shape[0], n):
        _copy(stretch(row, 0, n), stretch(row, at, n))


@njit(**LEAF)
def _add_folds(sums, n):
    """Add to the first n columns of a row what the others have of them, see _repeat_columns."""
    for at in range(n, sums.shape[0], n):
        for c in range(n):
            sums[c] += sums[at + c]


@njit(**LEAF)
def _copy_columns(values, c0, c1, row):
    """Copy columns c0 to c1 of values (C,) to a row (c1 - c0,); see _repeat_columns."""
    n = min(values.shape[0], c1 - c0)
    _copy(stretch(values, c0, n), stretch(row, 0, n))
    _repeat_columns(row, n)


@njit(**LEAF)
def _copy_coefficients(by, a, c0, c1, rows):
    """Copy columns c0 to c1 of row a of each of N arrays (N, A, C) to N rows."""
    n, n_outer, n_columns = by.shape
    for k in range(n):
        values = stretch(by, (k * n_outer + a) * n_columns, n_columns)
        _copy_columns(values, c0, c1, stretch(rows, k * rows.shape[1], c1 - c0))


@njit(**LEAF)
def _spread(values, span, row):
    """Write each of values (n,) to ``span`` elements of a row (n * span,) next to each other."""
    if span == 1:
        _copy(values, row)
    else:
        for i in range(values.shape[0]):
            value = splat(values[i])
            for j in range(0, span, LANES):
                store(value, row, i * span + j, min(span - j, LANES))


@njit(**LEAF)
def _sum(values):
    """Return the sum of values (n,)."""
    n = values.shape[0]
    whole = n // LANES * LANES
    sums = load(values, whole, n - whole)
    for i in range(0, whole, LANES):
        sums += load(values, i, None)
    return total(sums)


@njit(**LEAF)
def _add_up(values, totals):
    """Write the sums of n / m values (n,) next to each other to totals (m,)."""
    span = values.shape[0] // max(totals.shape[0], 1)
    if span == 1:
        _copy(values, totals)
    else:
        for i in range(totals.shape[0]):
            totals[i] = _sum(stretch(values, i * span, span))


# ---------------------------------------------------------------------------------------------
# Moments
# ---------------------------------------------------------------------------------------------


@njit(**LEAF)
def _shifted_terms(xs, counts, i, n, center):
    """Return vectors of 1, x - center and its square for n elements from i on, and of 0.

    An element counts where counts is True, or is None; see load about n.
    """
    # x is read in any case: a load that depends on the mask is not fetched ahead.
    d, zero, one = widen(load(xs, i, n)) - center, splat(0.0), splat(1.0)
    if counts is None:
        if n is None:
            return one, d, d * d
        here = leading(n)
    else:
        here = load(counts, i, n)
    d = where(here, d, zero)
    return where(here, one, zero), d, d * d


@njit(**LEAF)
def _plus_three(v, w):
    return v[0] + w[0], v[1] + w[1], v[2] + w[2]


@njit(**LEAF)
def _terms(dys, xs, counts, i, n, center):
    """Return vectors of 1, w and w * (x - center) for n elements from i on, and of 0.

    w is dy, or x - center if dys is None: the three are a row.
    """
    if dys is None:
        return _shifted_terms(xs, counts, i, n, center)
    w, d = _gradient_terms(dys, xs, counts, i, n, center)
    return w, w, w * d


@njit(**LEAF)
def _row(dy, x, mask, at, n):
    """Return a row of n elements, from ``at`` on."""
    return stretch(dy, at, n), stretch(x, at, n), stretch(mask, at, n)


@njit(**LEAF)
def _begin_sums(row, n, center):
    """Return two sums of the terms of a row of n elements, with those that are less than a step."""
    rest, whole = n % STEP, n // STEP * STEP
    # They come first, so that nothing waits for a branch.
    a = _terms(*row, whole, min(rest, LANES), center)
    return a, _terms(*row, whole + LANES, max(rest - LANES, 0), center)


@njit(**LEAF)
def _add_step(row, i, center, sums):
    """Add the terms of a step to two sums: one would wait for itself."""
    a, b = sums
    a = _plus_three(a, _terms(*row, i, None, center))
    return a, _plus_three(b, _terms(*row, i + LANES, None, center))


@njit(**LEAF)
def _end_sums(counts, n, sums):
    """Return how many of n elements count, and the sums of w and w * (x - center)."""
    a, b = sums
    count = n if counts is None else np.intp(total(a[0] + b[0]))
    return count, total(a[1] + b[1]), total(a[2] + b[2])


@njit(**LEAF)
def _ask(row, i):
    """Ask memory for a vector of a row, which may be outside."""
    fetch(row[0], i)
    fetch(row[1], i)
    fetch(row[2], i)


@njit(**LEAF)
def _sums(row, n, center):
    """Return what _end_sums does of a row of n elements, around a number."""
    middle, ahead = splat(center), AHEAD * line_size(row[1])
    sums = _begin_sums(row, n, middle)
    for i in range(0, n // STEP * STEP, STEP):
        _ask(row, i + ahead)
        _ask(row, i + LANES + ahead)
        sums = _add_step(row, i, middle, sums)
    return _end_sums(row[2], n, sums)


@njit(**LEAF)
def _first(xs, counts):
    """Return the first element of xs (n,) that counts, or 0; counts (n,) may be None."""
    for i in range(xs.shape[0]):
        if counts is None or counts[i]:
            return np.float64(xs[i])
    return 0.0


@njit(**LEAF)
def _two_sum(a, b):
    """Return a + b in float64, and what that rounds away (Knuth); 0 if it is not finite."""
    s = a + b
    t = s - a
    rest = (a - (s - t)) + (b - t)
    return s, rest if np.isfinite(s) else 0.0


@njit(**LEAF)
def _unshift(n, shift, s1, s2):
    """Return mean, its rest and m2 from sums around shift (Chan et al. 1983, eq. 1.7).

    All of them are 0 where there is nothing, and shift is.
    """
    r = s1 / max(n, 1)
    m2 = s2 - s1 * r
    mean, rest = _two_sum(shift, r)
    # Not max(): a NaN must stay.
    return mean, rest, 0.0 if m2 < 0.0 else m2


@njit(**LEAF)
def _unshift_all(n, mean, rest, m2):
    """Write mean, its rest and m2 where shift, s1 and s2 are, see _unshift: rows (P,)."""
    for i in range(n.shape[0]):
        mean[i], rest[i], m2[i] = _unshift(n[i], mean[i], rest[i], m2[i])


@njit(**LEAF)
def _rows_of_task(task, n_parts, part, block, shape):
    """Return what a task works on: the first and the last row, the part, and where that is.

    It is ``block`` whole rows of an array (P, L), or one part of a row, from ``lo`` on, of n
    elements.
    """
    k, first, lo = task % n_parts, task // n_parts * block, task % n_parts * part
    return first, min(first + block, shape[0]), k, lo, min(part, shape[1] - lo)


@cached_njit(**FLAGS)
def moments_rows(threads, x, mask, part, block, moments):
    """Moments of each part: x, mask or None (P, L) -> count, mean, rest, m2, (4, P, K, 1)."""
    _, n_pieces, n_parts, _ = moments.shape
    begin, end = share(threads, (n_pieces + block - 1) // block * n_parts)
    count, mean, rest, m2 = split(moments, 4)
    for task in range(begin, end):
        first, last, k, lo, n = _rows_of_task(task, n_parts, part, block, x.shape)
        for p in range(first, last):
            row = _row(None, x, mask, p * x.shape[1] + lo, n)
            shift = _first(row[1], row[2])
            mean[p, k, 0] = shift
            count[p, k, 0], rest[p, k, 0], m2[p, k, 0] = _sums(row, n, shift)
        # Of all at once, in vectors. Where rows have parts, there is one.
        at, n = first * n_parts + k, last - first
        _unshift_all(
            stretch(count, at, n), stretch(mean, at, n), stretch(rest, at, n), stretch(m2, at, n)
        )


@njit(**LEAF)
def _add_to_vector(
    dy, x, counts, weight, i, n_rows, at, step, coming, stride, c, n, center, s0, s1
):
    """Add rows to a vector of columns, see _add_to_columns, from c on; see load about n.

    Rows i to i + n_rows of dy, x and counts (N,) begin at ``at``, ``step`` apart; what is read next
    is at ``coming``.
    """
    middle, sum_0, sum_1 = load(center, c, n), load(s0, c, n), load(s1, c, n)
    for k in range(i, i + n_rows):
        fetch(dy, coming)
        fetch(x, coming)
        fetch(counts, coming)
        if dy is None:
            d = widen(load(x, at, n)) - middle
            if counts is not None:
                d = where(load(counts, at, n), d, splat(0.0))
            sum_0 += d
            sum_1 += d * d
        else:
            w, d = _gradient_terms(dy, x, counts, at, n, middle)
            if weight is not None:
                w = w * splat(np.float64(weight[k]))
            sum_0 += w
            sum_1 += w * d
        at += step
        coming += stride
    store(sum_0, s0, c, n)
    store(sum_1, s1, c, n)


@njit(**LEAF)
def _add_to_columns(dy, x, counts, weight, a, lo, hi, c0, c1, center, s0, s1):
    """Add rows lo to hi of x[a], columns c0 to c1, to sums of w and w * (x - center).

    w is dy, or x - center if that is None. ``counts`` is the mask, or None. A row of dy counts as
    often as its ``weight`` (L,) says, unless that is None.
    """
    step, width = x.shape[2], c1 - c0
    dys, xs, counts = stretch(dy, 0, x.size), stretch(x, 0, x.size), stretch(counts, 0, x.size)
    # The rows that come next are asked for in the order of memory, if they are whole.
    spread, stride = (ROWS, LANES) if width == step else (1, step)
    # ROWS ahead, or more of them where they are short; half as far where dy is read as well.
    far, some = (AHEAD if dy is None else AHEAD // 2) * line_size(x), max(ROWS * step, 1)
    ahead = max(far // some, 1) * some
    whole = width // LANES * LANES
    for i in range(lo, hi, ROWS):
        at, n_rows = (a * x.shape[1] + i) * step + c0, min(ROWS, hi - i)
        for c in range(0, whole, LANES):
            coming = at + ahead + spread * c
            _add_to_vector(
                dys, xs, counts, weight, i, n_rows, at + c, step, coming, stride, c, None,
                center, s0, s1,
            )  # fmt: skip
        if whole < width:
            coming = at + ahead + spread * whole
            _add_to_vector(
                dys, xs, counts, weight, i, n_rows, at + whole, step, coming, stride, whole,
                width - whole, center, s0, s1,
            )  # fmt: skip


@njit(**CONTRACT)
def _add_counts(counts, n):
    """Add four rows of counts (4, n) to n (n,)."""
    for c in range(n.shape[0]):
        n[c] += (np.int32(counts[0, c]) + counts[1, c]) + (np.int32(counts[2, c]) + counts[3, c])


@njit(**CONTRACT)
def _find_first(xs, counts, found, shift):
    """Write x to shift where counts is the first True, and mark it as found: rows (n,)."""
    for c in range(shift.shape[0]):
        x = np.float64(xs[c])
        shift[c] = x if counts[c] > found[c] else shift[c]
    for c in range(shift.shape[0]):
        found[c] |= counts[c]


@njit(**LEAF)
def _add_rows(x, mask, a, lo, hi, c0, c1, shift, n, s1, s2):
    """Add rows lo to hi of x[a], columns c0 to c1, to their counts and shifted sums."""
    _add_to_columns(None, x, mask, None, a, lo, hi, c0, c1, shift, s1, s2)
    if mask is None:
        for c in range(c1 - c0):
            n[c] += hi - lo
    else:
        for i in range(lo, hi - 3, 4):
            _add_counts(mask[a, i : i + 4, c0:c1], n)
        for i in range(hi - (hi - lo) % 4, hi):
            for c in range(c1 - c0):
                n[c] += mask[a, i, c0 + c]


@njit(**LEAF)
def _first_of_columns(x, counts, shift, found):
    """Write the first element of each column of x (L, C) that counts to shift (C,), which is 0.

    Write where there is one to found (C,).
    """
    _clear(found)
    n_rows = min(4, x.shape[0])
    for i in range(n_rows):
        _find_first(x[i], counts[i], found, shift)
    for c in range(shift.shape[0]):
        if not found[c]:
            shift[c] = _first(x[n_rows:, c], counts[n_rows:, c])
            found[c] = np.any(counts[n_rows:, c])


@njit(**LEAF)
def _merge(n_a, mean_a, rest_a, m2_a, n_b, mean_b, rest_b, m2_b):
    """Return count, mean, its rest and m2 of a and b together (Chan et al. 1983, eq. 2.1).

    A mean has two parts, as deviations may be as small as what its rounding takes away.
    """
    if n_a == 0:
        return n_b, mean_b, rest_b, m2_b
    if n_b == 0:
        return n_a, mean_a, rest_a, m2_a
    n = n_a + n_b
    share = n_b / n
    delta = (mean_b - mean_a) + (rest_b - rest_a)
    mean, rest = _two_sum(mean_a, delta * share)
    mean, rest = _two_sum(mean, rest + rest_a)
    return n, mean, rest, m2_a + m2_b + delta * delta * (n_a * share)


@njit(**LEAF)
def _shifts_of_columns(x, mask, a, lo, hi, c0, c1, n_columns, shift):
    """Write an element of each column that counts, or 0, for rows lo to hi of x[a], to shift.

    A row holds each of n columns several times, with one shift for all.
    """
    n = c1 - c0
    if mask is None:
        _copy(stretch(x, (a * x.shape[1] + lo) * x.shape[2] + c0, min(n, n_columns)), shift)
    else:
        found = allocate(None, c1 - c0, np.bool_)
        _first_of_columns(x[a, lo:hi, c0:c1], mask[a, lo:hi, c0:c1], shift, found)
        for c in range(n_columns, n):
            if found[c] and not found[c % n_columns]:
                found[c % n_columns] = True
                shift[c % n_columns] = shift[c]
        release((found,))
    for c in range(n_columns, n):
        shift[c] = shift[c - n_columns]


@cached_njit(**FLAGS)
def moments_columns(threads, x, mask, part, width, moments):
    """Moments of each part: x, mask or None (A, L, F * C) -> count, mean, rest, m2, (4, A, K, C).

    A row holds each column F times, once for each of the rows of x that are folded into it, and is
    one block then.
    """
    _, n_outer, n_parts, n_columns = moments.shape
    length, n_folded = x.shape[1:]
    n_blocks = (n_folded + width - 1) // width
    begin, end = share(threads, n_outer * n_parts * n_blocks)
    count, mean, rest, m2 = split(moments, 4)
    for task in range(begin, end):
        a = task // (n_parts * n_blocks)
        k = task // n_blocks - a * n_parts
        c0 = (task % n_blocks) * width
        c1 = min(n_folded, c0 + width)
        lo = k * part
        hi = min(length, lo + part)
        here = c1 - c0
        own = allocate(4, here, mean.dtype)
        _clear(own)
        s1, s2, shift = _three_rows(own, here)
        n = stretch(own, 3 * own.shape[1], here)
        if lo < hi:
            _shifts_of_columns(x, mask, a, lo, hi, c0, c1, n_columns, shift)
        _add_rows(x, mask, a, lo, hi, c0, c1, shift, n, s1, s2)
        for values in (n, s1, s2):
            _add_folds(values, n_columns)
        for c in range(min(here, n_columns)):
            to = a, k, c0 + c
            count[to] = n[c]
            mean[to], rest[to], m2[to] = _unshift(n[c], shift[c], s1[c], s2[c])
        release((own,))


@cached_njit(**FLAGS)
def merge(moments, merged):
    """Merge an axis of count, mean, rest, m2: (4, A, K, B) -> (4, A, B), which start at 0."""
    count, mean, rest, m2 = split(moments, 4)
    merged_count, merged_mean, merged_rest, merged_m2 = split(merged, 4)
    for a in range(count.shape[0]):
        for k in range(count.shape[1]):
            for b in range(count.shape[2]):
                (
                    merged_count[a, b], merged_mean[a, b], merged_rest[a, b], merged_m2[a, b]
                ) = _merge(
                    merged_count[a, b], merged_mean[a, b], merged_rest[a, b], merged_m2[a, b],
                    count[a, k, b], mean[a, k, b], rest[a, k, b], m2[a, k, b],
                )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Algebra: pieces merge into the groups of all statistics, which make the pieces' coefficients.
# ``first`` (R, n) and ``step`` (R,) are those of _axes.Segments: their rows are S statistics, and
# in Plan.segments the weights and the instances. A task of the sums over pieces is a statistic,
# whose groups go from ``bounds[k]`` to ``bounds[k + 1]``. ``statistics`` (3 or more, G) are count,
# mean and variance of each group, ``mixture`` (2, S) the weights of the statistics' means and
# variances, ``pieces`` (3, P) mean, variance and rstd of each.
# ---------------------------------------------------------------------------------------------

# Elements that are summed up in their own type.
ELEMENTS = 1024
# Pieces of a task, and what each of them counts for where few elements go without threads.
PIECES = 1024
PIECE = 4


@njit(**LEAF)
def _of_segment(values, group, i, n):
    """Return what n pieces of a segment, from its piece i on, have of values of groups, and 0.

    ``group`` is that of its first piece, and the step to the next one's.
    """
    first, step = group
    if step == 0:
        return where(leading(n), splat(values[first]), splat(0.0))
    return load(values, first + i, n)


@njit(**LEAF)
def _add_to_segment(vector, values, group, i, n):
    """Add what n pieces of a segment have, and 0, to values of their groups."""
    first, step = group
    if step == 0:
        values[first] += total(vector)
    else:
        store(load(values, first + i, n) + vector, values, first + i, n)


@njit(**LEAF)
def _not_below_one(vector):
    """Return 1 where an element is less, or NaN."""
    one = splat(1.0)
    return where(vector > one, vector, one)


@njit(**LEAF)
def _copy_segments(moments, firsts, n, group_mean, group_rest, group_m2):
    """Copy pieces (4, P), each of which is a group of a statistic."""
    count, mean, rest, m2 = split(moments, 4)
    length = len(count) // max(len(firsts), 1)
    for j in range(len(firsts)):
        at, to = j * length, firsts[j]
        _copy(stretch(count, at, length), stretch(n, to, length))
        _copy(stretch(mean, at, length), stretch(group_mean, to, length))
        _copy(stretch(rest, at, length), stretch(group_rest, to, length))
        _copy(stretch(m2, at, length), stretch(group_m2, to, length))


@njit(**LEAF)
def _add_means(moments, firsts, step, n, group_mean, group_rest):
    """Add counts and means of pieces to the groups of a statistic, all of which are 0.

    The means are taken around one of them, which is written to group_rest; as in a piece, the shift
    bounds the cancellation.
    """
    (count, mean, rest), zero = split(moments, 3), splat(0.0)
    length = len(count) // max(len(firsts), 1)
    for j in range(len(firsts)):
        first, at, group = firsts[j], j * length, (firsts[j], step)
        if step == 0 and n[first] == 0.0:
            group_rest[first] = _first(stretch(mean, at, length), stretch(count, at, length))
        for i in range(0, length, LANES):
            here = min(LANES, length - i)
            counts, means = load(count, at + i, here), load(mean, at + i, here)
            around = _of_segment(group_rest, group, i, here)
            if step != 0:
                around = where(load(n, first + i, here) > zero, around, means)
                store(around, group_rest, first + i, here)
            d = (means - around) + load(rest, at + i, here)
            sums = where(counts > zero, counts * d, zero)
            _add_to_segment(counts, n, group, i, here)
            _add_to_segment(sums, group_mean, group, i, here)


@njit(**LEAF)
def _add_squares(moments, firsts, step, group_mean, group_rest, group_m2):
    """Add the squares in pieces, and those of their means, around the mean of their group."""
    (count, mean, rest, m2), zero = split(moments, 4), splat(0.0)
    length = len(count) // max(len(firsts), 1)
    for j in range(len(firsts)):
        at, group = j * length, (firsts[j], step)
        for i in range(0, length, LANES):
            here = min(LANES, length - i)
            counts, means = load(count, at + i, here), load(mean, at + i, here)
            around = _of_segment(group_rest, group, i, here)
            middle = _of_segment(group_mean, group, i, here)
            d = ((means - around) + load(rest, at + i, here)) - middle
            squares = load(m2, at + i, here) + counts * d * d
            _add_to_segment(where(counts > zero, squares, zero), group_m2, group, i, here)


@cached_njit(**FLAGS)
def merge_pieces(threads, moments, first, step, bounds, center, ddof, merged):
    """Merge count, mean, rest, m2 (4, P) into count, mean, variance, rest, m2 of groups (5, G).

    As Chan et al. 1983, eq. 2.1, for many at once. If not ``center``, the variance is the mean
    square, and the mean is 0.
    """
    n_pieces, n_segments = moments.shape[1], first.shape[1]
    begin, end = share(threads, first.shape[0])
    n, group_mean, var, group_rest, group_m2 = split(merged, 5)
    for k in range(begin, end):
        firsts = stretch(first, k * n_segments, n_segments)
        lo, n_groups = bounds[k], bounds[k + 1] - bounds[k]
        if n_groups == n_pieces:
            _copy_segments(moments, firsts, n, group_mean, group_rest, group_m2)
        else:
            for values in (n, group_mean, group_rest, group_m2):
                _clear(stretch(values, lo, n_groups))
            _add_means(moments, firsts, step[k], n, group_mean, group_rest)
            for g in range(lo, lo + n_groups):
                group_mean[g] /= max(n[g], 1.0)
            _add_squares(moments, firsts, step[k], group_mean, group_rest, group_m2)
            for g in range(lo, lo + n_groups):
                group_mean[g], group_rest[g] = _two_sum(group_rest[g], group_mean[g])
        for i in range(0, n_groups, LANES):
            g, here = lo + i, min(LANES, n_groups - i)
            value = load(group_m2, g, here) / _not_below_one(
                load(n, g, here) - splat(np.float64(ddof))
            )
            if not center:
                mu = load(group_mean, g, here)
                value += mu * mu
                store(splat(0.0), group_mean, g, here)
            store(value, var, g, here)


@njit(**CONTRACT)
def _invert_roots(var, eps, rstd):
    """Write 1 / sqrt(var + eps) to rstd (n,), and 0 where it was 0 or var + eps is 0."""
    for i in range(var.shape[0]):
        v = var[i] + eps
        rstd[i] = 0.0 if (rstd[i] == 0.0) | (v == 0.0) else 1.0 / np.sqrt(v)


@njit(**LEAF)
def _pieces_of_task(task, n_pieces, first):
    """Return the segment of a task, its length, and from where to where the task's pieces are."""
    length = n_pieces // max(first.shape[1], 1)
    n_parts = (length + PIECES - 1) // PIECES
    j, lo = task // n_parts, task % n_parts * PIECES
    return j, j * length, lo, min(lo + PIECES, length)


@njit(**LEAF)
def _n_tasks(n_pieces, first):
    """Return how many tasks some pieces are: segments, or parts of them."""
    length = n_pieces // max(first.shape[1], 1)
    return first.shape[1] * ((length + PIECES - 1) // PIECES)


@njit(**LEAF)
def _store_scale_shift(mean, rstd, weight, bias, m, s, t, i, n):
    """Write m, s and t, see _scale_shift, from vectors of float64."""
    scale, rounded = rstd * weight, narrow(mean, m)
    store(rounded, m, i, n)
    store(narrow(scale, s), s, i, n)
    store(narrow((widen(rounded) - mean) * scale + bias, t), t, i, n)


@cached_njit(**FLAGS)
def coefficients(threads, first, step, statistics, mixture, eps, parameters, pieces, by):
    """Mix statistics; write what normalises pieces, and m, s and t (3, P), see _scale_shift.

    ``parameters`` (2, F) are weight and bias of each feature.
    """
    n_pieces, n_statistics = by.shape[1], mixture.shape[1]
    begin, end = share(threads, _n_tasks(n_pieces, first))
    n, mean, var = split(statistics, 3)
    p, q = split(mixture, 2)
    weight, bias = split(parameters, 2)
    piece_mean, piece_var, rstd = split(pieces, 3)
    m, s, t = split(by, 3)
    for task in range(begin, end):
        j, at, lo, hi = _pieces_of_task(task, n_pieces, first)
        for i in range(lo, hi, LANES):
            here, group = min(LANES, hi - i), (first[0, j], step[0])
            n_elements = _of_segment(n, group, i, here)
            mean_0, var_0 = _of_segment(mean, group, i, here), _of_segment(var, group, i, here)
            mu, v = mean_0, var_0
            # Softmax weights need not sum to 1 in floating point: mix the differences. Without +=,
            # as where kernels are Python functions vectors are arrays.
            for k in range(1, n_statistics):
                group = first[k, j], step[k]
                n_elements += _of_segment(n, group, i, here)
                mu = mu + splat(p[k]) * (_of_segment(mean, group, i, here) - mean_0)
                v = v + splat(q[k]) * (_of_segment(var, group, i, here) - var_0)
            store(mu, piece_mean, at + i, here)
            store(v, piece_var, at + i, here)
            store(n_elements, rstd, at + i, here)
        _invert_roots(stretch(piece_var, at + lo, hi - lo), eps, stretch(rstd, at + lo, hi - lo))
        feature = first[n_statistics, j], step[n_statistics]
        for i in range(lo, hi, LANES):
            here = min(LANES, hi - i)
            _store_scale_shift(
                load(piece_mean, at + i, here), load(rstd, at + i, here),
                _of_segment(weight, feature, i, here), _of_segment(bias, feature, i, here),
                m, s, t, at + i, here,
            )  # fmt: skip


@cached_njit(**FLAGS)
def add_parts(parts, sums):
    """Sum an axis of sums (2, A, K, B) -> (2, A, B), which start at 0."""
    n_outer, n_parts, n_columns = parts.shape[1:]
    values, sums = stretch(parts, 0, parts.size), stretch(sums, 0, sums.size)
    for a in range(2 * n_outer):
        for k in range(a * n_parts, (a + 1) * n_parts):
            for i in range(0, n_columns, LANES):
                here, to = min(LANES, n_columns - i), a * n_columns + i
                own = load(values, k * n_columns + i, here)
                store(load(sums, to, here) + own, sums, to, here)


@cached_njit(**FLAGS)
def group_gradients(
    threads, sums, first, step, bounds, statistics, ddof, mixture, parameters, pieces,
    dstatistics, dmixture, dparameters,
):  # fmt: skip
    """Sum gradients of groups (2, G), logits (2, S) and features (2, F), which start at 0.

    ``sums`` (2, P) are those of dy and dy * (x - mean) over each piece. The gradients of the mean
    and of the variance of a group are divided by the number that those were divided by.
    """
    n_statistics, n_segments = mixture.shape[1], first.shape[1]
    begin, end = share(threads, n_statistics)
    s0, s1 = split(sums, 2)
    n, mean, var = split(statistics, 3)
    p, q = split(mixture, 2)
    (weight,) = split(parameters, 1)
    piece_mean, piece_var, rstd = split(pieces, 3)
    dmean, dvar = split(dstatistics, 2)
    dp, dq = split(dmixture, 2)
    dweight, dbias = split(dparameters, 2)
    length = len(s0) // max(n_segments, 1)
    for k in range(begin, end):
        sum_p, sum_q = splat(0.0), splat(0.0)
        for j in range(n_segments):
            at, group = j * length, (first[k, j], step[k])
            feature = first[n_statistics, j], step[n_statistics]
            for i in range(0, length, LANES):
                here = min(LANES, length - i)
                sum_0, sum_1 = load(s0, at + i, here), load(s1, at + i, here)
                root = load(rstd, at + i, here)
                if k == 0:
                    _add_to_segment(sum_0, dbias, feature, i, here)
                    _add_to_segment(root * sum_1, dweight, feature, i, here)
                scale = root * _of_segment(weight, feature, i, here)
                dmu = splat(-p[k]) * scale * sum_0
                dv = splat(-0.5 * q[k]) * scale * root * root * sum_1
                _add_to_segment(dmu, dmean, group, i, here)
                _add_to_segment(dv, dvar, group, i, here)
                # Of the softmax, with the mixture itself taken off each.
                mu, v = load(piece_mean, at + i, here), load(piece_var, at + i, here)
                sum_p += dmu * (_of_segment(mean, group, i, here) - mu)
                sum_q += dv * (_of_segment(var, group, i, here) - v)
        dp[k], dq[k] = total(sum_p), total(sum_q)
        for g in range(bounds[k], bounds[k + 1], LANES):
            here = min(LANES, bounds[k + 1] - g)
            count = load(n, g, here)
            of_var = _not_below_one(count - splat(np.float64(ddof)))
            store(load(dmean, g, here) / _not_below_one(count), dmean, g, here)
            store(load(dvar, g, here) / of_var, dvar, g, here)


@cached_njit(**FLAGS)
def gradient_coefficients(
    threads, first, step, statistics, dstatistics, center, fixed, own, parameters, pieces, by
):
    """Write a, r, m, b, c (5, P), see _input_gradient, from what group_gradients found.

    The groups of statistic ``fixed`` do not come from x. ``own`` (2, I) are count and mean of each
    instance where those have sample variances, else None.
    """
    n_pieces, n_statistics = by.shape[1], first.shape[0] - 2
    begin, end = share(threads, _n_tasks(n_pieces, first))
    _, mean, _ = split(statistics, 3)
    dmean, dvar = split(dstatistics, 2)
    own_n, own_mean = split(own, 2)
    (weight,) = split(parameters, 1)
    piece_mean, _, rstd = split(pieces, 3)
    a, r, m, b, c = split(by, 5)
    zero, one = splat(0.0), splat(1.0)
    for task in range(begin, end):
        j, at, lo, hi = _pieces_of_task(task, n_pieces, first)
        feature = first[n_statistics, j], step[n_statistics]
        instance = first[n_statistics + 1, j], step[n_statistics + 1]
        for i in range(lo, hi, LANES):
            here = min(LANES, hi - i)
            mu, root = load(piece_mean, at + i, here), load(rstd, at + i, here)
            # The mean of the means that x is compared with, by their slopes, so that x - m and c
            # are small. The mixture may be far away, where a part of it is fixed.
            slopes, shift = splat(0.0), splat(0.0)
            for k in range(n_statistics):
                if k != fixed:
                    group = first[k, j], step[k]
                    slope = _of_segment(dvar, group, i, here)
                    slope = where(slope > zero, slope, zero - slope)
                    if own is None:
                        around = _of_segment(mean, group, i, here)
                    else:
                        around = _of_segment(own_mean, instance, i, here)
                    slopes += slope
                    shift += slope * (around - mu)
            some = slopes > zero
            middle = narrow(mu + where(some, shift, zero) / where(some, slopes, one), m)
            rounded = widen(middle)
            slope, offset = splat(0.0), splat(0.0)
            for k in range(n_statistics):
                if k == fixed:
                    continue
                group = first[k, j], step[k]
                if center:
                    offset += _of_segment(dmean, group, i, here)
                dsquare = splat(2.0) * _of_segment(dvar, group, i, here)
                group_mean = _of_segment(mean, group, i, here)
                if own is None:
                    slope += dsquare
                    offset += dsquare * (rounded - group_mean)
                else:
                    # var is the mean of factor * (x - own mean)**2 + (own mean - mean)**2.
                    n_own = _of_segment(own_n, instance, i, here)
                    mean_own = _of_segment(own_mean, instance, i, here)
                    factor = n_own / _not_below_one(n_own - one)
                    slope += dsquare * factor
                    offset += dsquare * (factor * (rounded - mean_own) + (mean_own - group_mean))
            # r only keeps b and c in range: any number does where rstd is 0.
            scale = where(root > zero, root, one)
            slope, offset = slope / scale, offset / scale
            direct = root * _of_segment(weight, feature, i, here)
            store(narrow(direct, a), a, at + i, here)
            store(narrow(scale, r), r, at + i, here)
            store(middle, m, at + i, here)
            store(narrow(slope, b), b, at + i, here)
            store(narrow(offset, c), c, at + i, here)


@cached_njit(**FLAGS)
def track(
    statistics, first, last, ddof, batch_ddof, momentum, skip_nonfinite,
    running_mean, running_var, n_batches,
):  # fmt: skip
    """Move running statistics (R,) towards those of N samples, groups ``first`` to ``last``.

    Count a batch more, and return whether the statistics are left alone, as something is not
    finite. A variance was divided by n - batch_ddof, a running one is by n - ddof.
    """
    n, mean, var = split(statistics, 3)
    n_batches[()] += 1
    if skip_nonfinite:
        for g in range(first, last):
            if not (np.isfinite(mean[g]) and np.isfinite(var[g])):
                return True
    size = len(running_mean)
    for i in range(size):
        n_samples, mean_sum, var_sum = 0, 0.0, 0.0
        for g in range(first + i, last, size):
            if n[g] > 0:
                n_samples += 1
                mean_sum += mean[g]
                var_sum += var[g] * (max(n[g] - batch_ddof, 1.0) / max(n[g] - ddof, 1.0))
        if n_samples > 0:
            rest = 1.0 - momentum
            running_mean[i] = rest * running_mean[i] + momentum * (mean_sum / n_samples)
            running_var[i] = rest * running_var[i] + momentum * (var_sum / n_samples)
    return False


# ---------------------------------------------------------------------------------------------
# Writing past the caches: a loop writes to a buffer, from where it goes on in whole lines
# ---------------------------------------------------------------------------------------------

# Lines of a row that are written to a buffer at once, whole steps: few, as memory is not read while
# they leave, but more where what is read comes from a cache, as it does for so many elements.
BUFFER, LONG_BUFFER, LONG_TO = 12, 64, 1 << 22
# Not inlined, as rows are long here: a kernel with this in its loop would be slower for short ones.
STREAM = INNER
# ``kept``, how many elements of a line wait for the others, starts as np.intp(0): of what is called
# with the literal 0 and with other numbers Numba compiles two.


@njit(**LEAF)
def _at_once(y):
    """Return how many elements of a row are written to a buffer at once."""
    return (LONG_BUFFER if y.size < LONG_TO else BUFFER) * line_size(y)


@njit(**LEAF)
def _buffered(n, streamed, y):
    """Return how many elements a buffer holds: n on their way to y, and those that are kept.

    These are read as a vector, wherever it begins.
    """
    return n + 2 * LANES if streamed else 0


@njit(**LEAF)
def _flush(buffer, n, y, at):
    """Write n elements to y (N,) from ``at`` on; return how many are kept, and where they belong.

    What is only a part of a line is kept for those that come next, unless it is the first.
    """
    line = line_size(y)
    begin = min(n, to_next_line(y, at))
    end = begin + (n - begin) // line * line
    for i in range(begin):
        y[at + i] = buffer[i]
    for i in range(begin, end, line):
        store_line(y, at + i, buffer, i)
    store(load(buffer, end, None), buffer, np.intp(0), None)
    return n - end, at + end


@njit(**STREAM)
def _finish(buffer, kept, y, at):
    """Write what was kept to y (N,)."""
    for i in range(kept):
        y[at + i] = buffer[i]


@njit(**LEAF)
def _open_stream(buffer):
    """Return what is between loops and memory: the buffer, how many are kept, where they belong."""
    return buffer, np.intp(0), np.intp(0)


@njit(**LEAF)
def _follow(stream, y, place):
    """Return the stream once what is kept, unless ``place`` comes next, is written to y (N,)."""
    buffer, kept, at = stream
    if at + kept != place:
        _finish(buffer, kept, y, at)
        kept, at = np.intp(0), place
    return buffer, kept, at


@njit(**LEAF)
def _begin_run(streamed, stream, y, place, n):
    """Return where to write n elements that come to y (N,) at ``place``, and the stream."""
    if not streamed:
        return stretch(y, place, n), stream
    stream = _follow(stream, y, place)
    return stretch(stream[0], stream[1], n), stream


@njit(**LEAF)
def _end_run(streamed, stream, y, n):
    """Return the stream once a run of n elements is written."""
    buffer, kept, at = stream
    if streamed:
        kept, at = _flush(buffer, kept + n, y, at)
    return buffer, kept, at


@njit(**LEAF)
def _write_vectors(write, row, asked, lo, hi, by, ys, offset):
    """Write elements lo to hi of a row to ys, where ``offset`` is added to their place.

    ``write`` is the function that writes a vector, from ``by``: numbers, or rows of them. The same
    elements of another row are asked for.
    """
    whole = hi - (hi - lo) % LANES
    for i in range(lo, whole, LANES):
        _ask(asked, i)
        write(row, i, None, by, ys, i + offset)
    if whole < hi:
        write(row, whole, hi - whole, by, ys, whole + offset)


@njit(**LEAF)
def _write_run(streamed, stream, write, row, asked, n, by, y, place):
    """Write a row of n elements to y (N,) from ``place`` on, and return the stream.

    See _write_vectors about the others. ``streamed`` is True or None, as having both makes a kernel
    slower for short rows.
    """
    start = np.intp(0)
    if streamed is None:
        _write_vectors(write, row, asked, start, n, by, y, place)
        return stream
    n_at_once = _at_once(y)
    for i in range(start, n, n_at_once):
        n_here = min(n_at_once, n - i)
        ys, stream = _begin_run(streamed, stream, y, place + i, n_here)
        _write_vectors(write, row, asked, i, i + n_here, by, ys, -i)
        stream = _end_run(streamed, stream, y, n_here)
    return stream


@njit(**LEAF)
def _close_stream(streamed, stream, y):
    """Write what is kept to y (N,)."""
    if streamed:
        buffer, kept, at = stream
        _finish(buffer, kept, y, at)
        fence()


@njit(**LEAF)
def _write_columns(streamed, buffer, write, dy, x, mask, a, lo, hi, c0, c1, by, y):
    """Write rows lo to hi of y[a], columns c0 to c1, from rows of coefficients; see _write_run."""
    stream, out, n, step = _open_stream(buffer), stretch(y, 0, y.size), c1 - c0, x.shape[2]
    start = np.intp(0)
    for i in range(lo, hi):
        at = (a * x.shape[1] + i) * step + c0
        row, asked = _row(dy, x, mask, at, n), _row(dy, x, None, at + ROWS * step, 0)
        ys, stream = _begin_run(streamed, stream, out, at, n)
        _write_vectors(write, row, asked, start, n, by, ys, start)
        stream = _end_run(streamed, stream, out, n)
    _close_stream(streamed, stream, out)


# ---------------------------------------------------------------------------------------------
# Apply: y = (x - m) * s + t, with one m, s and t for each piece
# ---------------------------------------------------------------------------------------------


@njit(**CONTRACT)
def _scale_shift(x, m, s, t):
    """Subtract m, the mean rounded to x's type, before anything else: exact at any offset."""
    return (x - m) * s + t


@njit(**LEAF)
def _apply_vector(row, i, n, by, ys, k):
    """Scale and shift a vector of a row, see _terms, by m, s and t, and write it to ys[k]."""
    x, (m, s, t) = load(row[1], i, n), by
    store(_scale_shift(x, load(m, i, n), load(s, i, n), load(t, i, n)), ys, k, n)


@cached_njit(**FLAGS)
def apply_rows(threads, x, part, block, by, streamed, y):
    """Scale and shift each piece: x (P, L), m, s and t (3, P, 1) -> y (P, L).

    ``streamed`` is True or None.
    """
    n_parts = max(1, (x.shape[1] + part - 1) // part)
    begin, end = share(threads, (x.shape[0] + block - 1) // block * n_parts)
    (m, s, t), ahead = split(by, 3), AHEAD * line_size(x)
    buffer = allocate(None, _buffered(_at_once(y), streamed, y), y.dtype)
    stream, out = _open_stream(buffer), stretch(y, 0, y.size)
    for task in range(begin, end):
        first, last, _, lo, n = _rows_of_task(task, n_parts, part, block, x.shape)
        for p in range(first, last):
            at, of_piece = p * x.shape[1] + lo, (m[p, 0], s[p, 0], t[p, 0])
            row, asked = _row(None, x, None, at, n), _row(None, x, None, at + ahead, 0)
            stream = _write_run(streamed, stream, _apply_vector, row, asked, n, of_piece, out, at)
    _close_stream(streamed, stream, out)
    release((buffer,))


@cached_njit(**FLAGS)
def apply_columns(threads, x, part, width, by, streamed, y):
    """Scale and shift each piece: x (A, L, F * C), m, s and t (3, A, C) -> y (A, L, F * C)."""
    n_outer, length, n_columns = x.shape
    n_parts = max(1, (length + part - 1) // part)
    n_blocks = (n_columns + width - 1) // width
    begin, end = share(threads, n_outer * n_parts * n_blocks)
    for task in range(begin, end):
        a = task // (n_parts * n_blocks)
        lo = (task // n_blocks - a * n_parts) * part
        hi = min(length, lo + part)
        c0 = (task % n_blocks) * width
        c1 = min(n_columns, c0 + width)
        rows = allocate(3, c1 - c0, y.dtype)
        buffer = allocate(None, _buffered(c1 - c0, streamed, y), y.dtype)
        _copy_coefficients(by, a, c0, c1, rows)
        _write_columns(
            streamed, buffer, _apply_vector, None, x, None, a, lo, hi, c0, c1, split(rows, 3), y
        )
        release((rows, buffer))


# ---------------------------------------------------------------------------------------------
# Backward: sums of dy and of dy * (x - mean) over each piece, then
# dx = a * dy + r * ((x - m) * b + c), with one a, r, b, c and m for each piece
# ---------------------------------------------------------------------------------------------


@njit(**LEAF)
def _enters(x, counts):
    """Tell which elements of vectors enter the sums of backward.

    A masked-out element is normalised too, so that its dy counts, unless there is nothing finite to
    normalise: what stands there must not turn the sums into NaN.
    """
    return counts | is_finite(x)


@njit(**LEAF)
def _gradient_terms(dys, xs, counts, i, n, center):
    """Return vectors of dy and x - center from i on, and 0 where they do not enter the sums.

    ``counts`` is the mask or None; see load about n.
    """
    dy, x = load(dys, i, n), load(xs, i, n)
    w, d = widen(dy), widen(x) - center
    if counts is not None:
        enters = _enters(x, load(counts, i, n))
        w, d = where(enters, w, splat(0.0)), where(enters, d, splat(0.0))
    return w, d


@cached_njit(**FLAGS)
def gradient_sums_rows(threads, dy, x, mask, part, block, pieces, sums):
    """Sum dy and dy (x - mean): dy, x, mask or None (P, L) -> (2, P, K, 1).

    The means are the first of ``pieces`` (3, P, 1).
    """
    _, n_pieces, n_parts, _ = sums.shape
    begin, end = share(threads, (n_pieces + block - 1) // block * n_parts)
    (mean,), (s0, s1) = split(pieces, 1), split(sums, 2)
    for task in range(begin, end):
        first, last, k, lo, n = _rows_of_task(task, n_parts, part, block, x.shape)
        for p in range(first, last):
            at = p * x.shape[1] + lo
            row = _row(dy, x, mask, at, n)
            _, s0[p, k, 0], s1[p, k, 0] = _sums(row, n, mean[p, 0])


@cached_njit(**FLAGS)
def gradient_sums_columns(threads, dy, x, mask, part, width, pieces, sums):
    """Sum dy and dy (x - mean): dy, x, mask or None (A, L, F * C) -> (2, A, K, C).

    The means are the first of ``pieces`` (3, A, C); see moments_columns about F.
    """
    _, n_outer, n_parts, n_columns = sums.shape
    length, n_folded = x.shape[1:]
    n_blocks = (n_folded + width - 1) // width
    begin, end = share(threads, n_outer * n_parts * n_blocks)
    (mean,), (s0, s1) = split(pieces, 1), split(sums, 2)
    for task in range(begin, end):
        a = task // (n_parts * n_blocks)
        k = task // n_blocks - a * n_parts
        c0 = (task % n_blocks) * width
        c1 = min(n_folded, c0 + width)
        own = allocate(3, c1 - c0, mean.dtype)
        _clear(own)
        sum_0, sum_1, means = _three_rows(own, c1 - c0)
        _copy_columns(stretch(mean, a * n_columns, n_columns), c0, c1, means)
        lo, hi = k * part, min(length, (k + 1) * part)
        _add_to_columns(dy, x, mask, None, a, lo, hi, c0, c1, means, sum_0, sum_1)
        _add_folds(sum_0, n_columns)
        _add_folds(sum_1, n_columns)
        for c in range(c0, min(c1, n_columns)):
            s0[a, k, c] = sum_0[c - c0]
            s1[a, k, c] = sum_1[c - c0]
        release((own,))


@njit(**CONTRACT)
def _input_gradient(dy, x, counts, a, r, m, b, c):
    """Return dx; only what counted in the statistics has a share in their gradient."""
    # r stays apart from b and c: at |x| = 1e30 their products would underflow in float32.
    direct = a * dy
    whole = direct + r * ((x - m) * b + c)
    if counts is None:
        return whole
    return where(counts, whole, direct)


@njit(**LEAF)
def _backward_vector(row, i, n, by, dxs, k):
    """Write the gradient of a vector of a row, see _terms, to dxs[k]; ``by`` is a, r, m, b, c."""
    (dys, xs, counts), (a, r, m, b, c) = row, by
    dx = _input_gradient(
        load(dys, i, n), load(xs, i, n), load(counts, i, n),
        load(a, i, n), load(r, i, n), load(m, i, n), load(b, i, n), load(c, i, n),
    )  # fmt: skip
    store(dx, dxs, k, n)


@cached_njit(**FLAGS)
def backward_rows(threads, dy, x, mask, part, block, by, streamed, dx):
    """Write dx: dy, x, mask or None (P, L), a, r, m, b, c (5, P, 1) -> dx (P, L).

    ``streamed`` is True or None.
    """
    n_parts = max(1, (x.shape[1] + part - 1) // part)
    begin, end = share(threads, (x.shape[0] + block - 1) // block * n_parts)
    (a, r, m, b, c), ahead = split(by, 5), AHEAD * line_size(x)
    buffer = allocate(None, _buffered(_at_once(dx), streamed, dx), dx.dtype)
    stream, out = _open_stream(buffer), stretch(dx, 0, dx.size)
    for task in range(begin, end):
        first, last, _, lo, n = _rows_of_task(task, n_parts, part, block, x.shape)
        for p in range(first, last):
            of_piece = a[p, 0], r[p, 0], m[p, 0], b[p, 0], c[p, 0]
            at = p * x.shape[1] + lo
            row, asked = _row(dy, x, mask, at, n), _row(dy, x, None, at + ahead, 0)
            stream = _write_run(
                streamed, stream, _backward_vector, row, asked, n, of_piece, out, at
            )
    _close_stream(streamed, stream, out)
    release((buffer,))


@cached_njit(**FLAGS)
def backward_columns(threads, dy, x, mask, part, width, by, streamed, dx):
    """Write dx: dy, x, mask or None (A, L, F * C), a, r, m, b, c (5, A, C) -> dx (A, L, F * C)."""
    n_outer, length, n_columns = x.shape
    n_parts = max(1, (length + part - 1) // part)
    n_blocks = (n_columns + width - 1) // width
    begin, end = share(threads, n_outer * n_parts * n_blocks)
    for task in range(begin, end):
        o = task // (n_parts * n_blocks)
        lo = (task // n_blocks - o * n_parts) * part
        hi = min(length, lo + part)
        c0 = (task % n_blocks) * width
        c1 = min(n_columns, c0 + width)
        rows = allocate(5, c1 - c0, dx.dtype)
        buffer = allocate(None, _buffered(c1 - c0, streamed, dx), dx.dtype)
        _copy_coefficients(by, o, c0, c1, rows)
        _write_columns(
            streamed, buffer, _backward_vector, dy, x, mask, o, lo, hi, c0, c1, split(rows, 5), dx
        )
        release((rows, buffer))


# ---------------------------------------------------------------------------------------------
# Elements and groups: a row is a group and fits in cache, so that its statistics and its output
# are one pass over memory together: y = x_hat * weight + bias, x_hat = (x - m) * rstd + t
# ---------------------------------------------------------------------------------------------

# Some groups are summed up while those before them are written: the one waits for memory, the other
# for results, and together they take little longer than the longer of both.


@njit(**LEAF)
def _beside(coming, n_coming, asked, center, sums, write, row, n, by, ys, offset, lo, hi):
    """Add elements lo to hi of a coming row to its sums, while those of another row are written.

    A row is dys (or None), xs and counts, of n elements, which may be 0; one is ``asked`` for.
    ``write`` is the function that writes a vector of it, from ``by``, to ys, where ``offset`` is
    added to its place.
    """
    whole, whole_coming = n // STEP * STEP, n_coming // STEP * STEP
    for i in range(lo, min(hi, max(whole, whole_coming)), STEP):
        _ask(asked, i)
        _ask(asked, i + LANES)
        if i < whole_coming:
            sums = _add_step(coming, i, center, sums)
        if i < whole:
            write(row, i, None, by, ys, i + offset)
            write(row, i + LANES, None, by, ys, i + LANES + offset)
    if lo <= whole < min(hi, n):
        if n - whole >= LANES:
            write(row, whole, None, by, ys, whole + offset)
        i = n // LANES * LANES
        if i < n:
            write(row, i, n - i, by, ys, i + offset)
    return sums


@njit(**LEAF)
def _beside_in_cache(
    streamed, stream, coming, n_coming, asked, center, write, row, n, by, y, place
):
    middle = splat(center)
    sums = _begin_sums(coming, n_coming, middle)
    n_most = max(n, n_coming)
    sums = _beside(
        coming, n_coming, asked, middle, sums, write, row, n, by, y, place, np.intp(0), n_most
    )
    return *_end_sums(coming[2], n_coming, sums), stream


@njit(**STREAM)
def _beside_in_stream(
    streamed, stream, coming, n_coming, asked, center, write, row, n, by, y, place
):
    buffer, kept, at = _follow(stream, y, place) if n > 0 else stream
    middle = splat(center)
    sums = _begin_sums(coming, n_coming, middle)
    n_at_once = _at_once(y)
    for lo in range(0, max(n, n_coming), n_at_once):
        hi = lo + n_at_once
        sums = _beside(
            coming, n_coming, asked, middle, sums, write, row, n, by, buffer, kept - lo, lo, hi
        )
        kept, at = _flush(buffer, kept + max(0, min(hi, n) - lo), y, at)
    return *_end_sums(coming[2], n_coming, sums), (buffer, kept, at)


@njit(**LEAF)
def _distance(streamed, n_lines, y):
    """Return how many elements ahead to ask for: so many lines, or NEAR of them."""
    near = streamed is None and y.size < NEAR_TO
    return np.intp((NEAR if near else n_lines) * line_size(y))


def _write_beside(streamed, stream, *args):
    """Return the sums of a coming row, while another one is written to y (N,) from place on.

    The sums are as from _end_sums; see _beside about the rows. ``stream`` is what is between them
    and memory unless ``streamed`` is None: a buffer, how many of its elements are kept, and where
    they belong. A kernel is compiled for either, as having both made it slower.
    """
    return (_beside_in_cache if streamed is None else _beside_in_stream)(streamed, stream, *args)


@overload(_write_beside, jit_options=LEAF)
def _compiled_write_beside(
    streamed, stream, coming, n_coming, asked, center, write, row, n, by, y, place
):
    function = _beside_in_cache if isinstance(streamed, types.NoneType) else _beside_in_stream

    def call(streamed, stream, coming, n_coming, asked, center, write, row, n, by, y, place):
        return function(
            streamed, stream, coming, n_coming, asked, center, write, row, n, by, y, place
        )

    return call


@njit(**LEAF)
def _rounded(mean, scale, offset, like):
    """Return m, s and t, see _scale_shift, in the type of an array."""
    m = like.dtype.type(mean)
    return m, like.dtype.type(scale), like.dtype.type((np.float64(m) - mean) * scale + offset)


@njit(**LEAF)
def _write_rstds(count, var, eps, rstd):
    """Write 1 / sqrt(var + eps), or 0 for an empty group or where var + eps is 0, to rstd."""
    for i in range(len(count)):
        rstd[i] = count[i]
    _invert_roots(var, eps, rstd)


@njit(**LEAF)
def _write_statistics(g, n, mu, m2, center, count, mean, var):
    """Write those of group g; if not ``center``, var is the mean square, and the mean is 0."""
    v = m2 / max(n, 1)
    count[g] = n
    mean[g] = mu if center else 0.0
    var[g] = v if center else v + mu * mu


@njit(**LEAF)
def _normalize_vector(row, i, n, by, ys, k):
    """Normalise a vector of a row, see _terms, by weight, bias, m, rstd, t; write it to ys[k]."""
    x, (weight, bias, m, rstd, t) = load(row[1], i, n), by
    x_hat = _scale_shift(x, load(m, i, n), load(rstd, i, n), load(t, i, n))
    store(x_hat * load(weight, i, n) + load(bias, i, n), ys, k, n)


@njit(**LEAF)
def _repeated(parameters, n_rows, length):
    """Return how many elements the weights of some rows have, if those are to be repeated, or 0."""
    return n_rows * length if parameters.shape[2] < length else 0


@njit(**LEAF)
def _of_elements(values, k, n_rows, length, found):
    """Return one of ``values`` (G, D / span) for each element of rows from k on, (n_rows * D,).

    Unless span is 1 they are written to ``found``: there they are near, and begin where a line
    does, as they are read for each sample.
    """
    n = values.shape[1]
    own = stretch(values, k * n, n_rows * n)
    if n < length:
        _spread(own, length // n, found)
        own = stretch(found, 0, n_rows * length)
    # Alone it could not be returned, as nobody counts references to it.
    return (own,)


@cached_njit(**FLAGS)
def forward_elements(
    threads, x, mask, parameters, eps, center, live, run, block, beside, streamed, statistics, y
):
    """Normalise rows: x, mask or None, y (M, D), weight and bias (2, G, D / span).

    Rows i and i + G have the same weights, each for ``span`` elements next to each other.
    ``statistics`` (3, M), count, mean and variance of each row, are taken and written if ``live``,
    else read.
    ``block`` rows are handled at once, and those that come next ``beside`` them or after them:
    those with the same weights, of the next sample, or in the order of memory where ``run`` is G or
    y is ``streamed``, which is True or None.
    """
    (n_rows, length), n_weights = x.shape, parameters.shape[1]
    n_units = (n_rows + block - 1) // block
    unit, end = share(threads, n_units)
    (weight, bias), (count, mean, var) = split(parameters, 2), split(statistics, 3)
    # Past the caches each run of rows that is not in the order of memory would end in parts of
    # lines.
    in_order = run == n_weights or streamed is not None
    step, n_alike, n_own = block, n_units, n_weights
    if not in_order:
        step, n_alike, n_own = n_weights, n_rows // n_weights, block
    ahead = _distance(streamed, AHEAD, y) if in_order else step * length
    of_elements = allocate(2, _repeated(parameters, n_own, length), y.dtype)
    own_weight, own_bias = split(of_elements, 2)
    weights, biases = own_weight, own_bias
    rstd = allocate(None, block, mean.dtype)
    buffer = allocate(None, _buffered(_at_once(y), streamed, y), y.dtype)
    stream, out = _open_stream(buffer), stretch(y, 0, y.size)
    beside = beside and live
    n_written, first_written, k_written, k_own = 0, 0, 0, -1
    while unit < end or n_written > 0:
        # The first of the weights that are at hand for a unit, and its first row.
        k = unit // n_alike * block
        first = unit % n_alike * step + k
        n_summed = min(block, n_rows - first) if unit < end and (beside or n_written == 0) else 0
        if n_written > 0 and k_own != k_written:
            k_own = k_written
            (weights,) = _of_elements(weight, k_own, n_own, length, own_weight)
            (biases,) = _of_elements(bias, k_own, n_own, length, own_bias)
        o = (first_written % n_weights - k_own) * length
        for j in range(max(n_summed, n_written)):
            g, i = first + j, first_written + j
            n = length if live and j < n_summed else 0
            n_here = length if j < n_written else 0
            # Where nothing is summed up, what comes next is asked for all the same.
            at = g * length
            coming, asked = _row(None, x, mask, at, n), _row(None, x, mask, at + ahead, 0)
            here = _row(None, x, None, i * length, n_here)
            mu, scale = (mean[i], rstd[j]) if n_here > 0 else (0.0, 0.0)
            of_row = stretch(weights, o, length), stretch(biases, o, length)
            by = *of_row, *_rounded(mu, scale, 0.0, y)
            o = o + length if o + length < n_own * length else 0
            shift = _first(coming[1], coming[2])
            n, s1, s2, stream = _write_beside(
                streamed, stream, coming, n, asked, shift, _normalize_vector, here, n_here, by, out,
                i * length,
            )  # fmt: skip
            if live and j < n_summed:
                mu, _, m2 = _unshift(n, shift, s1, s2)
                _write_statistics(g, n, mu, m2, center, count, mean, var)
        last = first + n_summed
        _write_rstds(count[first:last], var[first:last], eps, rstd)
        if n_summed > 0:
            unit += 1
        n_written, first_written, k_written = n_summed, first, k
    _close_stream(streamed, stream, out)
    release((of_elements, rstd, buffer))


@njit(**LEAF)
def _block(unit, n_columns, width):
    """Return the outer index and the columns of a unit of work."""
    n_blocks = (n_columns + width - 1) // width
    a = unit // n_blocks
    c0 = (unit - a * n_blocks) * width
    return a, c0, min(c0 + width, n_columns)


@njit(**LEAF)
def _next_groups(first, end, shape, block):
    """Return how many groups come next, where their rows start, and how these follow.

    Row j of run i is row ``start + i * step + j``, for ``n_runs`` runs of ``n_in_run`` rows. A run
    has the rows of one group where B is 1, else a row of each group.
    """
    n_rows, n_inner = shape[1:3]
    if n_inner == 1:
        n_here = min(block, end - first)
        return n_here, first * n_rows, n_rows, n_here, n_rows
    a, b = first // n_inner, first % n_inner
    n_here = min(block, end - first, n_inner - b)
    return n_here, a * n_rows * n_inner + b, n_inner, n_rows, n_here


# Rows of a group that are shorter are summed up as one.
LONG_ROW = 1 << 8


@njit(**LEAF)
def _row_of_block(block, i, j, length):
    """Return the number of row j of run i of a block, see _next_groups, and its length or 0."""
    _, start, step, n_runs, n_in_run = block
    return start + i * step + j, length if i < n_runs and j < n_in_run else 0


@cached_njit(**FLAGS)
def forward_groups(
    threads, x, mask, feature, parameters, eps, center, live, block, beside, streamed,
    statistics, y,
):  # fmt: skip
    """Normalise groups of R rows: x, mask or None, y (A, R, B, L), weight and bias (2, F).

    ``feature`` (A * R * B,) says which weight a row has; ``statistics`` (3, A * B) are taken and
    written if ``live``, else read. Up to ``block`` groups are handled at once, and those that come
    next ``beside`` them or after them. ``streamed`` is True or None.
    """
    n_rows, n_inner, length = x.shape[1:]
    first, end = share(threads, x.shape[0] * n_inner)
    (weight, bias), (count, mean, var) = split(parameters, 2), split(statistics, 3)
    apart = n_inner > 1
    own = allocate(5, block, mean.dtype)
    buffer = allocate(None, _buffered(_at_once(y), streamed, y), y.dtype)
    rstd, shift, n, s1, s2 = split(own, 5)
    stream, out = _open_stream(buffer), stretch(y, 0, y.size)
    # Twice as far as elsewhere: one array is read, and no weights of elements are to be held.
    beside, ahead = beside and live, _distance(streamed, 2 * AHEAD, y)
    # A thread's groups are next to each other: the longer a run is, the faster it is read.
    nothing = 0, 0, 0, 0, 0
    written, first_written = nothing, first
    while first < end or written[0] > 0:
        summed = nothing
        if first < end and (beside or written[0] == 0):
            summed = _next_groups(first, end, x.shape, block)
        for g in range(summed[0]):
            n[g], s1[g], s2[g] = 0.0, 0.0, 0.0
        for i in range(max(summed[3], written[3])):
            for j in range(max(summed[4], written[4])):
                g = j if apart else i
                q, n_here = _row_of_block(written, i, j, length)
                p, n_coming = _row_of_block(summed, i, j, length)
                if not live:
                    n_coming = 0
                elif length < LONG_ROW and not apart:
                    n_coming = n_coming * n_rows if j == 0 else 0
                # Where nothing is summed up, what comes next is asked for all the same.
                at = (p if summed[0] > 0 else q + (0 if apart else written[0] * n_rows)) * length
                coming = _row(None, x, mask, at, n_coming)
                asked = _row(None, x, mask, at + ahead, 0)
                around = shift[g]
                if n_coming > 0 and n[g] == 0:
                    around = _first(coming[1], coming[2])
                    shift[g] = around
                here = _row(None, x, None, q * length, n_here)
                mu, scale, offset = 0.0, 0.0, 0.0
                if n_here > 0:
                    mu, scale = mean[first_written + g], rstd[g] * weight[feature[q]]
                    offset = bias[feature[q]]
                by = _rounded(mu, scale, offset, y)
                n_row, sum_1, sum_2, stream = _write_beside(
                    streamed, stream, coming, n_coming, asked, around, _apply_vector, here, n_here,
                    by, out, q * length,
                )  # fmt: skip
                if n_coming > 0:
                    n[g] += n_row
                    s1[g] += sum_1
                    s2[g] += sum_2
        last = first + summed[0]
        if live:
            _unshift_all(stretch(n, 0, summed[0]), shift, s1, s2)
            for g in range(summed[0]):
                _write_statistics(first + g, n[g], shift[g], s2[g], center, count, mean, var)
        _write_rstds(count[first:last], var[first:last], eps, rstd)
        written, first_written, first = summed, first, last
    _close_stream(streamed, stream, out)
    release((own, buffer))


@njit(**LEAF)
def _group_coefficients(count, mean, rstd, g0, g1, center, r, m, b, c):
    """Write r, m, b, c, see _input_gradient, of n groups, to the first n elements of each.

    Their sums of dy * weight are g0, and g1 those of dy * weight * (x - mean).
    """
    for g in range(0, len(count), LANES):
        here = min(LANES, len(count) - g)
        n, mu, scale = (
            _not_below_one(load(count, g, here)),
            load(mean, g, here),
            load(rstd, g, here),
        )
        # The slope is -rstd**3 * g1 / n, and r is rstd.
        slope, rounded = splat(-1.0) * (scale * load(g1, g, here)) * scale / n, narrow(mu, m)
        offset = slope * (widen(rounded) - mu)
        if center:
            offset = offset - load(g0, g, here) / n
        store(narrow(scale, r), r, g, here)
        store(rounded, m, g, here)
        store(narrow(slope, b), b, g, here)
        store(narrow(offset, c), c, g, here)


@njit(**LEAF)
def _scale_vector(row, i, n, by, dxs, k):
    """Write a * dy of a vector of a row, see _terms, to dxs[k]; a is the first of ``by``."""
    store(load(by[0], i, n) * load(row[0], i, n), dxs, k, n)


@cached_njit(**FLAGS)
def backward_groups(
    threads, dy, x, mask, feature, parameters, eps, center, live, block, beside, streamed,
    statistics, dx, sums,
):  # fmt: skip
    """Write dx of groups of R rows, and each row's sums of dy and dy * x_hat, (2, A * R * B).

    The other arguments are as in forward_groups.
    """
    n_rows, n_inner, length = x.shape[1:]
    first, end = share(threads, x.shape[0] * n_inner)
    (weight,), (count, mean, var), (s0, s1) = (
        split(parameters, 1), split(statistics, 3), split(sums, 2)
    )  # fmt: skip
    apart = n_inner > 1
    own, rows = allocate(3, block, mean.dtype), allocate(4, block, dx.dtype)
    (rstd, g0, g1), (r, m, b, c) = split(own, 3), split(rows, 4)
    buffer = allocate(None, _buffered(_at_once(dx), streamed, dx), dx.dtype)
    stream, out = _open_stream(buffer), stretch(dx, 0, dx.size)
    beside, ahead = beside and live, _distance(streamed, AHEAD, dx)
    nothing = 0, 0, 0, 0, 0
    written = nothing
    while first < end or written[0] > 0:
        summed = nothing
        if first < end and (beside or written[0] == 0):
            summed = _next_groups(first, end, x.shape, block)
        for g in range(summed[0]):
            g0[g], g1[g] = 0.0, 0.0
        for i in range(max(summed[3], written[3])):
            for j in range(max(summed[4], written[4])):
                g = j if apart else i
                q, n_here = _row_of_block(written, i, j, length)
                p, n_coming = _row_of_block(summed, i, j, length)
                at = (p if summed[0] > 0 else q + (0 if apart else written[0] * n_rows)) * length
                coming = _row(dy, x, mask, at, n_coming)
                asked = _row(dy, x, mask, at + ahead, 0)
                place, scale = q * length, 0.0
                if n_here > 0:
                    s1[q] *= rstd[g]
                    scale = rstd[g] * weight[feature[q]]
                by = dx.dtype.type(scale), r[g], m[g], b[g], c[g]
                here = _row(dy, x, mask, place, n_here)
                if not live:
                    stream = _write_run(
                        streamed, stream, _scale_vector, here, asked, n_here, by, out, place
                    )
                    n_here = 0
                around = mean[first + g] if n_coming > 0 else 0.0
                _, sum_1, sum_x, stream = _write_beside(
                    streamed, stream, coming, n_coming, asked, around, _backward_vector, here,
                    n_here, by, out, place,
                )  # fmt: skip
                if n_coming > 0:
                    s0[p] = sum_1
                    s1[p] = sum_x
                    g0[g] += weight[feature[p]] * sum_1
                    g1[g] += weight[feature[p]] * sum_x
        last = first + summed[0]
        _write_rstds(count[first:last], var[first:last], eps, rstd)
        _group_coefficients(count[first:last], mean[first:last], rstd, g0, g1, center, r, m, b, c)
        written, first = summed, last
    _close_stream(streamed, stream, out)
    release((own, rows, buffer))


# Group columns: the same where a row has columns of many groups.


@njit(**LEAF)
def _shifts_of_groups(x, mask, a, c0, c1, n_columns, size, shift):
    """Write an element of its group that counts, or 0, for columns c0 to c1 of x[a], to shift."""
    if mask is None:
        for c in range(0, c1 - c0, size):
            shift[c] = x[a, 0, c0 + c]
    else:
        found = allocate(None, c1 - c0, np.bool_)
        _first_of_columns(x[a, :, c0:c1], mask[a, :, c0:c1], shift, found)
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


@njit(**LEAF)
def _take(values, feature, row):
    """Write the values of features (n,) to a row."""
    for i in range(feature.shape[0]):
        row[i] = values[feature[i]]


@cached_njit(**FLAGS)
def forward_group_columns(
    threads, x, mask, feature, parameters, eps, center, live, width, span, streamed,
    statistics, y,
):  # fmt: skip
    """Normalise groups of columns: x, mask or None, y (A, L, F * C), weight and bias (2, F).

    A row holds each column F times, as in moments_columns. ``span`` columns next to each other
    share a weight, and ``feature`` (A * C / span,) says which; some more are one of the groups,
    whose ``statistics`` (3, G) are taken and written if ``live``, else read. A task has ``width``
    columns.
    """
    n_outer, length, n_folded = x.shape
    n_spans, n_groups = len(feature) // n_outer, statistics.shape[1] // n_outer
    n_columns = n_spans * span
    size = n_columns // n_groups
    begin, end = share(threads, n_outer * ((n_folded + width - 1) // width))
    (weight, bias), (count, mean, var) = split(parameters, 2), split(statistics, 3)
    for task in range(begin, end):
        a, c0, c1 = _block(task, n_folded, width)
        n_own = min(c1, n_columns) - c0
        n_here, first = n_own // size, a * n_groups + c0 // size
        if live:
            own = allocate(4, c1 - c0, mean.dtype)
            _clear(own)
            s1, s2, shift = _three_rows(own, c1 - c0)
            n = stretch(own, 3 * own.shape[1], c1 - c0)
            _shifts_of_groups(x, mask, a, c0, c1, n_columns, size, shift)
            _add_rows(x, mask, a, 0, length, c0, c1, shift, n, s1, s2)
            for values in (n, s1, s2):
                _add_folds(values, n_columns)
                _add_up(stretch(values, 0, n_own), stretch(values, 0, n_here))
            for g in range(n_here):
                shift[g] = shift[g * size]
            _unshift_all(stretch(n, 0, n_here), shift, s1, s2)
            for g in range(n_here):
                _write_statistics(first + g, n[g], shift[g], s2[g], center, count, mean, var)
            release((own,))
        n_own_spans = n_own // span
        own, of_spans = allocate(5, n_own_spans, mean.dtype), allocate(3, n_own_spans, y.dtype)
        rows = allocate(3, c1 - c0, y.dtype)
        buffer = allocate(None, _buffered(c1 - c0, streamed, y), y.dtype)
        rstd, means, rstds, weights, biases = split(own, 5)
        _write_rstds(stretch(count, first, n_here), stretch(var, first, n_here), eps, rstd)
        _spread(stretch(mean, first, n_here), size // span, means)
        _spread(stretch(rstd, 0, n_here), size // span, rstds)
        own_features = stretch(feature, a * n_spans + c0 // span, n_own_spans)
        _take(weight, own_features, weights)
        _take(bias, own_features, biases)
        m, s, t = split(of_spans, 3)
        for i in range(0, n_own_spans, LANES):
            here = min(LANES, n_own_spans - i)
            _store_scale_shift(
                load(means, i, here), load(rstds, i, here), load(weights, i, here),
                load(biases, i, here), m, s, t, i, here,
            )  # fmt: skip
        for k in range(3):
            row = stretch(rows, k * rows.shape[1], c1 - c0)
            _spread(stretch(of_spans, k * of_spans.shape[1], n_own_spans), span, row)
            _repeat_columns(row, n_columns)
        _write_columns(
            streamed, buffer, _apply_vector, None, x, None, a, 0, length, c0, c1, split(rows, 3), y
        )
        release((own, of_spans, rows, buffer))


@cached_njit(**FLAGS)
def backward_group_columns(
    threads, dy, x, mask, feature, parameters, eps, center, live, width, span, streamed,
    statistics, dx, sums,
):  # fmt: skip
    """Write dx of groups of columns, and the sums of dy and dy * x_hat over each span.

    ``sums`` (2, A * C / span) are written; the other arguments are as in forward_group_columns.
    """
    n_outer, length, n_folded = x.shape
    n_spans, n_groups = len(feature) // n_outer, statistics.shape[1] // n_outer
    n_columns = n_spans * span
    size = n_columns // n_groups
    begin, end = share(threads, n_outer * ((n_folded + width - 1) // width))
    (weight,), (count, mean, var), (s0, s1) = (
        split(parameters, 1), split(statistics, 3), split(sums, 2)
    )  # fmt: skip
    for task in range(begin, end):
        a, c0, c1 = _block(task, n_folded, width)
        n_own = min(c1, n_columns) - c0
        n_here, first = n_own // size, a * n_groups + c0 // size
        p, n_own_spans = a * n_spans + c0 // span, n_own // span
        own, small = allocate(3, c1 - c0, mean.dtype), allocate(4, n_own_spans, mean.dtype)
        rows, of_groups = allocate(5, c1 - c0, dx.dtype), allocate(5, n_own_spans, dx.dtype)
        buffer = allocate(None, _buffered(c1 - c0, streamed, dx), dx.dtype)
        _clear(own)
        sum_0, sum_1, means = _three_rows(own, c1 - c0)
        rstd, g0, g1, weights = split(small, 4)
        _write_rstds(stretch(count, first, n_here), stretch(var, first, n_here), eps, rstd)
        _spread(stretch(mean, first, n_here), size, means)
        _repeat_columns(means, n_columns)
        _add_to_columns(dy, x, mask, None, a, 0, length, c0, c1, means, sum_0, sum_1)
        _take(weight, stretch(feature, p, n_own_spans), weights)
        for of_columns, of_all_spans, of_group in ((sum_0, s0, g0), (sum_1, s1, g1)):
            of_spans = stretch(of_all_spans, p, n_own_spans)
            _add_folds(of_columns, n_columns)
            _add_up(stretch(of_columns, 0, n_own), of_spans)
            for i in range(n_own_spans):
                of_columns[i] = weights[i] * of_spans[i]
            _add_up(stretch(of_columns, 0, n_own_spans), stretch(of_group, 0, n_here))
        scales, r, m, b, c = split(of_groups, 5)
        _group_coefficients(
            stretch(count, first, n_here), stretch(mean, first, n_here), rstd, g0, g1, center,
            r, m, b, c,
        )  # fmt: skip
        rstds = sum_0
        _spread(stretch(rstd, 0, n_here), size // span, rstds)
        for i in range(n_own_spans):
            s1[p + i] *= rstds[i]
            scales[i] = rstds[i] * weights[i]
        for k in range(5):
            row = stretch(rows, k * rows.shape[1], c1 - c0)
            n, alike = (n_own_spans, span) if k == 0 else (n_here, size)
            _spread(stretch(of_groups, k * of_groups.shape[1], n), alike, row)
            _repeat_columns(row, n_columns)
        if live:
            _write_columns(
                streamed, buffer, _backward_vector, dy, x, mask, a, 0, length, c0, c1,
                split(rows, 5), dx,
            )  # fmt: skip
        else:
            _write_columns(
                streamed, buffer, _scale_vector, dy, x, None, a, 0, length, c0, c1,
                split(rows, 1), dx,
            )  # fmt: skip
        release((own, small, rows, of_groups, buffer))


@cached_njit(**FLAGS)
def feature_gradients(feature, sums, dparameters):
    """Add sums of dy and dy * x_hat (2, P) to dweight and dbias of their features (2, F)."""
    (s0, s1), (dweight, dbias) = split(sums, 2), split(dparameters, 2)
    for p in range(len(feature)):
        dbias[feature[p]] += s0[p]
        dweight[feature[p]] += s1[p]


# Element columns: the same where a group is a column of x (A, D, B), and row i has weight i.


@njit(**CONTRACT)
def _column_coefficients(mean, rstd, m, r, t):
    """Write what _rounded returns for each of n columns to m, r, t (n,)."""
    for c in range(mean.shape[0]):
        m[c] = mean[c]
        r[c] = rstd[c]
        t[c] = (np.float64(m[c]) - mean[c]) * rstd[c]


# A block of columns is summed up while the one before it is written past the caches: some vectors
# of ROWS rows of the one, beside each row of the other.


@njit(**LEAF)
def _begin_columns(values, place, n_rows, center, s0, s1):
    """Write values from ``place`` on, unless there are no rows, to center (n,), and 0 to sums."""
    for c in range(center.shape[0]):
        center[c] = values[place + c] if n_rows > 0 else 0.0
        s0[c], s1[c] = 0.0, 0.0


@njit(**LEAF)
def _write_row(buffer, n, y, at, ahead):
    """Write a row (n,) to y (N,) from ``at`` on, past the caches but for parts of lines.

    A store to one waits for the line, and so does what is stored after it: those of a row that
    comes so far ahead are asked for.
    """
    if to_next_line(y, at) > 0:
        fetch(y, at + ahead)
    kept, end = _flush(buffer, n, y, at)
    if kept > 0:
        fetch(y, end + ahead)
    _finish(buffer, kept, y, end)


@njit(**LEAF)
def _block_of_lines(unit, early, n_columns, width):
    """Return the outer index and the columns of a unit of work, where ``early`` a line begins."""
    n_blocks = max((n_columns - early + width - 1) // width, 1)
    a = unit // n_blocks
    c0 = (unit - a * n_blocks) * width
    return a, c0 + (early if c0 > 0 else 0), min(c0 + early + width, n_columns)


@njit(**LEAF)
def _vectors_beside(i, length, n):
    """Return which vectors of n columns are summed up beside row i, from ... to.

    They are those of ROWS rows, of which a share is added beside each of as many rows.
    """
    q, n_vectors = i % ROWS, n // LANES
    if i - q + ROWS > length:
        return 0, 0
    return q * n_vectors // ROWS, (q + 1) * n_vectors // ROWS


@njit(**LEAF)
def _add_rest(dy, x, weight, a, c0, c1, center, s0, s1):
    """Add what is not summed up beside rows: columns and rows that are too few for it."""
    length, n = x.shape[1], c1 - c0
    whole, whole_rows = n // LANES * LANES, length // ROWS * ROWS
    for lo, hi, c in ((0, whole_rows, whole), (whole_rows, length, 0)):
        rest = n - c
        _add_to_columns(
            dy, x, None, weight, a, lo, hi, c0 + c, c1,
            stretch(center, c, rest), stretch(s0, c, rest), stretch(s1, c, rest),
        )  # fmt: skip


@njit(**LEAF)
def _columns_beside(
    dys, xs, weight, i, step, coming, first, last, center, s0, s1, write, totals, row, n, by, ys
):
    """Add vectors of ROWS rows from ``coming`` on to their sums, while a row (n,) is written.

    ``write`` is the function that writes a vector of the row, and adds to ``totals``, which are
    returned.
    """
    n_steps = n // (ROWS * LANES)
    for k in range(max(last - first, n_steps)):
        if first + k < last:
            c = (first + k) * LANES
            at = coming + c
            _add_to_vector(
                dys, xs, None, weight, i, ROWS, at, step, at + ROWS * step, step, c, None,
                center, s0, s1,
            )  # fmt: skip
        if k < n_steps:
            for j in range(k * ROWS * LANES, (k + 1) * ROWS * LANES, LANES):
                totals = write(totals, row, j, None, by, ys)
    for j in range(n_steps * ROWS * LANES, n, LANES):
        totals = write(totals, row, j, min(LANES, n - j), by, ys)
    return totals


@njit(**LEAF)
def _normalize_column_vector(totals, row, i, n, by, ys):
    """Write a vector as _normalize_vector does, with nothing to add up."""
    _normalize_vector(row, i, n, by, ys, i)
    return totals


@cached_njit(**FLAGS)
def forward_element_columns(
    threads, x, parameters, eps, center, live, width, streamed, statistics, y
):
    """Normalise columns: x, y (A, D, B), weight and bias (2, D).

    ``statistics`` (3, A * B) are taken and written if ``live``, else read. If ``streamed``, which
    is True or None, a block of columns is summed up while the one before it is written.
    """
    n_outer, length, n_columns = x.shape
    # A store to a part of a line waits for the line, and what is stored later waits, too: blocks
    # end where lines do. A column's sums do not depend on its block.
    early = np.intp(0) if streamed is None else to_next_line(y, 0)
    n_blocks = max((n_columns - early + width - 1) // width, 1)
    begin, end = share(threads, n_outer * n_blocks)
    (weight, bias), (count, mean, var) = split(parameters, 2), split(statistics, 3)
    most = width + LANES
    sums, rstd = allocate(3, most, mean.dtype), allocate(None, most, mean.dtype)
    rows = allocate(3, most, y.dtype)
    buffer = allocate(None, _buffered(most, streamed, y), y.dtype)
    xs, ys, is_summed = stretch(x, 0, x.size), stretch(y, 0, y.size), False
    for unit in range(begin, end):
        a, c0, c1 = _block_of_lines(unit, early, n_columns, width)
        n, first, place = c1 - c0, a * n_columns + c0, a * length * n_columns + c0
        s1, s2, shift = _three_rows(sums, n)
        groups = stretch(count, first, n), stretch(mean, first, n), stretch(var, first, n)
        if live:
            if not is_summed:
                _begin_columns(xs, place, length, shift, s1, s2)
                _add_to_columns(None, x, None, None, a, 0, length, c0, c1, shift, s1, s2)
            for c in range(n):
                mu, _, m2 = _unshift(length, shift[c], s1[c], s2[c])
                _write_statistics(c, length, mu, m2, center, *groups)
        _write_rstds(groups[0], groups[2], eps, rstd)
        m, r, t = _three_rows(rows, n)
        _column_coefficients(groups[1], rstd, m, r, t)
        is_summed = streamed is not None and live and unit + 1 < end
        if is_summed:
            a, c0, c1 = _block_of_lines(unit + 1, early, n_columns, width)
        n_coming, coming = c1 - c0 if is_summed else 0, a * length * n_columns + c0
        s1, s2, shift = _three_rows(sums, n_coming)
        _begin_columns(xs, coming, length, shift, s1, s2)
        for i in range(length):
            by, row = (weight[i], bias[i], m, r, t), _row(None, x, None, place, n)
            if streamed is None:
                # The block is in a cache since its sums were taken.
                nothing_asked, start = (None, None, None), np.intp(0)
                _write_vectors(_normalize_vector, row, nothing_asked, start, n, by, ys, place)
            else:
                lo, hi = _vectors_beside(i, length, n_coming)
                from_row = i // ROWS * ROWS
                _columns_beside(
                    None, xs, None, 0, n_columns, coming + from_row * n_columns, lo, hi, shift,
                    s1, s2, _normalize_column_vector, None, row, n, by, buffer,
                )  # fmt: skip
                _write_row(buffer, n, ys, place, ROWS * n_columns)
            place += n_columns
        if is_summed:
            _add_rest(None, x, None, a, c0, c1, shift, s1, s2)
    if streamed is not None:
        fence()
    release((sums, rstd, rows, buffer))


@njit(**LEAF)
def _backward_column_vector(totals, row, i, n, by, dxs):
    """Write dx of a vector to dxs[i]; add to vectors of the sums of dy * x_hat and of dy.

    They are added up in the type of the elements, see _add_four_rows.
    If not ``live``, which is the last of a row, the statistics do not come from x.
    """
    (dys, xs, live), (weight, m, r, t, c0, c1) = row, by
    dy, x = load(dys, i, n), load(xs, i, n)
    m, r, t = load(m, i, n), load(r, i, n), load(t, i, n)
    c0, c1 = load(c0, i, n), load(c1, i, n)
    dx = _element_gradient(dy, x, leading(live * LANES), splat(weight), m, r, t, c0, c1)
    store(dx, dxs, i, n)
    return totals[0] + dy * _scale_shift(x, m, r, t), totals[1] + dy


@njit(**LEAF)
def _backward_column_row(totals, row, n, by, dxs):
    """Write the gradient of a row of n elements; add to totals as _backward_column_vector does."""
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        totals = _backward_column_vector(totals, row, i, None, by, dxs)
    if whole < n:
        totals = _backward_column_vector(totals, row, whole, n - whole, by, dxs)
    return totals


@cached_njit(**FLAGS)
def backward_element_columns(
    threads, dy, x, parameters, eps, center, live, affine, width, streamed,
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
    task, last_task = share(threads, n_tasks)
    begin, end = task * n_units // n_tasks, last_task * n_units // n_tasks
    (weight,), (dweight, dbias) = split(parameters, 1), split(dparameters, 2)
    count, mean, var = split(statistics, 3)
    sums, rstd = allocate(3, width, mean.dtype), allocate(None, width, mean.dtype)
    rows = allocate(5, width, dx.dtype)
    buffer = allocate(None, _buffered(width, streamed, dx), dx.dtype)
    m, r, t, g0, g1 = split(rows, 5)
    dys, xs, dxs = stretch(dy, 0, dy.size), stretch(x, 0, x.size), stretch(dx, 0, dx.size)
    is_summed, zero = False, dx.dtype.type(0.0)
    for unit in range(begin, end):
        while (task + 1) * n_units // n_tasks <= unit:
            task += 1
        a, c0, c1 = _block(unit, n_columns, width)
        n, first, place = c1 - c0, a * n_columns + c0, a * length * n_columns + c0
        s0, s1, means = _three_rows(sums, n)
        if not is_summed:
            _begin_columns(mean, first, length, means, s0, s1)
            _add_to_columns(dy, x, None, weight, a, 0, length, c0, c1, means, s0, s1)
        _write_rstds(stretch(count, first, n), stretch(var, first, n), eps, rstd)
        _column_coefficients(means, rstd, m, r, t)
        for c in range(n):
            n_all = max(count[first + c], 1.0)
            g0[c] = s0[c] / n_all if center else 0.0
            g1[c] = s1[c] * rstd[c] / n_all
        is_summed = streamed is not None and unit + 1 < end
        if is_summed:
            a, c0, c1 = _block(unit + 1, n_columns, width)
        n_coming, coming = c1 - c0 if is_summed else 0, a * length * n_columns + c0
        s0, s1, means = _three_rows(sums, n_coming)
        _begin_columns(mean, a * n_columns + c0, length, means, s0, s1)
        for i in range(length):
            row = stretch(dy, place, n), stretch(x, place, n), live
            by, totals = (weight[i], m, r, t, g0, g1), (splat(zero), splat(zero))
            if streamed is None:
                totals = _backward_column_row(totals, row, n, by, stretch(dx, place, n))
            else:
                lo, hi = _vectors_beside(i, length, n_coming)
                from_row = i // ROWS * ROWS
                totals = _columns_beside(
                    dys, xs, weight, from_row, n_columns, coming + from_row * n_columns, lo, hi,
                    means, s0, s1, _backward_column_vector, totals, row, n, by, buffer,
                )  # fmt: skip
                _write_row(buffer, n, dxs, place, ROWS * n_columns)
            if affine:
                dweight[task, i] += total(totals[0])
                dbias[task, i] += total(totals[1])
            place += n_columns
        if is_summed:
            _add_rest(dy, x, weight, a, c0, c1, means, s0, s1)
    if streamed is not None:
        fence()
    release((sums, rstd, rows, buffer))


@njit(**LEAF)
def _element_terms(dys, xs, counts, i, n, row):
    """Return vectors of dy and dy * x_hat from i on, and 0 where they do not enter the sums.

    ``row`` (3,) is what _rounded returns; see _gradient_terms about the others.
    """
    dy, x = load(dys, i, n), load(xs, i, n)
    m, r, t = splat(row[0]), splat(row[1]), splat(row[2])
    x_hat = _scale_shift(x, m, r, t)
    product = dy * x_hat
    if counts is not None:
        zero = splat(dys.dtype.type(0.0))
        # x_hat may overflow where x is finite. Where what counts is NaN, that has to show.
        enters = _enters(where(is_finite(r), x_hat, x), load(counts, i, n))
        dy, product = where(enters, dy, zero), where(enters, product, zero)
    return dy, product


@njit(**LEAF)
def _add_four_vectors(dys, xs, counts, i, n, rows, weight, dweight, dbias, ahead):
    """Add dy * x_hat and dy of four rows to dweight and dbias, from i on; see load about n.

    Return vectors of g = dy * weight, and of g * x_hat, of each row. Ask for what is so far ahead
    of dys.
    """
    fetch(dys[0], i + ahead)
    fetch(dys[1], i + ahead)
    fetch(dys[2], i + ahead)
    fetch(dys[3], i + ahead)
    a, a_hat = _element_terms(dys[0], xs[0], counts[0], i, n, rows[0])
    b, b_hat = _element_terms(dys[1], xs[1], counts[1], i, n, rows[1])
    c, c_hat = _element_terms(dys[2], xs[2], counts[2], i, n, rows[2])
    d, d_hat = _element_terms(dys[3], xs[3], counts[3], i, n, rows[3])
    store(load(dweight, i, n) + widen((a_hat + b_hat) + (c_hat + d_hat)), dweight, i, n)
    store(load(dbias, i, n) + widen((a + b) + (c + d)), dbias, i, n)
    w = load(weight, i, n)
    return (a * w, b * w, c * w, d * w), (a_hat * w, b_hat * w, c_hat * w, d_hat * w)


@njit(**LEAF)
def _four(array, nothing, first, step, n_rows, n):
    """Return n elements of up to four rows, ``step`` apart, and of nothing where there is none."""
    return (
        stretch(array, first, n),
        stretch(array, first + step, n) if n_rows > 1 else stretch(nothing, 0, n),
        stretch(array, first + 2 * step, n) if n_rows > 2 else stretch(nothing, 0, n),
        stretch(array, first + 3 * step, n) if n_rows > 3 else stretch(nothing, 0, n),
    )


@njit(**LEAF)
def _plus(v, w):
    return v[0] + w[0], v[1] + w[1], v[2] + w[2], v[3] + w[3]


@njit(**LEAF)
def _add_four_rows(dys, xs, counts, rows, weight, sums, dweight, dbias, ahead):
    """Add what backward sums up over few elements (n,) of four rows.

    ``sums`` (4, 2) are those of g = dy * weight and of g * x_hat, which are added up in the type of
    the elements: a vector has many lanes, and each too few of them for float32 to lose digits.
    """
    n = weight.shape[0]
    whole = n // LANES * LANES
    rest = rows, weight, dweight, dbias, ahead
    g, g_hat = _add_four_vectors(dys, xs, counts, whole, n - whole, *rest)
    for i in range(0, whole, LANES):
        next_g, next_g_hat = _add_four_vectors(dys, xs, counts, i, None, *rest)
        g, g_hat = _plus(g, next_g), _plus(g_hat, next_g_hat)
    sums[0, 0], sums[0, 1] = sums[0, 0] + total(g[0]), sums[0, 1] + total(g_hat[0])
    sums[1, 0], sums[1, 1] = sums[1, 0] + total(g[1]), sums[1, 1] + total(g_hat[1])
    sums[2, 0], sums[2, 1] = sums[2, 0] + total(g[2]), sums[2, 1] + total(g_hat[2])
    sums[3, 0], sums[3, 1] = sums[3, 0] + total(g[3]), sums[3, 1] + total(g_hat[3])


@njit(**CONTRACT)
def _element_gradient(dy, x, counts, weight, m, rstd, t, c0, c1):
    """Return dx = rstd * (dy * weight - c0 - x_hat * c1)."""
    g = dy * weight
    whole = rstd * (g - c0 - _scale_shift(x, m, rstd, t) * c1)
    if counts is None:
        return whole
    return where(counts, whole, rstd * g)


@njit(**LEAF)
def _backward_element_vector(row, i, n, by, dxs, k):
    """Write the gradient of a vector of a row, see _terms, to dxs[k]."""
    (dys, xs, counts), (weight, m, rstd, t, c0, c1) = row, by
    dx = _element_gradient(
        load(dys, i, n), load(xs, i, n), load(counts, i, n), load(weight, i, n),
        load(m, i, n), load(rstd, i, n), load(t, i, n), load(c0, i, n), load(c1, i, n),
    )  # fmt: skip
    store(dx, dxs, k, n)


@njit(**CONTRACT)
def _apply_weight(dys, weight, rstd, dxs):
    for i in range(dys.shape[0]):
        dxs[i] = rstd * (dys[i] * weight[i])


@njit(**LEAF)
def _write_rstds_of_runs(count, var, eps, first, last, step, k, run, rstd):
    """Write what _write_rstds does, of ``run`` groups from k on of samples ``first`` to ``last``.

    Those of a sample are ``step`` groups; all of them are a single run.
    """
    n = (last - first) * run if run == step else run
    for at in range(0, (last - first) * run, max(n, 1)):
        i = first * step + k + at // run * step
        _write_rstds(stretch(count, i, n), stretch(var, i, n), eps, stretch(rstd, at, n))


@cached_njit(**FLAGS)
def backward_elements(
    threads, dy, x, mask, parameters, eps, center, live, affine, run, streamed,
    statistics, dx, dparameters,
):  # fmt: skip
    """Write dx and parameter gradients of rows: dy, x, mask or None, dx (M, D).

    ``parameters`` (2, G, D / span) are weight and bias as in forward_elements; rows i and i + G
    are of two samples. ``statistics`` (3, M) are those of forward. dweight and dbias
    (2, T, G * D / span), a row for each of T blocks of samples, are written if ``affine``. A task
    has ``run`` rows of each sample of a block; G is a multiple of it.
    """
    n_weights, length = parameters.shape[1], x.shape[1]
    n_samples = x.shape[0] // n_weights
    n_blocks = dparameters.shape[1]
    block = (n_samples + n_blocks - 1) // n_blocks
    begin, end = share(threads, n_weights // run * n_blocks)
    (weight,), (dweight, dbias) = split(parameters, 1), split(dparameters, 2)
    count, mean, var = split(statistics, 3)
    rstd, sums = allocate(None, block * run, mean.dtype), allocate(4, 2, mean.dtype)
    rows, c = allocate(4, 3, dx.dtype), allocate(2, 4, dx.dtype)
    nothing = allocate(None, min(ELEMENTS, length), dx.dtype)
    buffer = allocate(None, _buffered(_at_once(dx), streamed, dx), dx.dtype)
    gradients = allocate(2, run * length, dweight.dtype)  # of weight and bias
    of_elements = allocate(None, _repeated(parameters, run, length), dx.dtype)
    _clear(nothing)
    stream, out = _open_stream(buffer), stretch(dx, 0, dx.size)
    for task in range(begin, end):
        q, b = task // n_blocks, task % n_blocks
        k0, first, last = q * run, b * block, min((b + 1) * block, n_samples)
        _write_rstds_of_runs(count, var, eps, first, last, n_weights, k0, run, rstd)
        (weights,) = _of_elements(weight, k0, run, length, of_elements)
        _clear(gradients)
        # Four rows at a time stay in cache for all they are needed for, and some of their
        # elements in the first cache for all sums. Those come before dx, which may be dy.
        for lo in range(first, last, 4):
            n_here = min(4, last - lo)
            for k in range(k0, k0 + run):
                row, o = lo * n_weights + k, (k - k0) * length
                own = stretch(weights, o, length)
                # What comes next is asked for: dy while sums are taken, and x while dx is written,
                # with dy again, of which a long row may have left the first cache by then.
                is_last = k + 1 == k0 + run
                ahead = (4 * n_weights - run + 1 if is_last else 1) * length
                for j in range(n_here):
                    r = rstd[(lo + j - first) * run + k - k0]
                    i = row + j * n_weights
                    rows[j, 0], rows[j, 1], rows[j, 2] = _rounded(mean[i], r, 0.0, dx)
                    sums[j, 0] = 0.0
                    sums[j, 1] = 0.0
                for j in range(n_here, 4):
                    rows[j, 0], rows[j, 1], rows[j, 2] = 0.0, 0.0, 0.0
                for d in range(0, length, ELEMENTS):
                    n = min(ELEMENTS, length - d)
                    where_from = row * length + d, n_weights * length, n_here, n
                    _add_four_rows(
                        _four(dy, nothing, *where_from), _four(x, nothing, *where_from),
                        _four(mask, mask, *where_from), rows, stretch(own, d, n), sums,
                        stretch(gradients, o + d, n),
                        stretch(gradients, gradients.shape[1] + o + d, n), ahead,
                    )  # fmt: skip
                for j in range(n_here):
                    n_all = max(count[row + j * n_weights], 1.0)
                    c[0, j] = sums[j, 0] / n_all if center else 0.0
                    c[1, j] = sums[j, 1] / n_all
                for j in range(n_here):
                    i = row + j * n_weights
                    m, r, t = rows[j, 0], rows[j, 1], rows[j, 2]
                    if not live:
                        _apply_weight(dy[i], own, r, dx[i])
                        continue
                    at, by = i * length, (own, m, r, t, c[0, j], c[1, j])
                    stream = _write_run(
                        streamed, stream, _backward_element_vector, _row(dy, x, mask, at, length),
                        _row(dy, x, mask, at + ahead, 0), length, by, out, at,
                    )  # fmt: skip
        if affine:
            n = dweight.shape[1] * run // n_weights
            own_weight, own_bias = stretch(dweight[b], q * n, n), stretch(dbias[b], q * n, n)
            _add_up(stretch(gradients, 0, run * length), own_weight)
            _add_up(stretch(gradients, gradients.shape[1], run * length), own_bias)
    _close_stream(streamed, stream, out)
    release((rstd, sums, rows, c, nothing, buffer, gradients, of_elements))
