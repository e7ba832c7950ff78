"""A kernel calls itself for each share of its tasks: each task is done once, with its arguments."""

import gc
import sys

import numba
import numpy as np
import pytest
from children import run
from numba import njit

from numbanorm.numba_ext import cache, jit, launch
from numbanorm.numba_ext import threads as numba_threads
from numbanorm.numba_ext.lines import allocate, release


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
        threads = in_threads(n_threads)
    fill(threads, None, 2.0, x, (1, 0.5), True, done, times)
    np.testing.assert_array_equal(times, 1)
    np.testing.assert_allclose(done, x[:, 1:].sum(1) * 2 + 0.5, atol=1e-12)


@jit.called
def double(x):
    return 2 * x


@njit(**jit.FLAGS)
def fill_doubled(threads, done):
    begin, end = launch.thread_range(threads, done.shape[0])
    for task in range(begin, end):
        done[task] = double(task)


def test_vectors_on_the_stack_are_in_one_page():
    # Else a kernel takes up to ten times as long in some processes.
    fill_doubled(launch.SERIAL, np.empty(2))
    (code,) = fill_doubled.inspect_llvm().values()
    assert "alignstack=64" in code
    (library,) = (compiled.library for compiled in double.overloads.values())
    assert "alignstack=64" in library.get_llvm_str()


@njit(**jit.FLAGS)
def fail(threads, bad, n, done):
    begin, end = launch.thread_range(threads, done.shape[0])
    for task in range(begin, end):
        if bad[task]:
            raise ValueError("a bad task")
        row = allocate(None, n[task], done.dtype)
        row[0] = done[task] + 1
        done[task] = row[0]
        release((row,))


def in_threads(n):
    return launch.in_threads(numba_threads.address_of_launch(), n)


@pytest.mark.parametrize("n_threads", [None, 1, 2, 3, 8])
@pytest.mark.parametrize("kind", [ValueError, MemoryError])
@pytest.mark.parametrize("tasks", [[3], [0], [9], [1, 4, 8], list(range(10))], ids=str)
def test_exception(tasks, kind, n_threads):
    threads = launch.SERIAL if n_threads is None else in_threads(n_threads)
    good, bad = np.zeros(10, np.bool_), np.zeros(10, np.bool_)
    few, n = np.ones(10, np.int64), np.ones(10, np.int64)
    done = np.zeros(10)
    if kind is ValueError:
        bad[tasks] = True
    else:
        n[tasks] = 1 << 58
    arrays = good, bad, few, n, done
    before = [sys.getrefcount(array) for array in arrays]
    message = {ValueError: "a bad task", MemoryError: "no memory for a kernel"}[kind]
    for _ in range(3):
        with pytest.raises(kind, match=message) as raised:
            fail(threads, bad, n, done)
        assert type(raised.value) is kind
        del raised
        assert (done[tasks] == 0).all()
        assert (done[: tasks[0]] > 0).all() or n_threads not in (None, 1)
        # The next call is as if there had been none.
        done[:] = 0
        fail(threads, good, few, done)
        np.testing.assert_array_equal(done, 1)
        done[:] = 0
    assert [sys.getrefcount(array) for array in arrays] == before


@pytest.mark.parametrize("layer", ["tbb", "omp", "workqueue"])
def test_exception_on_each_threading_layer(layer):
    # A process has one.
    if run(raise_in_threads, NUMBA_THREADING_LAYER=layer) == "cannot be loaded\n":
        assert layer != "workqueue"
        pytest.skip(f"Numba cannot load {layer}")


def raise_in_threads():
    try:
        numba.get_num_threads()
    except ValueError:
        print("cannot be loaded")
        return
    for kind in (ValueError, MemoryError):
        test_exception([3], kind, 4)


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
        keep(in_threads(2), x, kept)
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
