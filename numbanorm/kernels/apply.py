"""The second pass over pieces: y = (x - m) * s + t, and dx = a * dy + r * ((x - m) * b + c)."""

from numbanorm.kernels.access import arithmetic, take_row
from numbanorm.kernels.formulas import Gradient, ScaleShift
from numbanorm.kernels.outputs import periodic_size, write_block, write_row
from numbanorm.kernels.reduce import column_task, n_column_tasks, n_row_tasks, row_task
from numbanorm.kernels.scratch import copy_coefficients
from numbanorm.numba_ext.jit import if_none, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, fence, line_size, release
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import PREFETCH_FAR


def _scale_shift_of_piece(dy, coef, p):
    m, s, t = unstack(coef, 3)
    return ScaleShift(m[p, 0], s[p, 0], t[p, 0])


def _gradient_of_piece(dy, coef, p):
    a, r, m, b, c = unstack(coef, 5)
    return Gradient(a[p, 0], r[p, 0], m[p, 0], b[p, 0], c[p, 0])


_piece_coef = if_none(_scale_shift_of_piece, _gradient_of_piece)


def _scale_shift_of_rows(dy, rows):
    return ScaleShift(*unstack(rows, 3))


def _gradient_of_rows(dy, rows):
    return Gradient(*unstack(rows, 5))


_row_coef = if_none(_scale_shift_of_rows, _gradient_of_rows)


@kernel
def apply_rows(threads, dy, x, mask, tiles, coef, streamed, y):
    """Write y, or with dy dx, of each piece: dy or None, x, mask or None, y (P, L).

    ``coef`` (3 or 5, P, 1) are the fields of ScaleShift or Gradient.
    """
    n_parts, distance = max(1, (x.shape[1] + tiles[0] - 1) // tiles[0]), PREFETCH_FAR * line_size(x)
    begin, end = thread_range(threads, n_row_tasks(n_parts, tiles, x.shape))
    out = flat_slice(y, 0, y.size)
    for task in range(begin, end):
        t = row_task(task, n_parts, tiles, x.shape)
        for p in range(t.first, t.last):
            piece_coef = _piece_coef(dy, coef, p)
            at = p * x.shape[1] + t.lo
            upcoming = take_row(dy, x, None, at + distance, 0)
            row = take_row(dy, x, mask, at, t.n)
            write_row(streamed, row, t.n, piece_coef, out, at, upcoming)
    if streamed:
        fence()


@kernel
def apply_columns(threads, dy, x, mask, tiles, coef, streamed, y):
    """Write y, or with dy dx, of each piece: dy or None, x, mask or None, y (A, L, F * C).

    ``coef`` (3 or 5, A, C) are the fields of ScaleShift or Gradient.
    """
    n_parts = max(1, (x.shape[1] + tiles[0] - 1) // tiles[0])
    begin, end = thread_range(threads, n_column_tasks(n_parts, tiles, x.shape))
    for task in range(begin, end):
        t = column_task(task, n_parts, tiles, x.shape)
        rows = allocate(coef.shape[0], periodic_size(t.c1 - t.c0), arithmetic(x))
        copy_coefficients(coef, t.a, t.c0, t.c1, rows)
        row_coef = _row_coef(dy, rows)
        write_block(streamed, dy, x, mask, t.a, t.lo, t.hi, t.c0, t.c1, row_coef, y)
        release((rows,))
    if streamed:
        fence()
