"""What follows a norm in the same pass over memory: y = activation(norm(x) + residual).

Backward calculates what the activation was given again, from x and the residual: by the same
function from the same coefficients as forward, and thus the same bits.
"""

from numbanorm.kernels.access import read, read_x, write
from numbanorm.kernels.activations import activate, differentiate
from numbanorm.kernels.formulas import (
    ElementAffine,
    ScaleShift,
    element_affine,
    scale_shift,
)
from numbanorm.numba_ext.jit import by_type, if_none, inline
from numbanorm.numba_ext.vectors import load


def _scale_shift(row, i, n, coef, c):
    return scale_shift(
        read_x(row, i, n), load(coef.m, c, n), load(coef.s, c, n), load(coef.t, c, n)
    )


def _element_affine(row, i, n, coef, c):
    return element_affine(
        read_x(row, i, n), load(coef.weight, c, n), load(coef.bias, c, n),
        load(coef.m, c, n), load(coef.rstd, c, n), load(coef.t, c, n),
    )  # fmt: skip


FORWARD = {ScaleShift: _scale_shift, ElementAffine: _element_affine}


@by_type
def norm(row, i, n, coef, c):
    """Return norm(x) of a row from i on, see access.read; coefficients are read from c on."""
    return FORWARD[getattr(coef, "instance_class", type(coef))]


@inline
def _pre_activation(row, i, n, coef, c):
    """Return norm(x) + residual."""
    z = norm(row, i, n, coef, c)
    if row.fused.has_residual:
        z = z + read(row.fused.residual, i, n)
    return z


def _norm_alone(fused, row, i, n, coef, c):
    return norm(row, i, n, coef, c)


def _activation(fused, row, i, n, coef, c):
    return activate(fused.activation, _pre_activation(row, i, n, coef, c))


_y = if_none(_norm_alone, _activation)


@inline
def make_y(row, i, n, coef, c):
    """Return a vector of y, see norm."""
    return _y(row.fused, row, i, n, coef, c)


def _dy_alone(fused, row, i, n, c):
    return read(row.dy, i, n)


def _dy_of_norm(fused, row, i, n, c):
    z = _pre_activation(row, i, n, row.forward, c)
    return differentiate(fused.activation, z, read(row.dy, i, n))


_dy = if_none(_dy_alone, _dy_of_norm)


@inline
def read_dy(row, i, n, c):
    """Return the gradient of norm(x) + residual from i on, see norm."""
    return _dy(row.fused, row, i, n, c)


def _write_nothing(fused, streamed, dy, i, n):
    pass


def _write_dresidual(fused, streamed, dy, i, n):
    if fused.has_residual:
        write(streamed and fused.aligned, dy, fused.dresidual, i, n)


_write = if_none(_write_nothing, _write_dresidual)


@inline
def write_dresidual(streamed, row, dy, i, n):
    """Write what read_dy returned to the gradient of the residual, if there is one."""
    _write(row.fused, streamed, dy, i, n)
