"""A kernel calls itself for each share of its tasks: each task is done once, with its arguments."""

import gc
import sys

import numpy as np
import pytest
from numba import njit

from numbanorm.numba_ext import cache, jit, launch
from numbanorm.numba_ext import threads as numba_threads


@njit(**jit.FLAGS)
def fill(threads, nothing, scale, x, pair, flag, done, times):
    """Do what a kernel does, with arguments of all kinds."""
    begin, end = launch.thread_range(threads, done.shape[0])
    for task in range(begin, end):
        row = x[task, 1:]
        done[task] = (row.sum() * scale + pair[1]) if flag and nothing is None else -1.0
        times[task] += 1


@pytest.mark.parametrize("n_threads", [None, 1, 2, 3, 8])  # None: no shares
@pytest.mark.parametrize("n_tasks", [0, 1, 2, 7, 100])
def test_each_task_is_done_once(n_tasks, n_threads):
    x = np.random.default_rng(0).standard_normal((n_tasks, 5))
    done, times = np.full(n_tasks, np.nan), np.zeros(n_tasks, np.int64)
    if n_threads is None:
        threads = launch.SERIAL
    else:
        threads = launch.in_threads(numba_threads._address_of_launch(), n_threads)
    fill(threads, None, 2.0, x, (1, 0.5), True, done, times)
    np.testing.assert_array_equal(times, 1)
    np.testing.assert_allclose(done, x[:, 1:].sum(1) * 2 + 0.5, atol=1e-12)


@njit(**jit.FLAGS)
def fail(threads, done):
    begin, end = launch.thread_range(threads, done.shape[0])
    for task in range(begin, end):
        if task == 3:
            raise ValueError("task 3")
        done[task] = 1


def test_exception():
    with pytest.raises(ValueError, match="task 3"):
        fail(launch.SERIAL, np.zeros(10))


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_looked_for_while_compiling(enabled):
    def compile_it(fails):
        found.append(gc.isenabled())
        if fails:
            raise ValueError("no kernel")

    found = []
    (gc.enable if enabled else gc.disable)()
    try:
        cache._uncollected(compile_it)(False)
        with pytest.raises(ValueError, match="no kernel"):
            cache._uncollected(compile_it)(True)
        assert (found, gc.isenabled()) == ([False, False], enabled)
    finally:
        gc.enable()


@njit(**jit.FLAGS)
def keep(threads, x, kept):
    begin, end = launch.thread_range(threads, len(kept))
    for task in range(begin, end):
        kept[task] = x[task]


def test_arguments_are_owned_as_before():
    # No reference must be lost in the shares, nor one too many kept.
    x, kept = np.arange(10.0), np.zeros(10)
    before = sys.getrefcount(x), sys.getrefcount(kept)
    for _ in range(100):
        keep(launch.SERIAL, x, kept)
        keep(launch.in_threads(numba_threads._address_of_launch(), 2), x, kept)
    assert (sys.getrefcount(x), sys.getrefcount(kept)) == before
    np.testing.assert_array_equal(kept, x)


@njit(**jit.CALLED)
def root(x):
    if x < 0:
        raise ValueError("no root")
    return np.sqrt(x)


@njit(**jit.FLAGS)
def sum_of_roots(values):
    total = 0.0
    for value in values:
        total += root(value)
    return total


def test_what_is_inlined_has_no_machine_code():
    assert sum_of_roots(np.array([1.0, 4.0])) == 3
    with pytest.raises(ValueError, match="no root"):
        sum_of_roots(np.array([1.0, -4.0]))
    (compiled,) = root.overloads.values()
    with pytest.raises(RuntimeError, match="no compiled object"):
        compiled.library.serialize_using_object_code()
