"""Vectors: what is loaded, calculated and stored is what NumPy says, and nothing else changes."""

import ctypes
import mmap
import sys

import numpy as np
import pytest
from cases import normal
from numba import njit

from numbanorm.numba_ext.vectors import (
    LANES,
    is_finite,
    leading,
    load,
    narrow,
    prefetch,
    splat,
    store,
    total,
    where,
    widen,
)

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@njit
def calculate(x, y, at, n, scale):
    """Write (x - scale) * x + x to y[at] and after it; return the sum of x: rows (n,)."""
    whole = n // LANES * LANES
    s = widen(load(x, whole, n - whole))
    for i in range(0, whole, LANES):
        prefetch(x, i + 1000)
        v = load(x, i, None)
        s += widen(v)
        store((v - splat(scale)) * v + v, y, at + i, None)
    v = load(x, whole, n - whole)
    store((v - splat(scale)) * v + v, y, at + whole, n - whole)
    return total(s)


@DTYPES
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 40])
def test_a_loop_over_any_number_of_elements(n, dtype):
    x, y = normal(n, dtype=dtype), np.full(100, 7, dtype)
    found = calculate(x, y, 3, n, dtype(0.5))
    np.testing.assert_allclose(found, x.astype(float).sum(), rtol=1e-12, atol=1e-12)
    # A product and a sum may be rounded together.
    tolerance = 8 * np.finfo(dtype).eps
    np.testing.assert_allclose(y[3 : 3 + n], (x - dtype(0.5)) * x + x, tolerance, tolerance)
    np.testing.assert_array_equal(y[:3], 7)
    np.testing.assert_array_equal(y[3 + n :], 7)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to guard memory")
@DTYPES
@pytest.mark.parametrize("n", [1, 15, 17])
def test_nothing_is_read_after_the_last_element(n, dtype):
    # Nobody may read the page behind x: that would end the process.
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    x = np.frombuffer(memory, dtype, mmap.PAGESIZE // np.dtype(dtype).itemsize)[-n:]
    x[:] = 2
    end = ctypes.c_void_p(x.ctypes.data + x.nbytes)
    assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    assert calculate(x, np.zeros(n, dtype), 0, n, dtype(0)) == 2 * n


@njit
def choose(x, mask, y):
    """Write x to y where mask is True or x is finite, else 7: rows (n,)."""
    n, seven = x.shape[0], splat(x.dtype.type(7))
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        v, counts = load(x, i, None), load(mask, i, None)
        store(where(counts | is_finite(v), v, seven), y, i, None)
    v, counts = load(x, whole, n - whole), load(mask, whole, n - whole)
    store(where(counts | is_finite(v), v, seven), y, whole, n - whole)


@DTYPES
def test_choices(dtype):
    values = [0, -0.0, 1, -2, np.nan, np.inf, -np.inf, np.finfo(dtype).tiny / 2]
    x = np.repeat(np.array(values, dtype), 5)
    mask = np.arange(x.size) % 3 == 0
    y = np.empty_like(x)
    choose(x, mask, y)
    np.testing.assert_array_equal(y, np.where(mask | np.isfinite(x), x, dtype(7)))


@njit
def plus(v, w):
    if w is None:
        return v
    return v + w


@njit
def add(x, y, target):
    """Write x + y, or x if that is None, to target (n,); either may be a number or a row (n,)."""
    n = target.shape[0]
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        prefetch(y, i + 1000)
        store(plus(load(x, i, None), load(y, i, None)), target, i, None)
    v, w = load(x, whole, n - whole), load(y, whole, n - whole)
    store(plus(v, w), target, whole, n - whole)


@DTYPES
def test_a_number_is_a_vector_of_it_and_none_is_none(dtype):
    row, target = normal(37, dtype=dtype), np.empty(37, dtype)
    for x, y, expected in (
        (row, dtype(2), row + 2),
        (dtype(2), row, row + 2),
        (row, None, row),
        (dtype(2), None, np.full(37, dtype(2))),
    ):
        add(x, y, target)
        np.testing.assert_array_equal(target, expected)


@njit
def mark(n, y):
    store(where(leading(n), splat(1.0), splat(2.0)), y, 0, None)


@pytest.mark.parametrize("n", [0, 1, 15, 16])
def test_the_leading_elements(n):
    y = np.empty(LANES)
    mark(n, y)
    np.testing.assert_array_equal(y, np.where(np.arange(LANES) < n, 1, 2))


@njit
def divide(x, y, narrow_to):
    """Write x / y where x is larger, else x in another type, to narrow_to: rows (n,)."""
    v, w = load(x, 0, None), load(y, 0, None)
    store(narrow(where(v > w, v / w, v), narrow_to), narrow_to, 0, None)


@DTYPES
def test_quotients_where_larger(dtype):
    x, y = np.full(LANES, 1 / 3), np.repeat([0.0, -0.0, 0.25, 1 / 3, 7, np.nan, np.inf, -np.inf], 2)
    x[1], found = np.nan, np.empty(LANES, dtype)
    divide(x, y, found)
    with np.errstate(divide="ignore"):
        expected = np.where(x > y, x / y, x)
    np.testing.assert_array_equal(found, expected.astype(dtype))
