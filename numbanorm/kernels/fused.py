"""What follows a norm in the same pass over memory: y = activation(norm(x) + residual).

Backward calculates what the activation was given again, from x and the residual: by the same
function from the same coefficients as forward, and thus the same bits.
"""

from numbanorm.kernels.access import read, write
from numbanorm.kernels.activations import activate, differentiate
from numbanorm.kernels.formulas import norm
from numbanorm.numba_ext.jit import inline
from numbanorm.numba_ext.vectors import load

# ``fused``, see access.Row, is an argument of its own below: where it is None, what is done with it
# is not compiled.


@inline
def norm_row(fused, row, i, n, coef, c):
    """Return norm(x) + residual of a row from i on, see access.read; coef is read from c on."""
    z = norm(load(coef, c, n), read(row.x, i, n))
    if fused is not None and fused[1]:
        z = z + read(row.residual, i, n)
    return z


@inline
def make_y(fused, row, i, n, coef, c):
    """Return a vector of y, see norm_row."""
    z = norm_row(fused, row, i, n, coef, c)
    return z if fused is None else activate(fused[0], z)


@inline
def read_dy(fused, forward, row, i, n, c):
    """Return the gradient of norm(x) + residual from i on, given coefficients of forward."""
    dy = read(row.dy, i, n)
    if fused is None:
        return dy
    return differentiate(fused[0], norm_row(fused, row, i, n, forward, c), dy)


@inline
def write_dresidual(fused, streamed, row, dy, i, n):
    """Write what read_dy returned to the gradient of the residual, if there is one."""
    if fused is not None and fused[1]:
        write(streamed and fused[4], dy, row.dresidual, i, n)
