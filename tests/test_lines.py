"""Lines of memory: where they begin, and that what is stored past the caches arrives."""

import numpy as np
import pytest
from numba import njit

from numbanorm._lines import LINE, cache_size, fence, line_size, store_line, to_next_line


@njit
def write(x, y, at):
    """Write x to y from ``at`` on, as far as there are whole lines; return where they are."""
    begin, line = to_next_line(y, at), line_size(y)
    end = begin
    while end + line <= x.shape[0]:
        store_line(y, at + end, x, end)
        end += line
    fence()
    return begin, end


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_whole_lines(dtype, start):
    x = np.arange(100, dtype=dtype)
    y = np.full(200, -1, dtype)[start:]
    begin, end = write(x, y, 3)
    line = LINE // x.itemsize
    assert 0 <= begin < line
    assert 100 - line < end <= 100
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
        monkeypatch.setattr("numbanorm._lines.CACHES", tmp_path)
        cache_size.cache_clear()

    yield write_files
    cache_size.cache_clear()


@pytest.mark.parametrize(
    ("texts", "size"),
    [(["48K\n", "1024K\n", "32768K\n"], 32 << 20), (["what\n"], None), ([], None)],
)
def test_cache_size(sizes, texts, size):
    sizes(texts)
    assert cache_size() == size
