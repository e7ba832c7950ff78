"""Every compiled kernel, and their one set of flags.

Kernels see arrays of two or three axes and never an axis argument:

rows
    ``x`` is (P, L): piece p is the contiguous row p.
columns
    ``x`` is (A, L, C): piece (a, c) is a column; its neighbours in memory are other pieces.
elements
    ``x`` is (M, D): row i is a statistics group, and each of its D elements has a weight.

Statistics are taken around the first element of a piece and accumulated in float64, in one
pass. The shift bounds the cancellation (it is an element of the data, so m2 >= (x0 - mean)**2)
and makes constant data exact at any offset; sums in float64 still run at the speed of memory.

A long axis L is cut into parts, whose length depends on the shape alone, and each part has a
place of its own in the result: the bits do not depend on the number of threads.
"""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

# With the numpy error model no division is tested for zero, which would keep loops scalar.
FLAGS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
CONTRACT: dict[str, Any] = {"fastmath": {"contract"}, **FLAGS}
# Only sums may be reordered, so that they vectorise; NaN and Inf stay what they are.
REORDER: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, **FLAGS}


class Twins(NamedTuple):
    """One kernel compiled twice: for a single thread, and for all of them."""

    serial: Any
    parallel: Any


def _twins(kernel: Callable[..., None]) -> Twins:
    # The compile cache is keyed by the qualified name, hence a name for each twin.
    serial = types.FunctionType(kernel.__code__, kernel.__globals__, kernel.__name__ + "_serial")
    serial.__qualname__ = serial.__name__
    serial.__module__ = kernel.__module__
    return Twins(njit(**FLAGS)(serial), njit(parallel=True, **FLAGS)(kernel))


# ---------------------------------------------------------------------------------------------
# Moments
# ---------------------------------------------------------------------------------------------


@njit(**REORDER)
def _shifted_sums(xs, shift):
    """Sum x - shift and its square over xs (n,)."""
    s1, s2 = 0.0, 0.0
    for i in range(xs.shape[0]):
        d = np.float64(xs[i]) - shift
        s1 += d
        s2 += d * d
    return s1, s2


@njit(**REORDER)
def _masked_shifted_sums(xs, counts, shift):
    """Sum 1, x - shift and its square over xs (n,) where counts (n,) is True."""
    n, s1, s2 = 0, 0.0, 0.0
    for i in range(xs.shape[0]):
        d = np.float64(xs[i]) - shift if counts[i] else 0.0
        n += counts[i]
        s1 += d
        s2 += d * d
    return n, s1, s2


@njit(**FLAGS)
def _first(xs, counts):
    """Return the first element of xs (n,) that counts, or 0."""
    for i in range(xs.shape[0]):
        if counts[i]:
            return np.float64(xs[i])
    return 0.0


@njit(**FLAGS)
def _unshift(n, shift, s1, s2):
    """Return mean and m2 from sums around shift (Chan, Golub, LeVeque 1983, eq. 1.7)."""
    if n == 0:
        return 0.0, 0.0
    r = s1 / n
    m2 = s2 - s1 * r
    # Not max(): a NaN must stay.
    return shift + r, 0.0 if m2 < 0.0 else m2


@njit(**FLAGS)
def _row_moments(xs, counts):
    """Return count, mean and m2 of xs (n,), where counts (n,) is True unless it is None."""
    if counts is None:
        n = xs.shape[0]
        shift = np.float64(xs[0]) if n > 0 else 0.0
        s1, s2 = _shifted_sums(xs, shift)
    else:
        shift = _first(xs, counts)
        n, s1, s2 = _masked_shifted_sums(xs, counts, shift)
    mean, m2 = _unshift(n, shift, s1, s2)
    return n, mean, m2


