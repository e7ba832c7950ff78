"""The mathematics: moments, coefficients and gradients, for numbers and for vectors."""

import numpy as np

from numbanorm.numba_ext.jit import inline, inline_contract
from numbanorm.numba_ext.vectors import load, narrow, splat, store, where, widen
from numbanorm.numba_ext.views import flat_slice
from numbanorm.tuning import LANES


@inline
def two_sum(a, b):
    """Return a + b in float64, and what that rounds away (Knuth); 0 if it is not finite."""
    s = a + b
    t = s - a
    rest = (a - (s - t)) + (b - t)
    return s, rest if np.isfinite(s) else 0.0


@inline
def unshift(n, shift, s1, s2):
    """Return mean, its rest and m2 from sums around shift (Chan et al. 1983, eq. 1.7).

    All of them are 0 where there is nothing, and shift is.
    """
    r = s1 / max(n, 1)
    m2 = s2 - s1 * r
    mean, rest = two_sum(shift, r)
    # Not max(): a NaN must stay.
    return mean, rest, 0.0 if m2 < 0.0 else m2


@inline
def unshift_all(n, mean, rest, m2):
    """Write mean, its rest and m2 where shift, s1 and s2 are, see unshift: rows (P,)."""
    for i in range(n.shape[0]):
        mean[i], rest[i], m2[i] = unshift(n[i], mean[i], rest[i], m2[i])


@inline
def merge_pair(n_a, mean_a, rest_a, m2_a, n_b, mean_b, rest_b, m2_b):
    """Return count, mean, its rest and m2 of a and b together (Chan et al. 1983, eq. 2.1).

    A mean has two parts, as deviations may be as small as what its rounding takes away.
    """
    if n_a == 0:
        return n_b, mean_b, rest_b, m2_b
    if n_b == 0:
        return n_a, mean_a, rest_a, m2_a
    n = n_a + n_b
    thread_range = n_b / n
    delta = (mean_b - mean_a) + (rest_b - rest_a)
    mean, rest = two_sum(mean_a, delta * thread_range)
    mean, rest = two_sum(mean, rest + rest_a)
    return n, mean, rest, m2_a + m2_b + delta * delta * (n_a * thread_range)


@inline
def not_below_one(vector):
    """Return 1 where an element is less, or NaN."""
    one = splat(1.0)
    return where(vector > one, vector, one)


@inline_contract
def invert_roots(var, eps, rstd):
    """Write 1 / sqrt(var + eps) to rstd (n,), and 0 where it was 0 or var + eps is 0."""
    for i in range(var.shape[0]):
        v = var[i] + eps
        rstd[i] = 0.0 if (rstd[i] == 0.0) | (v == 0.0) else 1.0 / np.sqrt(v)


@inline
def write_rstds(count, var, eps, rstd):
    """Write 1 / sqrt(var + eps), or 0 for an empty group or where var + eps is 0, to rstd."""
    for i in range(len(count)):
        rstd[i] = count[i]
    invert_roots(var, eps, rstd)


@inline
def write_rstds_of_runs(count, var, eps, first, last, step, k, run, rstd):
    """Write what write_rstds does, of ``run`` groups from k on of samples ``first`` to ``last``.

    Those of a sample are ``step`` groups; all of them are a single run.
    """
    n = (last - first) * run if run == step else run
    for at in range(0, (last - first) * run, max(n, 1)):
        i = first * step + k + at // run * step
        write_rstds(flat_slice(count, i, n), flat_slice(var, i, n), eps, flat_slice(rstd, at, n))


@inline
def write_statistics(g, n, mu, m2, center, count, mean, var):
    """Write those of group g; if not ``center``, var is the mean square, and the mean is 0."""
    v = m2 / max(n, 1)
    count[g] = n
    mean[g] = mu if center else 0.0
    var[g] = v if center else v + mu * mu


@inline_contract
def scale_shift(x, m, s, t):
    """Subtract m, the mean rounded to x's type, before anything else: exact at any offset."""
    return (x - m) * s + t


@inline
def store_scale_shift(mean, rstd, weight, bias, m, s, t, i, n):
    """Write m, s and t, see scale_shift, from vectors of float64."""
    scale, rounded = rstd * weight, narrow(mean, m)
    store(rounded, m, i, n)
    store(narrow(scale, s), s, i, n)
    store(narrow((widen(rounded) - mean) * scale + bias, t), t, i, n)


@inline
def round_coefficients(mean, scale, offset, like):
    """Return m, s and t, see scale_shift, in the type of an array."""
    m = like.dtype.type(mean)
    return m, like.dtype.type(scale), like.dtype.type((np.float64(m) - mean) * scale + offset)


@inline_contract
def input_gradient(dy, x, counts, a, r, m, b, c):
    """Return dx; only what counted in the statistics has a share in their gradient."""
    # r stays apart from b and c: at |x| = 1e30 their products would underflow in float32.
    direct = a * dy
    whole = direct + r * ((x - m) * b + c)
    if counts is None:
        return whole
    return where(counts, whole, direct)


@inline_contract
def element_gradient(dy, x, counts, weight, m, rstd, t, c0, c1):
    """Return dx = rstd * (dy * weight - c0 - x_hat * c1)."""
    g = dy * weight
    whole = rstd * (g - c0 - scale_shift(x, m, rstd, t) * c1)
    if counts is None:
        return whole
    return where(counts, whole, rstd * g)


@inline
def group_coefficients(count, mean, rstd, g0, g1, center, r, m, b, c):
    """Write r, m, b, c, see input_gradient, of n groups, to the first n elements of each.

    Their sums of dy * weight are g0, and g1 those of dy * weight * (x - mean).
    """
    for g in range(0, len(count), LANES):
        n_valid = min(LANES, len(count) - g)
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
    for c in range(mean.shape[0]):
        m[c] = mean[c]
        r[c] = rstd[c]
        t[c] = (np.float64(m[c]) - mean[c]) * rstd[c]


@inline_contract
def apply_weight(dys, weight, rstd, dxs):
    for i in range(dys.shape[0]):
        dxs[i] = rstd * (dys[i] * weight[i])
