"""What follows a norm in the same pass over memory: y = activation(norm(x) + residual).

Backward calculates what the activation was given again, from x and the residual: by the same
function from the same coefficients as forward, and thus the same bits.
"""

import numpy as np

from numbanorm.kernels.access import (
    ACTIVATION,
    HAS_RESIDUAL,
    IS_ALIGNED,
    IS_KEPT,
    Row,
    prefetch_row,
    read,
    stream_row,
    write,
    write_part_of_row,
)
from numbanorm.kernels.activations import activate, differentiate
from numbanorm.kernels.formulas import norm
from numbanorm.numba_ext.jit import called, if_none, inline
from numbanorm.numba_ext.vectors import load
from numbanorm.tuning import LANES

# ``fused``, see access.Row, is an argument of its own below: where it is None, what is done with it
# is not compiled.


@inline
def norm_row(fused, row, i, n, coef, c):
    """Return norm(x) + residual of a row from i on, see access.read; coef is read from c on."""
    z = norm(load(coef, c, n), read(row.x, i, n))
    if fused is not None and fused[HAS_RESIDUAL]:
        z = z + read(row.residual, i, n)
    return z


@inline
def make_y(fused, row, i, n, coef, c):
    """Return a vector of y, see norm_row."""
    z = norm_row(fused, row, i, n, coef, c)
    return z if fused is None else activate(fused[ACTIVATION], z)


@inline
def read_dy(fused, forward, row, i, n, c):
    """Return the gradient of norm(x) + residual from i on, given coefficients of forward."""
    dy = read(row.dy, i, n)
    if fused is None:
        return dy
    if fused[IS_KEPT]:
        return read(row.dresidual, i, n)
    return differentiate(fused[ACTIVATION], norm_row(fused, row, i, n, forward, c), dy)


@inline
def write_dresidual(fused, streamed, row, dy, i, n):
    """Write what read_dy returned to the gradient of the residual, if there is one."""
    if fused is not None and fused[HAS_RESIDUAL] and not fused[IS_KEPT]:
        write(streamed and fused[IS_ALIGNED], dy, row.dresidual, i, n)


# -- Rows: apart from sums, whose vectors a call for an activation would have to store.


@inline
def _write_dy(fused, row, n, distance, target):
    """Write the gradient of norm(x) + residual of n elements to a target (n or more,)."""
    end = n // LANES * LANES
    for i in range(0, end, LANES):
        if distance is not None:
            prefetch_row(row, i + distance)
        z = norm_row(fused, row, i, None, row.forward, i)
        write(False, differentiate(fused[ACTIVATION], z, read(row.dy, i, None)), target, i, None)
    if end < n:
        z = norm_row(fused, row, end, n - end, row.forward, end)
        dy = read(row.dy, end, n - end)
        write(False, differentiate(fused[ACTIVATION], z, dy), target, end, n - end)


@called
def _write_dy_called(fused, row, n, distance, target):
    _write_dy(fused, row, n, distance, target)


@inline
def keep_dy(dy, fused, row, n, distance):
    """Write what read_dy will return of a row of n elements, where it is kept.

    Elements from ``distance`` on are prefetched, unless that is None.
    """
    # One by one: Numba leaves out a branch only where it asks for None alone.
    if fused is not None:
        if dy is not None:
            if fused[IS_KEPT]:
                _write_dy(fused, row, n, distance, row.dresidual)


def _same_row(fused, row, n, distance, scratch):
    return row


def _row_of_norm(fused, row, n, distance, scratch):
    _write_dy_called(fused, row, n, distance, scratch)
    return Row(scratch, row.x, row.mask, None, None, None, row.forward)


# Return a row of n elements with the gradient of norm(x) + residual in the place of dy, which is
# written to scratch (n,). Elements from ``distance`` on are prefetched.
row_of_norm = if_none(_same_row, _row_of_norm)


def _row_again(fused, streamed, row, n, scratch):
    return row


def _row_from_scratch(fused, streamed, row, n, scratch):
    if fused[HAS_RESIDUAL]:
        start = np.intp(0)
        if streamed:
            stream_row(scratch, n, row.dresidual, start, start)
        else:
            write_part_of_row(scratch, start, n, row.dresidual, start)
    return Row(scratch, row.x, row.mask, None, None, None, row.forward)


# Return a row whose gradient is in scratch already, and write that of the residual.
row_again = if_none(_row_again, _row_from_scratch)
