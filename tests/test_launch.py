"""A kernel calls itself for each share of its tasks: each task is done once, with its arguments."""

import gc
import sys

import numpy as np
import pytest
from numba import njit
from numba.core.runtime import _nrt_python, rtsys

from numbanorm import _cache, _launch, _threads


@njit(nogil=True)
def fill(threads, nothing, scale, x, pair, flag, done, times):
    """Do what a kernel does, with arguments of all kinds."""
    begin, end = _launch.share(threads, done.shape[0])
    for task in range(begin, end):
        row = x[task, 1:]  # a view, whose owner is not counted
        done[task] = (row.sum() * scale + pair[1]) if flag and nothing is None else -1.0
        times[task] += 1


@pytest.mark.parametrize("n_threads", [None, 1, 2, 3, 8])  # None: no shares
@pytest.mark.parametrize("n_tasks", [0, 1, 2, 7, 100])
def test_each_task_is_done_once(n_tasks, n_threads):
    x = np.random.default_rng(0).standard_normal((n_tasks, 5))
    done, times = np.full(n_tasks, np.nan), np.zeros(n_tasks, np.int64)
    if n_threads is None:
        threads = _launch.SERIAL
    else:
        threads = _launch.in_threads(_threads._address_of_launch(), n_threads)
    fill(threads, None, 2.0, x, (1, 0.5), True, done, times)
    np.testing.assert_array_equal(times, 1)
    np.testing.assert_allclose(done, x[:, 1:].sum(1) * 2 + 0.5, atol=1e-12)


@njit(nogil=True)
def fail(threads, done):
    begin, end = _launch.share(threads, done.shape[0])
    for task in range(begin, end):
        if task == 3:
            raise ValueError("task 3")
        done[task] = 1


def test_exception():
    with pytest.raises(ValueError, match="task 3"):
        fail(_launch.SERIAL, np.zeros(10))


@njit(nogil=True)
def sums_of_rows(x, nothing, n):
    """Sum up the rows of x and those of an array of this function, by way of lent arrays."""
    own = (np.ones((x.shape[0], n)),)
    x, nothing = _launch.lend((x, nothing))
    (ones,) = _launch.lend(own)
    sums = np.empty(x.shape[0])
    for i in range(x.shape[0]):
        row, of_ones = x[i], ones[i]
        sums[i] = row.sum() + of_ones.sum()
    _launch.keep(own)
    return sums


@pytest.fixture
def counting():
    """Have Numba count what it allocates."""
    _nrt_python.memsys_enable_stats()
    yield
    _nrt_python.memsys_disable_stats()


@pytest.mark.usefixtures("counting")
def test_lent_arrays():
    x = np.arange(300.0).reshape(100, 3)
    before = sys.getrefcount(x), rtsys.get_allocation_stats()
    for _ in range(10):
        np.testing.assert_array_equal(sums_of_rows(x, None, 1000), x.sum(1) + 1000)
    after = rtsys.get_allocation_stats()
    assert sys.getrefcount(x) == before[0]
    assert after.alloc - before[1].alloc == after.free - before[1].free > 0


@njit
def add_up(arrays, nothing):
    """Write the sum of the first two arrays to the third; return whether nothing is None twice."""
    a, b, total = _launch.split(arrays, 3)
    first, second = _launch.split(nothing, 2)
    for i in range(total.shape[0]):
        for j in range(total.shape[1]):
            total[i, j] = a[i, j] + b[i, j]
    return first is None and second is None


@pytest.mark.usefixtures("counting")
def test_the_arrays_of_one():
    arrays = np.arange(24.0).reshape(4, 2, 3)
    expected = [arrays[0], arrays[1], arrays[0] + arrays[1], arrays[3]]
    before = sys.getrefcount(arrays)
    assert add_up(arrays, None)
    assert sys.getrefcount(arrays) == before
    np.testing.assert_array_equal(arrays, expected)


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_looked_for_while_compiling(enabled):
    def compile_it(fails):
        found.append(gc.isenabled())
        if fails:
            raise ValueError("no kernel")

    found = []
    (gc.enable if enabled else gc.disable)()
    try:
        _cache._uncollected(compile_it)(False)
        with pytest.raises(ValueError, match="no kernel"):
            _cache._uncollected(compile_it)(True)
        assert (found, gc.isenabled()) == ([False, False], enabled)
    finally:
        gc.enable()


@njit(nogil=True)
def keep(threads, x, kept):
    begin, end = _launch.share(threads, len(kept))
    for task in range(begin, end):
        kept[task] = x[task]


def test_arguments_are_owned_as_before():
    # References are not counted in the shares: none must be lost, nor one too many kept.
    x, kept = np.arange(10.0), np.zeros(10)
    before = sys.getrefcount(x), sys.getrefcount(kept)
    for _ in range(100):
        keep(_launch.SERIAL, x, kept)
        keep(_launch.in_threads(_threads._address_of_launch(), 2), x, kept)
    assert (sys.getrefcount(x), sys.getrefcount(kept)) == before
    np.testing.assert_array_equal(kept, x)
