"""The second pass over pieces: y = (x - m) * s + t, and dx = a * dy + r * ((x - m) * b + c)."""

from numbanorm.kernels.access import arithmetic, take_row
from numbanorm.kernels.formulas import Gradient, Scale, ScaleShift
from numbanorm.kernels.outputs import periodic_size, write_block, write_row, write_row_called
from numbanorm.kernels.reduce import column_task, n_column_tasks, n_row_tasks, row_task
from numbanorm.kernels.scratch import copy_coefficients, copy_forward
from numbanorm.numba_ext.jit import if_none, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, fence, line_size, release
from numbanorm.numba_ext.views import flat_slice, item, unstack
from numbanorm.tuning import PREFETCH_FAR

# Coefficients of y, or with dy of dx.
_coefficients = if_none(
    lambda dy, coef: ScaleShift(*unstack(coef, 3)), lambda dy, coef: Gradient(*unstack(coef, 5))
)


@kernel
def apply_rows(threads, dy, x, mask, fused, forward, tiles, coef, is_scale, streamed, y):
    """Write y, or with dy dx, of each piece: dy or None, x, mask or None, y (P, L).

    ``coef`` (3 or 5, P, 1) are the fields of ScaleShift or Gradient, and ``forward`` (3, P, 1) with
    dy and ``fused`` those of ScaleShift in forward, else None. With ``forward``, ``is_scale`` says
    whether the gradient is Scale.
    """
    n_parts, distance = max(1, (x.shape[1] + tiles[0] - 1) // tiles[0]), PREFETCH_FAR * line_size(x)
    begin, end = thread_range(threads, n_row_tasks(n_parts, tiles, x.shape))
    rows, shifts = _coefficients(dy, coef), ScaleShift(*unstack(forward, 3))
    out = flat_slice(y, 0, y.size)
    for task in range(begin, end):
        t = row_task(task, n_parts, tiles, x.shape)
        for p in range(t.first, t.last):
            at, row_coef = p * x.shape[1] + t.lo, item(rows, p)
            upcoming = take_row(dy, x, None, fused, None, at + distance, 0)
            row = take_row(dy, x, mask, fused, item(shifts, p), at, t.n)
            if forward is not None and is_scale:
                write_row_called(streamed, row, t.n, Scale(row_coef.a), out, at, upcoming)
            else:
                write_row(streamed, row, t.n, row_coef, out, at, upcoming)
    if streamed:
        fence()


@kernel
def apply_columns(threads, dy, x, mask, fused, forward, tiles, coef, is_scale, streamed, y):
    """Write y, or with dy dx, of each piece: dy or None, x, mask or None, y (A, L, F * C).

    ``coef`` (3 or 5, A, C), ``forward`` (3, A, C) and ``is_scale`` are as in apply_rows.
    """
    n_parts = max(1, (x.shape[1] + tiles[0] - 1) // tiles[0])
    begin, end = thread_range(threads, n_column_tasks(n_parts, tiles, x.shape))
    for task in range(begin, end):
        t = column_task(task, n_parts, tiles, x.shape)
        place = t.a, t.lo, t.hi, t.c0, t.c1
        rows = allocate(coef.shape[0], periodic_size(t.c1 - t.c0), arithmetic(x))
        forward_rows = allocate(3, periodic_size(t.c1 - t.c0), arithmetic(x))
        copy_coefficients(coef, t.a, t.c0, t.c1, rows)
        columns = _coefficients(dy, rows)
        shifts = copy_forward(forward, t.a, t.c0, t.c1, forward_rows)
        if forward is not None and is_scale:
            direct = Scale(columns.a)
            write_block(streamed, dy, x, mask, fused, shifts, *place, direct, y)
        else:
            write_block(streamed, dy, x, mask, fused, shifts, *place, columns, y)
        release((rows, forward_rows))
    if streamed:
        fence()
