"""Lines of memory: where they begin, and that what streaming stores write arrives."""

import gc
import os
import tracemalloc

import numpy as np
import pytest
from cases import CASES, normal
from numba import njit

from numbanorm.numba_ext.lines import (
    LINE,
    allocate,
    fence,
    release,
    stream,
    to_next_line,
)
from numbanorm.numba_ext.vectors import load
from numbanorm.tuning import CACHE_PER_CORE, LANES, cache_bytes


@njit
def write(x, y, at):
    """Write x to y from ``at`` on, as far as there are whole vectors; return where they are."""
    begin = to_next_line(y, at)
    end = begin
    while end + LANES <= x.shape[0]:
        stream(load(x, end, None), y, at + end)
        end += LANES
    fence()
    return begin, end


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_streaming_stores(dtype, start):
    x = np.arange(100, dtype=dtype)
    y = np.full(200, -1, dtype)[start:]
    begin, end = write(x, y, 3)
    assert 0 <= begin < LINE // x.itemsize
    assert 100 - LANES < end <= 100
    assert (y.ctypes.data + (3 + begin) * x.itemsize) % LINE == 0
    np.testing.assert_array_equal(y[3 + begin : 3 + end], x[begin:end])
    np.testing.assert_array_equal(y[: 3 + begin], -1)
    np.testing.assert_array_equal(y[3 + end :], -1)


@pytest.fixture
def sizes(tmp_path, monkeypatch):
    """Let the operating system know of these caches alone."""

    def write_files(texts):
        for i, text in enumerate(texts):
            (tmp_path / f"index{i}").mkdir()
            (tmp_path / f"index{i}" / "size").write_text(text)
        monkeypatch.setattr("numbanorm.tuning.CACHES", tmp_path)

    return write_files


@pytest.mark.parametrize(
    ("texts", "size"),
    [
        (["48K\n", "1024K\n", "32768K\n"], 32 << 20),
        (["48K\n", "2048K\n", "491520K\n"], 4 * CACHE_PER_CORE),
        (["0K\n", "0K\n", "0K\n"], CACHE_PER_CORE),
        (["48K\n", "1024K\n"], CACHE_PER_CORE),
        (["what\n", "32768K\n"], 32 << 20),
        (["what\n"], CACHE_PER_CORE),
        ([], CACHE_PER_CORE),
    ],
)
def test_cache_size(sizes, monkeypatch, texts, size):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.delenv("NUMBANORM_CACHE_BYTES", raising=False)
    sizes(texts)
    assert cache_bytes() == size


def test_cache_size_of_the_environment(sizes, monkeypatch):
    sizes(["32768K\n"])
    for given in (0, 5 << 20, 1 << 40):
        monkeypatch.setenv("NUMBANORM_CACHE_BYTES", str(given))
        assert cache_bytes() == given
    for given in ("never", "-1", "1e9"):
        monkeypatch.setenv("NUMBANORM_CACHE_BYTES", given)
        with pytest.warns(RuntimeWarning, match=f"a number of bytes is needed, got '{given}'"):
            assert cache_bytes() == min(32 << 20, (os.cpu_count() or 1) * CACHE_PER_CORE)


@njit(_nrt=False)
def place(n_rows, n, like, found):
    """Write where the rows of new memory begin, and sum up what is written to them."""
    rows, row = allocate(n_rows, n, like.dtype), allocate(None, n, like.dtype)
    for k in range(n_rows):
        found[k] = to_next_line(rows[k], 0)
        for i in range(n):
            rows[k, i] = k
    found[n_rows] = to_next_line(row, 0)
    for i in range(n):
        row[i] = n_rows
    total = 0
    for k in range(n_rows):
        for i in range(n):
            total += rows[k, i]
    for i in range(row.size):
        total += row[i]
    size = rows.shape[0], rows.shape[1], row.size
    release((rows, row))
    return total, size


def memory_of(function):
    """Return the bytes that a call allocates at most, and those that it keeps."""
    tracemalloc.start()
    try:
        function()  # what it replaces is traced, too, from now on
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        function()
        gc.collect()
        after, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return most - before, after - before


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 16, 17, 1000])
def test_rows_begin_where_lines_do(dtype, n):
    found = np.full(4, -1)
    args = 3, n, np.zeros(1, dtype), found
    total, (n_rows, width, length) = place(*args)
    size = 4 * n * np.dtype(dtype).itemsize
    most, kept = memory_of(lambda: [place(*args) for _ in range(500)].clear())
    assert most >= size
    assert kept < 500 * 2 * LINE
    np.testing.assert_array_equal(found, 0)
    assert total == 6 * n
    assert (n_rows, length) == (3, n)
    assert n <= width < n + LINE // np.dtype(dtype).itemsize


@njit(_nrt=False)
def ask_for(n, x):
    row = allocate(None, n, x.dtype)
    row[0] = x[0]
    x[1] = row[0]
    release((row,))


def test_no_memory():
    x = np.array([1.0, 2.0])
    with pytest.raises(MemoryError, match="no memory for a kernel"):
        ask_for(1 << 58, x)
    ask_for(1, x)
    np.testing.assert_array_equal(x, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernels_release_what_they_allocate(case):
    layer, x = case.layer(), case.input()
    masks = None, normal(*case.shape) < 0.5

    def run(n):
        for mask in n * masks:
            for training in (True, False):
                layer.train(training)(x, mask=mask)
                layer.backward(x)

    run(1)  # compiles, or reads what was compiled
    _, kept = memory_of(lambda: run(25))
    # A call that keeps anything keeps two lines at least.
    assert kept < 100 * 2 * LINE
