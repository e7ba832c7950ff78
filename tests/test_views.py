"""Views: parts of arrays, to which no references are counted."""

import sys

import numpy as np
import pytest
from numba import njit

from numbanorm.numba_ext.views import flat_slice, unstack


@njit
def see(x, i, n):
    seen = flat_slice(x, i, n)
    return seen.sum(), seen.shape[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_])
def test_a_stretch_of_memory(dtype):
    x = np.arange(24).astype(dtype).reshape(2, 3, 4)
    before = sys.getrefcount(x)
    assert see(x, 5, 7) == (x.reshape(-1)[5:12].sum(), 7)
    assert sys.getrefcount(x) == before


@njit
def see_nothing(x, i, n):
    return flat_slice(x, i, n) is None


def test_a_stretch_of_nothing():
    assert see_nothing(None, 3, 4)


@njit
def add_up(arrays, nothing):
    """Write the sum of the first two arrays to the third; return whether nothing is None twice."""
    a, b, total = unstack(arrays, 3)
    first, second = unstack(nothing, 2)
    for i in range(total.shape[0]):
        for j in range(total.shape[1]):
            total[i, j] = a[i, j] + b[i, j]
    return first is None and second is None


def test_the_arrays_of_one():
    arrays = np.arange(24.0).reshape(4, 2, 3)
    expected = [arrays[0], arrays[1], arrays[0] + arrays[1], arrays[3]]
    before = sys.getrefcount(arrays)
    assert add_up(arrays, None)
    assert sys.getrefcount(arrays) == before
    np.testing.assert_array_equal(arrays, expected)


@njit
def sizes(x, n):
    part = flat_slice(x, 1, n)
    (row,) = unstack(x, 1)
    return part.size, part.itemsize, part.strides[0], row.size, row.itemsize, row.strides[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_])
def test_sizes(dtype):
    x = np.zeros((2, 5), dtype)
    assert sizes(x, 3) == (3, x.itemsize, x.itemsize, 5, x.itemsize, x.itemsize)