@_twins
def moments_rows(x, mask, part, block, count, mean, m2):
    """Moments of each part: x, mask or None (P, L) -> count, mean, m2 (P, K)."""
    n_parts = mean.shape[1]
    length = x.shape[1]
    total = mean.shape[0] * n_parts
    for task in prange((total + block - 1) // block):
        for q in range(task * block, min(total, (task + 1) * block)):
            p = q // n_parts
            k = q - p * n_parts
            lo = k * part
            hi = min(length, lo + part)
            if mask is None:
                n, mu, s = _row_moments(x[p, lo:hi], None)
            else:
                n, mu, s = _row_moments(x[p, lo:hi], mask[p, lo:hi])
            count[p, k] = n
            mean[p, k] = mu
            m2[p, k] = s


@njit(**REORDER)
def _add_two_rows(xs, xs_next, shift, s1, s2):
    """Add two rows (n,) to the shifted sums of the columns, s1 and s2 (n,)."""
    # Two rows a call halve the traffic of s1 and s2; with three, the run-time overlap checks
    # exceed LLVM's limit of eight and the loop stays scalar.
    for c in range(s1.shape[0]):
        d = np.float64(xs[c]) - np.float64(shift[c])
        e = np.float64(xs_next[c]) - np.float64(shift[c])
        s1[c] += d + e
        s2[c] += d * d + e * e


@njit(**CONTRACT)
def _add_row(xs, shift, s1, s2):
    """Add a row (n,) to the shifted sums of the columns, s1 and s2 (n,)."""
    for c in range(s1.shape[0]):
        d = np.float64(xs[c]) - np.float64(shift[c])
        s1[c] += d
        s2[c] += d * d


@njit(**CONTRACT)
def _add_masked_row(xs, counts, shift, n, s1, s2):
    """Add the elements of a row (n,) that count to n, s1 and s2 (n,)."""
    # Two loops: see _add_two_rows about overlap checks.
    for c in range(s1.shape[0]):
        n[c] += counts[c]
    for c in range(s1.shape[0]):
        d = np.float64(xs[c]) - shift[c] if counts[c] else 0.0
        s1[c] += d
        s2[c] += d * d


@_twins
def moments_columns(x, mask, part, width, count, mean, m2):
    """Moments of each part: x, mask or None (A, L, C) -> count, mean, m2 (A, K, C)."""
    n_outer, n_parts, n_columns = mean.shape
    length = x.shape[1]
    n_blocks = (n_columns + width - 1) // width
    for task in prange(n_outer * n_parts * n_blocks):
        a = task // (n_parts * n_blocks)
        k = task // n_blocks - a * n_parts
        c0 = (task % n_blocks) * width
        c1 = min(n_columns, c0 + width)
        lo = k * part
        hi = min(length, lo + part)
        n = count[a, k, c0:c1]
        s1 = mean[a, k, c0:c1]
        s2 = m2[a, k, c0:c1]
        s1[:] = 0.0
        s2[:] = 0.0
        if mask is None:
            n[:] = hi - lo
            pair = hi - (hi - lo) % 2
            for i in range(lo, pair, 2):
                _add_two_rows(x[a, i, c0:c1], x[a, i + 1, c0:c1], x[a, lo, c0:c1], s1, s2)
            if pair < hi:
                _add_row(x[a, pair, c0:c1], x[a, lo, c0:c1], s1, s2)
            for c in range(c1 - c0):
                shift = np.float64(x[a, lo, c0 + c]) if hi > lo else 0.0
                s1[c], s2[c] = _unshift(hi - lo, shift, s1[c], s2[c])
        else:
            n[:] = 0
            shifts = np.empty(c1 - c0)
            for c in range(c1 - c0):
                shifts[c] = _first(x[a, lo:hi, c0 + c], mask[a, lo:hi, c0 + c])
            for i in range(lo, hi):
                _add_masked_row(x[a, i, c0:c1], mask[a, i, c0:c1], shifts, n, s1, s2)
            for c in range(c1 - c0):
                s1[c], s2[c] = _unshift(n[c], shifts[c], s1[c], s2[c])


@njit(**FLAGS)
def merge(count, mean, m2, merged_count, merged_mean, merged_m2):
    """Merge the middle axis: (A, K, B) -> (A, B), which start at 0 (Chan et al. 1983, eq. 2.1)."""
    for a in range(count.shape[0]):
        for k in range(count.shape[1]):
            for b in range(count.shape[2]):
                n = count[a, k, b]
                if n > 0:
                    total = merged_count[a, b] + n
                    delta = mean[a, k, b] - merged_mean[a, b]
                    if merged_count[a, b] == 0:
                        merged_mean[a, b] = mean[a, k, b]
                        merged_m2[a, b] = m2[a, k, b]
                    else:
                        merged_mean[a, b] += delta * (n / total)
                        merged_m2[a, b] += m2[a, k, b] + delta * delta * (
                            merged_count[a, b] * (n / total)
                        )
                    merged_count[a, b] = total


# ---------------------------------------------------------------------------------------------
# Apply: y = (x - m) * s + t, with one m, s and t for each piece
# ---------------------------------------------------------------------------------------------


@njit(**CONTRACT)
def _scale_shift(x, m, s, t):
    """Subtract m, the mean rounded to x's type, before anything else: exact at any offset."""
    return (x - m) * s + t


@njit(**CONTRACT)
def _apply(xs, m, s, t, ys):
    for i in range(xs.shape[0]):
        ys[i] = _scale_shift(xs[i], m, s, t)


# A loop of one array needs no test for overlap, which would send y over x to a scalar loop.
@njit(**CONTRACT)
def _apply_in_place(ys, m, s, t):
    for i in range(ys.shape[0]):
        ys[i] = _scale_shift(ys[i], m, s, t)


@_twins
def apply_rows(x, part, block, m, s, t, in_place, y):
    """Scale and shift each piece: x (P, L), m, s, t (P,) -> y (P, L), x itself if in_place."""
    n_rows, length = x.shape
    n_parts = max(1, (length + part - 1) // part)
    total = n_rows * n_parts
    for task in prange((total + block - 1) // block):
        for q in range(task * block, min(total, (task + 1) * block)):
            p = q // n_parts
            lo = (q - p * n_parts) * part
            hi = min(length, lo + part)
            if in_place:
                _apply_in_place(y[p, lo:hi], m[p], s[p], t[p])
            else:
                _apply(x[p, lo:hi], m[p], s[p], t[p], y[p, lo:hi])


@njit(**CONTRACT)
def _apply_row(xs, m, s, t, ys):
    for c in range(xs.shape[0]):
        ys[c] = _scale_shift(xs[c], m[c], s[c], t[c])


@njit(**CONTRACT)
def _apply_row_in_place(ys, m, s, t):
    for c in range(ys.shape[0]):
        ys[c] = _scale_shift(ys[c], m[c], s[c], t[c])


@_twins
def apply_columns(x, part, width, m, s, t, in_place, y):
    """Scale and shift each piece: x (A, L, C), m, s, t (A, C) -> y (A, L, C)."""
    n_outer, length, n_columns = x.shape
    n_parts = max(1, (length + part - 1) // part)
    n_blocks = (n_columns + width - 1) // width
    for task in prange(n_outer * n_parts * n_blocks):
        a = task // (n_parts * n_blocks)
        lo = (task // n_blocks - a * n_parts) * part
        hi = min(length, lo + part)
        c0 = (task % n_blocks) * width
        c1 = min(n_columns, c0 + width)
        for i in range(lo, hi):
            if in_place:
                _apply_row_in_place(y[a, i, c0:c1], m[a, c0:c1], s[a, c0:c1], t[a, c0:c1])
            else:
                _apply_row(x[a, i, c0:c1], m[a, c0:c1], s[a, c0:c1], t[a, c0:c1], y[a, i, c0:c1])


# ---------------------------------------------------------------------------------------------
# Backward: sums of dy and of dy * (x - mean) over each piece, then
# dx = a * dy + r * ((x - m) * b + c), with one a, r, b, c and m for each piece
# ---------------------------------------------------------------------------------------------


@njit(**CONTRACT)
def _enters(dy, x, counts):
    """Tell whether an element enters the sums of backward.

    A masked-out element is normalised too, so that its dy counts, unless dy is 0 or there is
    nothing finite to normalise: what stands there then must not turn the sums into NaN.
    """
    return counts or (dy != 0 and np.isfinite(x))


@njit(**REORDER)
def _gradient_sums(dys, xs, mean):
    """Sum dy and dy * (x - mean) over dys, xs (n,)."""
    s0, s1 = 0.0, 0.0
    for i in range(xs.shape[0]):
        d = np.float64(dys[i])
        s0 += d
        s1 += d * (np.float64(xs[i]) - mean)
    return s0, s1


@njit(**REORDER)
def _masked_gradient_sums(dys, xs, counts, mean):
    """Sum dy and dy * (x - mean) over dys, xs (n,) where they enter; counts (n,) is the mask."""
    s0, s1 = 0.0, 0.0
    for i in range(xs.shape[0]):
        enters = _enters(dys[i], xs[i], counts[i])
        d = np.float64(dys[i]) if enters else 0.0
        s0 += d
        s1 += d * (np.float64(xs[i]) - mean) if enters else 0.0
    return s0, s1


@_twins
def gradient_sums_rows(dy, x, mask, part, block, mean, s0, s1):
    """Sum dy and dy (x - mean): dy, x, mask or None (P, L), mean (P,) -> s0, s1 (P, K)."""
    n_parts = s0.shape[1]
    length = x.shape[1]
    total = s0.shape[0] * n_parts
    for task in prange((total + block - 1) // block):
        for q in range(task * block, min(total, (task + 1) * block)):
            p = q // n_parts
            k = q - p * n_parts
            lo = k * part
            hi = min(length, lo + part)
            if mask is None:
                sums = _gradient_sums(dy[p, lo:hi], x[p, lo:hi], mean[p])
            else:
                sums = _masked_gradient_sums(dy[p, lo:hi], x[p, lo:hi], mask[p, lo:hi], mean[p])
            s0[p, k] = sums[0]
            s1[p, k] = sums[1]


@njit(**CONTRACT)
def _add_gradient_row(dys, xs, mean, s0, s1):
    """Add a row (n,) to the columns' sums of dy and dy * (x - mean), s0 and s1 (n,)."""
    for c in range(s0.shape[0]):
        d = np.float64(dys[c])
        s0[c] += d
        s1[c] += d * (np.float64(xs[c]) - mean[c])


@njit(**CONTRACT)
def _add_masked_gradient_row(dys, xs, counts, mean, s0, s1):
    """Add the elements of a row (n,) that enter to s0 and s1 (n,)."""
    for c in range(s0.shape[0]):
        enters = _enters(dys[c], xs[c], counts[c])
        d = np.float64(dys[c]) if enters else 0.0
        s0[c] += d
        s1[c] += d * (np.float64(xs[c]) - mean[c]) if enters else 0.0


@_twins
def gradient_sums_columns(dy, x, mask, part, width, mean, s0, s1):
    """Sum dy and dy (x - mean): dy, x, mask or None (A, L, C), mean (A, C) -> s0, s1 (A, K, C)."""
    n_outer, n_parts, n_columns = s0.shape
    length = x.shape[1]
    n_blocks = (n_columns + width - 1) // width
    for task in prange(n_outer * n_parts * n_blocks):
        a = task // (n_parts * n_blocks)
        k = task // n_blocks - a * n_parts
        c0 = (task % n_blocks) * width
        c1 = min(n_columns, c0 + width)
        s0_row = s0[a, k, c0:c1]
        s1_row = s1[a, k, c0:c1]
        s0_row[:] = 0.0
        s1_row[:] = 0.0
        mu = mean[a, c0:c1]
        for i in range(k * part, min(length, (k + 1) * part)):
            if mask is None:
                _add_gradient_row(dy[a, i, c0:c1], x[a, i, c0:c1], mu, s0_row, s1_row)
            else:
                _add_masked_gradient_row(
                    dy[a, i, c0:c1], x[a, i, c0:c1], mask[a, i, c0:c1], mu, s0_row, s1_row
                )


@njit(**CONTRACT)
def _input_gradient(dy, x, counts, a, r, m, b, c):
    """Return dx; only what counted in the statistics has a share in their gradient."""
    # r stays apart from b and c: at |x| = 1e30 their products would underflow in float32.
    return a * dy + r * ((x - m) * b + c) if counts else a * dy


@njit(**CONTRACT)
def _backward(dys, xs, a, r, m, b, c, dxs):
    for i in range(xs.shape[0]):
        dxs[i] = _input_gradient(dys[i], xs[i], True, a, r, m, b, c)


@njit(**CONTRACT)
def _backward_in_place(dxs, xs, a, r, m, b, c):
    for i in range(xs.shape[0]):
        dxs[i] = _input_gradient(dxs[i], xs[i], True, a, r, m, b, c)


@njit(**CONTRACT)
def _masked_backward(dys, xs, counts, a, r, m, b, c, dxs):
    for i in range(xs.shape[0]):
        dxs[i] = _input_gradient(dys[i], xs[i], counts[i], a, r, m, b, c)


@_twins
def backward_rows(dy, x, mask, part, block, a, r, m, b, c, in_place, dx):
    """Write dx: dy, x, mask or None (P, L), a, r, m, b, c (P,) -> dx (P, L)."""
    n_rows, length = x.shape
    n_parts = max(1, (length + part - 1) // part)
    total = n_rows * n_parts
    for task in prange((total + block - 1) // block):
        for q in range(task * block, min(total, (task + 1) * block)):
            p = q // n_parts
            lo = (q - p * n_parts) * part
            hi = min(length, lo + part)
            xs = x[p, lo:hi]
            dxs = dx[p, lo:hi]
            if mask is not None:
                _masked_backward(
                    dy[p, lo:hi], xs, mask[p, lo:hi], a[p], r[p], m[p], b[p], c[p], dxs
                )
            elif in_place:
                _backward_in_place(dxs, xs, a[p], r[p], m[p], b[p], c[p])
            else:
                _backward(dy[p, lo:hi], xs, a[p], r[p], m[p], b[p], c[p], dxs)


@njit(**CONTRACT)
def _backward_row(dys, xs, a, r, m, b, c, dxs):
    for i in range(xs.shape[0]):
        dxs[i] = _input_gradient(dys[i], xs[i], True, a[i], r[i], m[i], b[i], c[i])


@njit(**CONTRACT)
def _backward_row_in_place(dxs, xs, a, r, m, b, c):
    for i in range(xs.shape[0]):
        dxs[i] = _input_gradient(dxs[i], xs[i], True, a[i], r[i], m[i], b[i], c[i])


@njit(**CONTRACT)
def _masked_backward_row(dys, xs, counts, a, r, m, b, c, dxs):
    for i in range(xs.shape[0]):
        dxs[i] = _input_gradient(dys[i], xs[i], counts[i], a[i], r[i], m[i], b[i], c[i])


@_twins
def backward_columns(dy, x, mask, part, width, a, r, m, b, c, in_place, dx):
    """Write dx: dy, x, mask or None (A, L, C), a, r, m, b, c (A, C) -> dx (A, L, C)."""
    n_outer, length, n_columns = x.shape
    n_parts = max(1, (length + part - 1) // part)
    n_blocks = (n_columns + width - 1) // width
    for task in prange(n_outer * n_parts * n_blocks):
        o = task // (n_parts * n_blocks)
        lo = (task // n_blocks - o * n_parts) * part
        hi = min(length, lo + part)
        c0 = (task % n_blocks) * width
        c1 = min(n_columns, c0 + width)
        ao, ro, mo = a[o, c0:c1], r[o, c0:c1], m[o, c0:c1]
        bo, co = b[o, c0:c1], c[o, c0:c1]
        for i in range(lo, hi):
            xs = x[o, i, c0:c1]
            dxs = dx[o, i, c0:c1]
            if mask is not None:
                _masked_backward_row(
                    dy[o, i, c0:c1], xs, mask[o, i, c0:c1], ao, ro, mo, bo, co, dxs
                )
            elif in_place:
                _backward_row_in_place(dxs, xs, ao, ro, mo, bo, co)
            else:
                _backward_row(dy[o, i, c0:c1], xs, ao, ro, mo, bo, co, dxs)


# ---------------------------------------------------------------------------------------------
# Elements: a row is a group and fits in cache, so that its statistics and its output are one
# pass over memory together: y = x_hat * weight + bias, x_hat = (x - m) * rstd + t
# ---------------------------------------------------------------------------------------------


@njit(**FLAGS)
def rstd_of(count, var, eps):
    """Return 1 / sqrt(var + eps), and 0 for an empty group or where var + eps is 0."""
    v = var + eps
    return 0.0 if count == 0 or v == 0.0 else 1.0 / np.sqrt(v)


@njit(**CONTRACT)
def _normalize_elements(xs, weight, bias, m, rstd, t, ys):
    for i in range(xs.shape[0]):
        ys[i] = _scale_shift(xs[i], m, rstd, t) * weight[i] + bias[i]


@njit(**CONTRACT)
def _normalize_elements_in_place(ys, weight, bias, m, rstd, t):
    for i in range(ys.shape[0]):
        ys[i] = _scale_shift(ys[i], m, rstd, t) * weight[i] + bias[i]


@_twins
def forward_elements(
    x, mask, weight, bias, eps, center, live, block, in_place, count, mean, var, y
):
    """Normalise rows: x, mask or None, y (M, D), weight, bias (D,), count, mean, var (M,).

    Statistics are taken and written if ``live``, else read.
    """
    n_rows = x.shape[0]
    for task in prange((n_rows + block - 1) // block):
        for i in range(task * block, min(n_rows, (task + 1) * block)):
            if live:
                if mask is None:
                    n, mu, m2 = _row_moments(x[i], None)
                else:
                    n, mu, m2 = _row_moments(x[i], mask[i])
                v = m2 / max(n, 1)
                count[i] = n
                mean[i] = mu if center else 0.0
                var[i] = v if center else v + mu * mu
            rstd = rstd_of(count[i], var[i], eps)
            m = y.dtype.type(mean[i])
            r = y.dtype.type(rstd)
            t = y.dtype.type((np.float64(m) - mean[i]) * rstd)
            if in_place:
                _normalize_elements_in_place(y[i], weight, bias, m, r, t)
            else:
                _normalize_elements(x[i], weight, bias, m, r, t, y[i])


@njit(**REORDER)
def _element_sums(dys, xs, weight, mean):
    """Sum g and g * (x - mean) with g = dy * weight over dys, xs, weight (n,)."""
    s0, s1 = 0.0, 0.0
    for i in range(xs.shape[0]):
        g = np.float64(dys[i]) * np.float64(weight[i])
        s0 += g
        s1 += g * (np.float64(xs[i]) - mean)
    return s0, s1


@njit(**REORDER)
def _masked_element_sums(dys, xs, counts, weight, mean):
    """Sum g and g * (x - mean) over dys, xs, weight (n,) where they enter."""
    s0, s1 = 0.0, 0.0
    for i in range(xs.shape[0]):
        enters = _enters(dys[i], xs[i], counts[i])
        g = np.float64(dys[i]) * np.float64(weight[i]) if enters else 0.0
        s0 += g
        s1 += g * (np.float64(xs[i]) - mean) if enters else 0.0
    return s0, s1


@njit(**CONTRACT)
def _add_parameter_gradients(dys, xs, m, rstd, t, dweight, dbias):
    """Add dy * x_hat and dy of one row (n,) to dweight and dbias (n,)."""
    for i in range(xs.shape[0]):
        dweight[i] += dys[i] * _scale_shift(xs[i], m, rstd, t)
        dbias[i] += dys[i]


@njit(**CONTRACT)
def _add_masked_parameter_gradients(dys, xs, counts, m, rstd, t, dweight, dbias):
    """Add dy * x_hat and dy of one row (n,) to dweight and dbias (n,) where they enter."""
    for i in range(xs.shape[0]):
        enters = _enters(dys[i], xs[i], counts[i])
        dweight[i] += dys[i] * _scale_shift(xs[i], m, rstd, t) if enters else 0.0
        dbias[i] += dys[i] if enters else 0.0


@njit(**CONTRACT)
def _element_gradient(dy, x, counts, weight, m, rstd, t, c0, c1):
    """Return dx = rstd * (dy * weight - c0 - x_hat * c1)."""
    g = dy * weight
    return rstd * (g - c0 - _scale_shift(x, m, rstd, t) * c1) if counts else rstd * g


@njit(**CONTRACT)
def _backward_elements(dys, xs, weight, m, rstd, t, c0, c1, dxs):
    for i in range(xs.shape[0]):
        dxs[i] = _element_gradient(dys[i], xs[i], True, weight[i], m, rstd, t, c0, c1)


@njit(**CONTRACT)
def _backward_elements_in_place(dxs, xs, weight, m, rstd, t, c0, c1):
    for i in range(xs.shape[0]):
        dxs[i] = _element_gradient(dxs[i], xs[i], True, weight[i], m, rstd, t, c0, c1)


@njit(**CONTRACT)
def _masked_backward_elements(dys, xs, counts, weight, m, rstd, t, c0, c1, dxs):
    for i in range(xs.shape[0]):
        dxs[i] = _element_gradient(dys[i], xs[i], counts[i], weight[i], m, rstd, t, c0, c1)


@_twins
def backward_elements(
    dy, x, mask, weight, eps, center, live, affine, in_place, count, mean, var, dx, dweight, dbias
):
    """Write dx and parameter gradients of rows: dy, x, mask or None, dx (M, D), weight (D,).

    ``count, mean, var`` (M,) are those of forward; ``dweight, dbias`` (T, D), one row for each
    of T blocks of rows, start at 0 and are left alone unless ``affine``.
    """
    n_rows = x.shape[0]
    n_blocks = dweight.shape[0]
    block = (n_rows + n_blocks - 1) // n_blocks
    for task in prange(n_blocks):
        for i in range(task * block, min(n_rows, (task + 1) * block)):
            rstd = rstd_of(count[i], var[i], eps)
            m = dx.dtype.type(mean[i])
            r = dx.dtype.type(rstd)
            t = dx.dtype.type((np.float64(m) - mean[i]) * rstd)
            s0, s1 = 0.0, 0.0
            # The parameters' gradients come first: dx may be dy.
            if mask is None:
                if affine:
                    _add_parameter_gradients(dy[i], x[i], m, r, t, dweight[task], dbias[task])
                if live:
                    s0, s1 = _element_sums(dy[i], x[i], weight, mean[i])
            else:
                if affine:
                    _add_masked_parameter_gradients(
                        dy[i], x[i], mask[i], m, r, t, dweight[task], dbias[task]
                    )
                if live:
                    s0, s1 = _masked_element_sums(dy[i], x[i], mask[i], weight, mean[i])
            n = max(count[i], 1)
            c0 = dx.dtype.type(s0 / n if center else 0.0)
            c1 = dx.dtype.type(s1 * rstd / n)
            if not live:
                _apply_weight(dy[i], weight, r, dx[i])
            elif mask is not None:
                _masked_backward_elements(dy[i], x[i], mask[i], weight, m, r, t, c0, c1, dx[i])
            elif in_place:
                _backward_elements_in_place(dx[i], x[i], weight, m, r, t, c0, c1)
            else:
                _backward_elements(dy[i], x[i], weight, m, r, t, c0, c1, dx[i])


@njit(**CONTRACT)
def _apply_weight(dys, weight, rstd, dxs):
    for i in range(dys.shape[0]):
        dxs[i] = rstd * (dys[i] * weight[i])
