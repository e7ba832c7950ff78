"""Moments of files in memory: as of the array, and the process does not grow by the file's size."""

import mmap
import resource
import sys

import numpy as np
import pytest
from cases import assert_close, normal
from children import run

import numbanorm

SHAPE = 4, 6, 5, 7
AXES = [None, 0, (0, 2, 3), (1, 3), 3, ()]


def memory_map(path, x, mode="r", order="C"):
    """Return the file of x, mapped."""
    np.memmap(path, x.dtype, "w+", shape=x.shape, order=order)[...] = x
    return np.memmap(path, x.dtype, mode, shape=x.shape, order=order)


VIEWS = {
    "whole": lambda x: x,
    "array": np.asarray,
    "part": lambda x: x[1:, ::2, :, ::-1],
    "transposed": lambda x: x.transpose(2, 0, 3, 1),
    "broadcast": lambda x: np.broadcast_to(x[:1], (3, *x.shape[1:])),
    "one element": lambda x: x[:1, :1, :1, :1],
    "none": lambda x: x[:0],
}


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("part", [100, 1 << 20])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_in_parts(axes, view, part, masked, tmp_path):
    x = normal(*SHAPE, dtype=np.float32, offset=1e3)
    for order in "C", "F":
        mapped = view(memory_map(tmp_path / "x", x, order=order))
        mask = np.arange(mapped.shape[-1]) % 3 > 0 if masked else None
        expected = numbanorm.moments(view(x), axes, mask=mask)
        with numbanorm.tuning.use(mapped_part=part):
            found = numbanorm.moments(mapped, axes, mask=mask)
        assert type(found.count) is type(expected.count)
        np.testing.assert_array_equal(found.count, expected.count)
        assert found.mean.shape == expected.mean.shape
        assert_close(found.mean, expected.mean)
        assert_close(found.m2, expected.m2, scale=1)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_other_byte_orders_and_places(dtype, tmp_path):
    x = normal(5, 6).astype(dtype)
    (tmp_path / "x").write_bytes(b"abc" + x.tobytes())
    mapped = np.memmap(tmp_path / "x", dtype, "r", offset=3, shape=x.shape)
    with numbanorm.tuning.use(mapped_part=50):
        found = numbanorm.moments(mapped, 0)
    assert_close(found.mean, numbanorm.moments(x, 0).mean)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_what_was_written_stays(mode, tmp_path):
    x = normal(40, 1024)
    mapped = memory_map(tmp_path / "x", x, mode)
    if mode != "r":
        mapped[3] = 5
    with numbanorm.tuning.use(mapped_part=1 << 12):
        before = mapped.copy()
        numbanorm.moments(mapped, 0)
        np.testing.assert_array_equal(mapped, before)


def test_errors(tmp_path):
    x = memory_map(tmp_path / "x", normal(3, 4))
    with pytest.raises(ValueError, match="axes: axis 2"):
        numbanorm.moments(x, 2)
    with pytest.raises(ValueError, match="mask"):
        numbanorm.moments(x, mask=np.ones(3, bool))
    with pytest.raises(TypeError, match="x: "):
        numbanorm.moments(memory_map(tmp_path / "c", normal(3).astype(complex)))


# -- Memory ----------------------------------------------------------------------------------------

ROWS, COLUMNS = 3 << 11, 1 << 12
SIZE = ROWS * COLUMNS * 4  # 96 MiB
PART = SIZE // 16


def memory(name):
    """Return what Linux says of this process's memory, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) << 10


def check_memory(path, axes, view):
    x = np.memmap(path, np.float32, "r", shape=(ROWS, COLUMNS))
    x = {"whole": x, "part": x[:, :-1], "transposed": x.T, "swapped": x.view(">f4")}[view]
    mask = np.arange(x.shape[-1]) % 3 > 0
    with numbanorm.tuning.use(mapped_part=PART):
        for counts in None, mask:
            few = None if counts is None else counts[:4]
            numbanorm.moments(x[:4, :4], axes, mask=few)  # compiles
        before = memory("VmHWM:")
        # No room for a copy, nor for a mask of each element.
        limit = memory("VmSize:") + SIZE // 4
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for counts in None, mask:
            numbanorm.moments(x, axes, mask=counts)
    grown = memory("VmHWM:") - before
    assert grown < SIZE // 3, f"{grown >> 20} MiB of {SIZE >> 20}"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "x"
    with path.open("wb") as opened:
        for seed in range(16):
            opened.write(normal(PART // 4, seed=seed, dtype=np.float32).tobytes())
    return str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how much memory there is")
@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="memory cannot be given back")
@pytest.mark.parametrize(
    ("view", "axes"),
    [("whole", None), ("whole", 0), ("part", 1), ("transposed", 0), ("swapped", None)],
)
def test_the_process_does_not_grow_by_the_file(file, view, axes):
    run(check_memory, file, axes, view)
