"""Activations and their slopes, for vectors of float32 or float64.

Those that are made of straight lines have two numbers: ``slope`` below 0, and ``limit``, above
which they are constant, or NaN for none. The others have a number each, and call what is compiled
once: they take longer than a call.

exp, erf and tanh are within 2 units of the last place. The polynomials are weighted minimax fits;
those of the odd functions in x**2 are as in N. Juffa's ``erff``.
"""

import math
from typing import NamedTuple

from numbanorm.numba_ext.jit import called, inline
from numbanorm.numba_ext.polynomials import (
    constant,
    polynomial,
    times_power_of_two,
    to_integer,
)
from numbanorm.numba_ext.vectors import multiply_add, splat_as, where

# What ``kind`` may be.
LINES, SILU, GELU, GELU_TANH, SIGMOID, TANH = range(6)


class Activation(NamedTuple):
    """An activation, see above; without one the slope is 1."""

    kind: int = LINES
    slope: float = 1.0
    limit: float = math.nan


NAMES: dict[str, Activation] = {
    "relu": Activation(slope=0.0),
    "leaky_relu": Activation(slope=0.01),
    "relu6": Activation(slope=0.0, limit=6.0),
    "silu": Activation(SILU),
    "gelu": Activation(GELU),
    "gelu_tanh": Activation(GELU_TANH),
    "sigmoid": Activation(SIGMOID),
    "tanh": Activation(TANH),
}

zero, half, one, two = constant(0.0), constant(0.5), constant(1.0), constant(2.0)

# -- Functions -------------------------------------------------------------------------------------

_log2_e = constant(1.0 / math.log(2.0))
# log(2), rounded to few bits, so that its multiples are exact, and the rest of it.
_ln2 = constant(0.693145751953125, 0.693147180369123816490)
_ln2_rest = constant(1.42860682030941723212e-6, 1.90821492927058770002e-10)
# Beyond these exp is infinite, or 0.
_most, _least = constant(89.0, 710.0), constant(-104.0, -746.0)
_exp = polynomial(
    (0.00138405606, 0.00837558787, 0.0416682027, 0.166664109, 0.499999911, 1.0, 1.0),
    (
        2.4998743065565523e-08, 2.7633703567985415e-07, 2.7557616154053177e-06,
        2.480148272411364e-05, 0.00019841269430168597, 0.0013888888954746708,
        0.00833333333356606, 0.041666666666479696, 0.1666666666666614, 0.5000000000000019, 1.0, 1.0,
    ),
)  # fmt: skip
# (tanh(x) / x - 1) / x**2, of x**2
_tanh = polynomial(
    (-0.00586132659, 0.0207618438, -0.0537712798, 0.133317217, -0.333332837),
    (
        -1.7143243361716126e-05, 7.923814284907597e-05, -0.00023032627361277267,
        0.0005871509280461553, -0.0014552028370601153, 0.003592034644717137,
        -0.008863226385444633, 0.021869487966422595, -0.05396825394725903, 0.13333333333293299,
        -0.3333333333333303,
    ),
)  # fmt: skip
# erf(x) / x - 1, of x**2, up to x = 0.7
_erf = polynomial(
    (-0.00068842998, 0.00513092801, -0.0268417019, 0.112834983, -0.37612626, 0.128379166),
    (
        1.1705064654435484e-08, -1.5999798413241216e-07, 1.6437190331951879e-06,
        -1.4924587692847915e-05, 0.00012055303755631812, -0.0008548326506053563,
        0.005223977619724081, -0.02686617064476228, 0.11283791670953904, -0.37612638903183737,
        0.1283791670955126,
    ),
)  # fmt: skip
# exp(z**2) * erfc(z) for z = x + 1, from 0.7 to where erf is 1
_erfcx = polynomial(
    (
        0.000222158225, -0.00173014507, 0.00639903732, -0.0166756194, 0.0376807153, -0.0792389587,
        0.154365793, -0.273211718, 0.427583635,
    ),
    (
        1.257492821764059e-13, -4.182558217523951e-12, 6.51685069700259e-11, -6.373491178158065e-10,
        4.44212061594461e-09, -2.3890534732206874e-08, 1.0555961595889366e-07,
        -4.049869797828199e-07, 1.4148869106747904e-06, -4.660262330687175e-06,
        1.4748872785450596e-05, -4.514536311309287e-05, 0.0001336647144747143,
        -0.00038195496507019823, 0.0010502692858153446, -0.0027690647039418006,
        0.006970142373240971, -0.01666186909442598, 0.03757229621559681, -0.07922696894123207,
        0.15437156137190294, -0.2732120147838992, 0.427583576155807,
    ),
)  # fmt: skip
_erf_is_one = constant(4.0, 6.0)
_tanh_large, _erf_large = constant(0.6), constant(0.7)


