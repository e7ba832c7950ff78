"""The second pass over pieces: y = (x - m) * s + t, and dx."""

from numbanorm.kernels.access import take_row
from numbanorm.kernels.formulas import input_gradient, scale_shift
from numbanorm.kernels.reduce import rows_of_task
from numbanorm.kernels.scratch import copy_coefficients
from numbanorm.kernels.stream import (
    buffer_size,
    close_stream,
    lines_at_once,
    open_stream,
    write_columns,
    write_run,
)
from numbanorm.numba_ext.jit import inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, line_size, release
from numbanorm.numba_ext.vectors import load, store
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import PREFETCH_FAR


@inline
def apply_vector(row, i, n, coef, ys, k):
    """Scale and shift a vector of a row, see terms, by m, s and t, and write it to ys[k]."""
    x, (m, s, t) = load(row[1], i, n), coef
    store(scale_shift(x, load(m, i, n), load(s, i, n), load(t, i, n)), ys, k, n)


@kernel
def apply_rows(threads, x, part, block, coef, streamed, y):
    """Scale and shift each piece: x (P, L), m, s and t (3, P, 1) -> y (P, L).

    ``streamed`` is True or None.
    """
    n_parts = max(1, (x.shape[1] + part - 1) // part)
    begin, end = thread_range(threads, (x.shape[0] + block - 1) // block * n_parts)
    (m, s, t), distance = unstack(coef, 3), PREFETCH_FAR * line_size(x)
    buffer = allocate(None, buffer_size(lines_at_once(y), streamed, y), y.dtype)
    stream, out = open_stream(buffer), flat_slice(y, 0, y.size)
    for task in range(begin, end):
        first, last, _, lo, n = rows_of_task(task, n_parts, part, block, x.shape)
        for p in range(first, last):
            at, of_piece = p * x.shape[1] + lo, (m[p, 0], s[p, 0], t[p, 0])
            row, upcoming = (
                take_row(None, x, None, at, n),
                take_row(None, x, None, at + distance, 0),
            )
            stream = write_run(streamed, stream, apply_vector, row, upcoming, n, of_piece, out, at)
    close_stream(streamed, stream, out)
    release((buffer,))


@kernel
def apply_columns(threads, x, part, width, coef, streamed, y):
    """Scale and shift each piece: x (A, L, F * C), m, s and t (3, A, C) -> y (A, L, F * C)."""
    n_outer, length, n_columns = x.shape
    n_parts = max(1, (length + part - 1) // part)
    n_blocks = (n_columns + width - 1) // width
    begin, end = thread_range(threads, n_outer * n_parts * n_blocks)
    for task in range(begin, end):
        a = task // (n_parts * n_blocks)
        lo = (task // n_blocks - a * n_parts) * part
        hi = min(length, lo + part)
        c0 = (task % n_blocks) * width
        c1 = min(n_columns, c0 + width)
        rows = allocate(3, c1 - c0, y.dtype)
        buffer = allocate(None, buffer_size(c1 - c0, streamed, y), y.dtype)
        copy_coefficients(coef, a, c0, c1, rows)
        write_columns(
            streamed, buffer, apply_vector, None, x, None, a, lo, hi, c0, c1, unstack(rows, 3), y
        )
        release((rows, buffer))


@inline
def backward_vector(row, i, n, coef, dxs, k):
    """Write the gradient of a vector of a row, see terms, to dxs[k]; ``by`` is a, r, m, b, c."""
    (dys, xs, counts), (a, r, m, b, c) = row, coef
    dx = input_gradient(
        load(dys, i, n), load(xs, i, n), load(counts, i, n),
        load(a, i, n), load(r, i, n), load(m, i, n), load(b, i, n), load(c, i, n),
    )  # fmt: skip
    store(dx, dxs, k, n)


@kernel
def backward_rows(threads, dy, x, mask, part, block, coef, streamed, dx):
    """Write dx: dy, x, mask or None (P, L), a, r, m, b, c (5, P, 1) -> dx (P, L).

    ``streamed`` is True or None.
    """
    n_parts = max(1, (x.shape[1] + part - 1) // part)
    begin, end = thread_range(threads, (x.shape[0] + block - 1) // block * n_parts)
    (a, r, m, b, c), distance = unstack(coef, 5), PREFETCH_FAR * line_size(x)
    buffer = allocate(None, buffer_size(lines_at_once(dx), streamed, dx), dx.dtype)
    stream, out = open_stream(buffer), flat_slice(dx, 0, dx.size)
    for task in range(begin, end):
        first, last, _, lo, n = rows_of_task(task, n_parts, part, block, x.shape)
        for p in range(first, last):
            of_piece = a[p, 0], r[p, 0], m[p, 0], b[p, 0], c[p, 0]
            at = p * x.shape[1] + lo
            row, upcoming = take_row(dy, x, mask, at, n), take_row(dy, x, None, at + distance, 0)
            stream = write_run(
                streamed, stream, backward_vector, row, upcoming, n, of_piece, out, at
            )
    close_stream(streamed, stream, out)
    release((buffer,))


@kernel
def backward_columns(threads, dy, x, mask, part, width, coef, streamed, dx):
    """Write dx: dy, x, mask or None (A, L, F * C), a, r, m, b, c (5, A, C) -> dx (A, L, F * C)."""
    n_outer, length, n_columns = x.shape
    n_parts = max(1, (length + part - 1) // part)
    n_blocks = (n_columns + width - 1) // width
    begin, end = thread_range(threads, n_outer * n_parts * n_blocks)
    for task in range(begin, end):
        o = task // (n_parts * n_blocks)
        lo = (task // n_blocks - o * n_parts) * part
        hi = min(length, lo + part)
        c0 = (task % n_blocks) * width
        c1 = min(n_columns, c0 + width)
        rows = allocate(5, c1 - c0, dx.dtype)
        buffer = allocate(None, buffer_size(c1 - c0, streamed, dx), dx.dtype)
        copy_coefficients(coef, o, c0, c1, rows)
        write_columns(
            streamed, buffer, backward_vector, dy, x, mask, o, lo, hi, c0, c1, unstack(rows, 5), dx
        )
        release((rows, buffer))


@inline
def scale_vector(row, i, n, coef, dxs, k):
    """Write a * dy of a vector of a row, see terms, to dxs[k]; a is the first of ``by``."""
    store(load(coef[0], i, n) * load(row[0], i, n), dxs, k, n)
