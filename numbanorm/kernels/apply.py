"""The second pass over pieces: y = (x - m) * s + t, and dx = a * dy + r * ((x - m) * b + c)."""

from numbanorm.kernels.access import arithmetic, take_row, with_forward
from numbanorm.kernels.formulas import Gradient, Scale, ScaleShift
from numbanorm.kernels.outputs import periodic_size, write_block, write_row, write_row_called
from numbanorm.kernels.reduce import column_task, n_column_tasks, n_row_tasks, row_task
from numbanorm.kernels.scratch import copy_coefficients
from numbanorm.numba_ext.jit import if_none, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, fence, line_size, release
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import PREFETCH_FAR


def _y_of_piece(dy, streamed, row, n, coef, p, y, at, upcoming):
    m, s, t = unstack(coef, 3)
    piece_coef = ScaleShift(m[p, 0], s[p, 0], t[p, 0])
    write_row(streamed, row, n, piece_coef, y, at, upcoming)


def _dx_of_piece(dy, streamed, row, n, coef, p, dx, at, upcoming):
    _write_dx(row.fused, streamed, row, n, coef, p, dx, at, upcoming)


_write_piece = if_none(_y_of_piece, _dx_of_piece)


def _dx_of_norm(fused, streamed, row, n, coef, p, dx, at, upcoming):
    a, r, m, b, c = unstack(coef, 5)
    piece_coef = Gradient(a[p, 0], r[p, 0], m[p, 0], b[p, 0], c[p, 0])
    write_row(streamed, row, n, piece_coef, dx, at, upcoming)


def _dx_of_fused(fused, streamed, row, n, coef, p, dx, at, upcoming):
    m, s, t, a = unstack(coef, 4)
    row = with_forward(row, ScaleShift(m[p, 0], s[p, 0], t[p, 0]))
    if coef.shape[0] == 4:
        write_row_called(streamed, row, n, Scale(a[p, 0]), dx, at, upcoming)
    else:
        _, _, _, a, r, m, b, c = unstack(coef, 8)
        piece_coef = Gradient(a[p, 0], r[p, 0], m[p, 0], b[p, 0], c[p, 0])
        write_row(streamed, row, n, piece_coef, dx, at, upcoming)


_write_dx = if_none(_dx_of_norm, _dx_of_fused)


@kernel
def apply_rows(threads, dy, x, mask, fused, tiles, coef, streamed, y):
    """Write y, or with dy dx, of each piece: dy or None, x, mask or None, y (P, L).

    ``coef`` (3 or 5, P, 1) are the fields of ScaleShift or Gradient. With dy and ``fused`` they
    are (8, P, 1), those of ScaleShift in forward come first; or with that of Scale (4, P, 1).
    """
    n_parts, distance = max(1, (x.shape[1] + tiles[0] - 1) // tiles[0]), PREFETCH_FAR * line_size(x)
    begin, end = thread_range(threads, n_row_tasks(n_parts, tiles, x.shape))
    out = flat_slice(y, 0, y.size)
    for task in range(begin, end):
        t = row_task(task, n_parts, tiles, x.shape)
        for p in range(t.first, t.last):
            at = p * x.shape[1] + t.lo
            upcoming = take_row(dy, x, None, fused, at + distance, 0)
            row = take_row(dy, x, mask, fused, at, t.n)
            _write_piece(dy, streamed, row, t.n, coef, p, out, at, upcoming)
    if streamed:
        fence()


def _y_of_block(dy, streamed, x, mask, fused, t, rows, y):
    coef = ScaleShift(*unstack(rows, 3))
    write_block(streamed, dy, x, mask, fused, None, t.a, t.lo, t.hi, t.c0, t.c1, coef, y)


def _dx_of_block(dy, streamed, x, mask, fused, t, rows, dx):
    _write_dx_block(fused, streamed, dy, x, mask, t, rows, dx)


_write_columns = if_none(_y_of_block, _dx_of_block)


def _dx_block_of_norm(fused, streamed, dy, x, mask, t, rows, dx):
    coef = Gradient(*unstack(rows, 5))
    write_block(streamed, dy, x, mask, fused, None, t.a, t.lo, t.hi, t.c0, t.c1, coef, dx)


def _dx_block_of_fused(fused, streamed, dy, x, mask, t, rows, dx):
    m, s, offset, a = unstack(rows, 4)
    forward, place = ScaleShift(m, s, offset), (t.a, t.lo, t.hi, t.c0, t.c1)
    if rows.shape[0] == 4:
        write_block(streamed, dy, x, mask, fused, forward, *place, Scale(a), dx)
    else:
        _, _, _, a, r, m, b, c = unstack(rows, 8)
        coef = Gradient(a, r, m, b, c)
        write_block(streamed, dy, x, mask, fused, forward, *place, coef, dx)


_write_dx_block = if_none(_dx_block_of_norm, _dx_block_of_fused)


@kernel
def apply_columns(threads, dy, x, mask, fused, tiles, coef, streamed, y):
    """Write y, or with dy dx, of each piece: dy or None, x, mask or None, y (A, L, F * C).

    ``coef`` (3, 5, 8 or 4, A, C) are as in apply_rows.
    """
    n_parts = max(1, (x.shape[1] + tiles[0] - 1) // tiles[0])
    begin, end = thread_range(threads, n_column_tasks(n_parts, tiles, x.shape))
    for task in range(begin, end):
        t = column_task(task, n_parts, tiles, x.shape)
        rows = allocate(coef.shape[0], periodic_size(t.c1 - t.c0), arithmetic(x))
        copy_coefficients(coef, t.a, t.c0, t.c1, rows)
        _write_columns(dy, streamed, x, mask, fused, t, rows, y)
        release((rows,))
    if streamed:
        fence()