@inline
def exp(x):
    """Return e**x."""
    x = where(x > _most(x), _most(x), x)
    x = where(_least(x) > x, _least(x), x)
    shifted = multiply_add(x, _log2_e(x), to_integer(x))
    n = zero(x) - (shifted - to_integer(x))
    rest = multiply_add(n, _ln2_rest(x), multiply_add(n, _ln2(x), x))
    return times_power_of_two(_exp(rest), shifted)


@inline
def magnitude(x):
    """Return abs(x)."""
    return where(zero(x) > x, zero(x) - x, x)


@inline
def with_sign(x, sign):
    """Return x, which is not negative, with the sign of another."""
    return where(zero(x) > sign, zero(x) - x, x)


@inline
def sigmoid(x):
    """Return 1 / (1 + e**-x)."""
    return one(x) / (one(x) + exp(zero(x) - x))


@inline
def tanh(x):
    """Return tanh(x)."""
    size, square = magnitude(x), x * x
    large = one(x) - two(x) / (exp(size + size) + one(x))
    small = multiply_add(x * square, _tanh(square), x)
    return where(size > _tanh_large(x), with_sign(large, x), small)


@inline
def _erf_from(x, decay):
    """Return the error function of x, given exp(-x**2)."""
    size = magnitude(x)
    end = where(size > _erf_is_one(x), _erf_is_one(x), size)
    large = one(x) - decay * _erfcx(end - one(x))
    return where(size > _erf_large(x), with_sign(large, x), multiply_add(x, _erf(x * x), x))


@inline
def erf(x):
    """Return the error function of x."""
    return _erf_from(x, exp(zero(x) - x * x))


# -- Activations -----------------------------------------------------------------------------------

_root_half = constant(math.sqrt(0.5))
_root_2_pi = constant(1.0 / math.sqrt(2.0 * math.pi))
_gelu_slope, _gelu_cube = constant(2.0 * math.sqrt(2.0 / math.pi)), constant(0.044715)
_three = constant(3.0)


@inline
def _normal(x):
    """Return the share of the standard normal distribution below x, and exp(-x**2 / 2)."""
    decay = exp(zero(x) - half(x) * x * x)
    return half(x) * (one(x) + _erf_from(x * _root_half(x), decay)), decay


@inline
def _gelu_tanh_gate(x):
    """Return what x is multiplied with: (1 + tanh(u)) / 2 is sigmoid(2 * u)."""
    return sigmoid(_gelu_slope(x) * (x + _gelu_cube(x) * x * x * x))


@called
def _curve(kind, x):
    """Return an activation that is no straight line, of a vector."""
    if kind == SILU:
        # Not x * sigmoid(x): as PyTorch, whose result is subnormal where that underflows.
        return x / (one(x) + exp(zero(x) - x))
    if kind == GELU:
        share, _ = _normal(x)
        return x * share
    if kind == GELU_TANH:
        return x * _gelu_tanh_gate(x)
    if kind == SIGMOID:
        return sigmoid(x)
    return tanh(x)


@called
def _slope(kind, x):
    """Return the slope of an activation that is no straight line."""
    if kind == GELU:
        share, decay = _normal(x)
        return share + x * (_root_2_pi(x) * decay)
    if kind == GELU_TANH:
        gate = _gelu_tanh_gate(x)
        inner = _gelu_slope(x) * (one(x) + _three(x) * _gelu_cube(x) * x * x)
        return gate + x * gate * (one(x) - gate) * inner
    if kind == TANH:
        y = tanh(x)
        return one(x) - y * y
    y = sigmoid(x)
    rest = one(x) - y
    return y * rest if kind == SIGMOID else y * (one(x) + x * rest)


@inline
def _times_slope(x, slope):
    """Return x * slope, and 0 where slope is 0, also if x is not finite."""
    factor = splat_as(x, slope)
    return where(factor == zero(x), zero(x), x * factor)


@inline
def activate(activation, x):
    """Return an activation of a vector. A NaN stays one."""
    kind, slope, limit = activation
    if kind != LINES:
        return _curve(kind, x)
    most = splat_as(x, limit)
    return where(zero(x) > x, _times_slope(x, slope), where(x > most, most, x))


@inline
def differentiate(activation, x, dy):
    """Return dy times the slope of an activation at x, and 0 where dy or the slope is 0."""
    kind, slope, limit = activation
    if kind != LINES:
        return where(dy == zero(dy), dy, dy * _slope(kind, x))
    flat = where(x >= splat_as(x, limit), zero(x), dy)
    return where(zero(x) >= x, _times_slope(dy, slope), flat)
