"""Views: parts of arrays, to which no references are counted."""

import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
from numba import njit

from numbanorm.numba_ext.vectors import load, total
from numbanorm.numba_ext.views import flat_slice, item, member, unstack


@njit
def copy(x, i, n, result):
    """Copy n elements of x from the i-th in memory on; return how many these are."""
    seen = flat_slice(x, i, n)
    for k in range(seen.size):
        result[k] = seen[k]
    return seen.size


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_])
def test_a_stretch_of_memory(dtype):
    x = np.arange(24).astype(dtype).reshape(2, 3, 4)
    result, before = np.zeros(7, dtype), sys.getrefcount(x)
    assert copy(x, 5, 7, result) == 7
    np.testing.assert_array_equal(result, x.reshape(-1)[5:12])
    assert sys.getrefcount(x) == before


@njit
def write(x, value):
    seen = flat_slice(x, 2, 3)
    seen[0] = value
    seen[1] += value


@pytest.mark.parametrize("value", [2, 2.5, True])
def test_what_is_written_is_converted(value):
    x = np.ones(6, np.float32)
    write(x, value)
    np.testing.assert_array_equal(x, [1, 1, value, 1 + value, 1, 1])


@njit
def see_nothing(x, i, n):
    return flat_slice(x, i, n) is None and member(x, 1) is None


def test_a_stretch_of_nothing():
    assert see_nothing(None, 3, 4)


@njit
def add_up(arrays, nothing):
    """Write the sum of the first two arrays to the third; return whether nothing is None twice."""
    a, b, c = unstack(arrays, 3)
    first, second = unstack(nothing, 2)
    for i in range(c.size):
        c[i] = a[i] + b[i]
    return first is None and second is None


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3), (4, 1, 3, 2)])
def test_the_arrays_of_one(shape):
    arrays = np.arange(24.0).reshape(shape)
    expected = [arrays[0], arrays[1], arrays[0] + arrays[1], arrays[3]]
    before = sys.getrefcount(arrays)
    assert add_up(arrays, None)
    assert sys.getrefcount(arrays) == before
    np.testing.assert_array_equal(arrays, expected)


class Pair(NamedTuple):
    first: Any
    second: Any


@njit
def numbers_of(x, i):
    a, b = unstack(x, 2)
    numbers = item(Pair(a, b), i)
    return numbers.first, numbers.second, item(Pair(a, None), i).second is None


@njit
def totals_of(x):
    """Return the sums of vectors of a row, and of a number."""
    (a,) = unstack(x, 1)
    vectors = load(Pair(a, 2.0), 0, None)
    return total(vectors.first), total(vectors.second), load(Pair(a, None), 0, 3).second is None


def test_records_of_rows():
    x = np.arange(32.0).reshape(2, 16)
    assert numbers_of(x, 3) == (3.0, 19.0, True)
    assert totals_of(x) == (x[0].sum(), 32.0, True)
