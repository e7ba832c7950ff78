"""The mathematics on one page: moments, coefficients, outputs and gradients.

A comment above each vector loop has its formula for a single number.
"""

from typing import Any, NamedTuple

import numpy as np

from numbanorm.numba_ext.jit import by_record, inline, inline_contract
from numbanorm.numba_ext.vectors import (
    is_finite,
    leading,
    load,
    multiply_add,
    narrow,
    splat,
    store,
    where,
    widen,
)
from numbanorm.tuning import LANES

# -- Moments ---------------------------------------------------------------------------------------


@inline
def two_sum(a, b):
    """Return a + b in float64, and what that rounds away (Knuth); 0 if it is not finite."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    return s, error if np.isfinite(s) else 0.0


@inline
def unshift(n, shift, s1, s2):
    """Return mean, m2 and the mean's rest from sums around shift (Chan et al. 1983, eq. 1.7).

    All are 0 for an empty group, whose shift is 0.
    """
    r = s1 / max(n, 1)
    m2 = s2 - s1 * r
    mean, rest = two_sum(shift, r)
    # Not max(): a NaN must stay.
    return mean, 0.0 if m2 < 0.0 else m2, rest


@inline
def unshift_all(n, mean, m2, rest):
    """Replace shift, s2 and s1 in mean, m2 and rest (P,) by what unshift makes of them."""
    for i in range(n.size):
        mean[i], m2[i], rest[i] = unshift(n[i], mean[i], rest[i], m2[i])


@inline
def merge_pair(n_a, mean_a, m2_a, rest_a, n_b, mean_b, m2_b, rest_b):
    """Return count, mean, m2 and the mean's rest of a and b together (Chan et al. 1983, eq. 2.1).

    A mean has two parts, as deviations may be as small as what its rounding takes away.
    """
    if n_a == 0:
        return n_b, mean_b, m2_b, rest_b
    if n_b == 0:
        return n_a, mean_a, m2_a, rest_a
    n = n_a + n_b
    fraction = n_b / n
    delta = (mean_b - mean_a) + (rest_b - rest_a)
    mean, rest = two_sum(mean_a, delta * fraction)
    mean, rest = two_sum(mean, rest + rest_a)
    return n, mean, m2_a + m2_b + delta * delta * (n_a * fraction), rest


@inline
def not_below_one(vector):
    """Return the larger of 1 and each element; 1 for NaN."""
    one = splat(1.0)
    return where(vector > one, vector, one)


@inline
def write_statistics(g, n, mu, m2, center, count, mean, var):
    """Write statistics of group g; if not ``center``, var is the mean square, and the mean 0."""
    v = m2 / max(n, 1)
    count[g] = n
    mean[g] = mu if center else 0.0
    var[g] = v if center else v + mu * mu


@inline
def write_all_statistics(n, mu, m2, center, count, mean, var):
    """Write the statistics of groups (G,), see write_statistics."""
    for g in range(n.size):
        write_statistics(g, n[g], mu[g], m2[g], center, count, mean, var)


@inline_contract
def invert_roots(var, eps, rstd):
    """Write 1 / sqrt(var + eps) to rstd (n,), and 0 where it was 0 or var + eps is 0."""
    for i in range(var.size):
        v = var[i] + eps
        rstd[i] = 0.0 if (rstd[i] == 0.0) | (v == 0.0) else 1.0 / np.sqrt(v)


@inline
def write_rstds(count, var, eps, rstd):
    """Write 1 / sqrt(var + eps), or 0 for an empty group or where var + eps is 0, to rstd."""
    for i in range(count.size):
        rstd[i] = count[i]
    invert_roots(var, eps, rstd)


# -- Outputs: a record of coefficients says by its type which formula is meant. Each coefficient is
# -- a number for a whole row, or a row of numbers.


class ScaleShift(NamedTuple):
    """y = (x - m) * s + t, with the mean rounded to the type of x for m: exact at any offset."""

    m: Any
    s: Any
    t: Any


class ElementAffine(NamedTuple):
    """y = x_hat * weight + bias, x_hat = (x - m) * rstd + t, with weights for each element."""

    weight: Any
    bias: Any
    m: Any
    rstd: Any
    t: Any


class Scale(NamedTuple):
    """dx = a * dy, where the statistics do not come from x."""

    a: Any


class ElementScale(NamedTuple):
    """dx = rstd * (dy * weight), where the statistics do not come from x."""

    weight: Any
    rstd: Any


class Gradient(NamedTuple):
    """dx = a * dy + r * ((x - m) * b + c).

    r is not multiplied into b and c: at abs(x) = 1e30 the products would underflow in float32.
    """

    a: Any
    r: Any
    m: Any
    b: Any
    c: Any


class ElementGradient(NamedTuple):
    """dx = rstd * (dy * weight - c0 - x_hat * c1), x_hat = (x - m) * rstd + t."""

    weight: Any
    m: Any
    rstd: Any
    t: Any
    c0: Any
    c1: Any


def _scale_shift(coef, x):
    # (x - m) * s + t
    return multiply_add(x - coef.m, coef.s, coef.t)


def _element_affine(coef, x):
    # ((x - m) * rstd + t) * weight + bias
    return multiply_add(x_hat(x, coef.m, coef.rstd, coef.t), coef.weight, coef.bias)


# Return a vector of norm(x), from vectors of coefficients.
norm = by_record({ScaleShift: _scale_shift, ElementAffine: _element_affine})


@inline
def x_hat(x, m, rstd, t):
    """Return (x - m) * rstd + t; m is subtracted first, see ScaleShift."""
    return multiply_add(x - m, rstd, t)


def _scale(coef, dy, x, counts):
    return coef.a * dy


def _element_scale(coef, dy, x, counts):
    return coef.rstd * (dy * coef.weight)


def _gradient(coef, dy, x, counts):
    # a * dy + r * ((x - m) * b + c)
    direct = coef.a * dy
    full = direct + coef.r * ((x - coef.m) * coef.b + coef.c)
    return full if counts is None else where(counts, full, direct)


def _element_gradient(coef, dy, x, counts):
    # rstd * (dy * weight - c0 - ((x - m) * rstd + t) * c1)
    g = dy * coef.weight
    full = coef.rstd * (g - coef.c0 - x_hat(x, coef.m, coef.rstd, coef.t) * coef.c1)
    return full if counts is None else where(counts, full, coef.rstd * g)


# Return a vector of dx, from vectors of coefficients, dy, x and which of x counted in the
# statistics, or None: the terms of these are for those alone.
make_dx = by_record(
    {
        Scale: _scale,
        ElementScale: _element_scale,
        Gradient: _gradient,
        ElementGradient: _element_gradient,
    }
)


# -- Coefficients ----------------------------------------------------------------------------------


@inline
def round_coefficients(mean, scale, offset, dtype):
    """Return m, s and t of ScaleShift in a type, for numbers."""
    m = dtype(mean)
    return m, dtype(scale), dtype((np.float64(m) - mean) * scale + offset)


@inline
def store_scale_shift(mean, rstd, weight, bias, m, s, t, i, n):
    """Write m, s and t of ScaleShift from vectors of float64."""
    # s = rstd * weight; t = (m - mean) * s + bias
    scale, rounded = rstd * weight, narrow(mean, m)
    store(rounded, m, i, n)
    store(narrow(scale, s), s, i, n)
    store(narrow(multiply_add(widen(rounded) - mean, scale, bias), t), t, i, n)


@inline
def group_coefficients(count, mean, rstd, g0, g1, center, r, m, b, c):
    """Write r, m, b, c of Gradient for n groups to the first n elements of each.

    g0 and g1 are the groups' sums of dy * weight and of dy * weight * (x - mean).
    """
    # b = -rstd**2 * g1 / n; c = b * (m - mean) - g0 / n
    for g in range(0, count.size, LANES):
        n_valid = min(LANES, count.size - g)
        n, mu, scale = (
            not_below_one(load(count, g, n_valid)),
            load(mean, g, n_valid),
            load(rstd, g, n_valid),
        )
        # The slope is -rstd**3 * g1 / n, and r is rstd.
        slope, rounded = splat(-1.0) * (scale * load(g1, g, n_valid)) * scale / n, narrow(mu, m)
        offset = slope * (widen(rounded) - mu)
        if center:
            offset = offset - load(g0, g, n_valid) / n
        store(narrow(scale, r), r, g, n_valid)
        store(rounded, m, g, n_valid)
        store(narrow(slope, b), b, g, n_valid)
        store(narrow(offset, c), c, g, n_valid)


@inline_contract
def column_coefficients(mean, rstd, m, r, t):
    """Write what round_coefficients returns for each of n columns to m, r, t (n,)."""
    # r = rstd; t = (m - mean) * rstd
    for c in range(mean.size):
        m[c] = mean[c]
        r[c] = rstd[c]
        t[c] = (np.float64(m[c]) - mean[c]) * rstd[c]


# -- Terms of the sums of backward -----------------------------------------------------------------


@inline
def enters_sums(x, counts):
    """Tell which elements of vectors enter the sums of backward.

    A masked-out element is normalised too, so that its dy enters, unless its x is not finite: that
    must not turn the sums into NaN.
    """
    return counts | is_finite(x)


@inline
def moment_terms(x, counts, n, center):
    """Return vectors of 1, x - center and its square, and of 0 where an element does not count."""
    # x is read in any case: a load that depends on the mask is not prefetched.
    d, zero, one = x - center, splat(0.0), splat(1.0)
    if counts is None:
        if n is None:
            return one, d, d * d
        valid = leading(n)
    else:
        valid = counts
    d = where(valid, d, zero)
    return where(valid, one, zero), d, d * d


@inline
def gradient_terms(dy, x, counts, center):
    """Return vectors of dy and x - center in float64, and of 0 where they do not enter the sums."""
    w, d = widen(dy), widen(x) - center
    if counts is not None:
        enters = enters_sums(x, counts)
        w, d = where(enters, w, splat(0.0)), where(enters, d, splat(0.0))
    return w, d
