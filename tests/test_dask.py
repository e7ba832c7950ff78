"""numbanorm.dask: the moments of a Dask array are those of the array."""

import importlib.metadata
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from cases import assert_close, normal
from children import run

import numbanorm

dask = pytest.importorskip("dask", reason="Dask is not installed: pip install 'dask[array]'")
da = pytest.importorskip("dask.array")
ours = pytest.importorskip("numbanorm.dask")

SHAPE, CHUNKS = (7, 5, 6), (3, 2, 4)
AXES = [None, 0, (0, 2), 1, -1, (0, 1, 2), ()]
RANDOM = np.random.default_rng(0).random(SHAPE) < 0.6
MASKS = {
    "none": None,
    "NumPy": RANDOM,
    "Dask, other chunks": da.from_array(RANDOM, chunks=(2, 5, 3)),
    "broadcast": RANDOM[0],
    "broadcast inside": da.from_array(RANDOM[:, :1, :1], chunks=1),
    "nothing": np.array(False),
}


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_are_those_of_the_array(axes, mask, keepdims, offset):
    x = normal(*SHAPE, offset=offset)
    found = ours.moments(da.from_array(x, chunks=CHUNKS), axes, mask=mask, keepdims=keepdims)
    numpy_mask = None if mask is None else np.asarray(mask)
    expected = numbanorm.moments(x, axes, mask=numpy_mask, keepdims=keepdims)
    assert type(found.count) is type(expected.count)
    np.testing.assert_array_equal(found.count, expected.count)
    assert_close(found.mean, expected.mean)
    assert_close(found.m2, expected.m2, scale=1)


def test_more_digits_than_dask():
    x = (1e6 + np.arange(40_000) % 3).astype(np.float32)
    array = da.from_array(x, chunks=700)
    values = [int(v) for v in x]
    n, total = len(values), sum(values)
    exact = Fraction(sum(v * v for v in values), n) - Fraction(total, n) ** 2
    found = float(ours.moments(array).var())
    assert abs(Fraction(found) - exact) < 1e-14
    assert abs(Fraction(float(array.var().compute())) - exact) > 1e-9


def test_unknown_chunk_sizes():
    x = normal(20, 3)
    array = da.from_array(x, chunks=(6, 2))
    found = ours.moments(array[array[:, 0] > 0], 0)
    expected = numbanorm.moments(x[x[:, 0] > 0], 0)
    assert found.count == expected.count
    assert_close(found.mean, expected.mean)
    assert_close(found.m2, expected.m2)


def test_no_elements_and_no_axes():
    empty = ours.moments(da.zeros((0, 3)), 0)
    assert (empty.count, empty.mean.tolist(), empty.m2.tolist()) == (0, [0] * 3, [0] * 3)
    scalar = ours.moments(da.from_array(np.array(3.0)))
    assert (scalar.count, scalar.mean.shape, float(scalar.mean)) == (1, (), 3)


def test_moments_merge_with_others():
    x = normal(30)
    found = ours.moments(da.from_array(x[:20], chunks=7)) + numbanorm.moments(x[20:])
    assert_close(found.var(), x.var())


def test_each_chunk_is_read_once():
    read = []

    def chunk(block_info=None):
        read.append(block_info[None]["chunk-location"])
        return np.ones(block_info[None]["chunk-shape"])

    array = da.map_blocks(chunk, chunks=((4,) * 9, (3,) * 2), dtype=float, meta=np.ones((0, 0)))
    assert ours.moments(array, 0).count == 36
    assert len(read) == len(set(read)) == 18


def test_many_chunks_merge_as_a_tree():
    # Nothing waits for more than a few others.
    most = []

    def started(graph, state):
        most.extend(len(before) for before in state["dependencies"].values())

    with dask.callbacks.Callback(start_state=started), dask.config.set(scheduler="synchronous"):
        assert ours.moments(da.ones(1000, chunks=1)).count == 1000
    assert len(most) > 1000
    assert max(most) <= 16


@pytest.mark.parametrize(
    ("x", "options", "error", "text"),
    [
        (np.ones(3), {}, TypeError, r"x: a Dask array is needed, got ndarray"),
        (da.from_array(np.array([None]), chunks=1), {}, TypeError, "x: "),
        (da.ones(3), {"axes": 1}, ValueError, "axes: axis 1 is out of range"),
        (da.ones(3), {"axes": "a"}, TypeError, "axes"),
        (da.ones(3), {"mask": np.ones(3)}, TypeError, "mask: an array of bool"),
        (da.ones(3), {"mask": da.ones(3)}, TypeError, "mask: an array of bool"),
        (da.ones(3), {"mask": da.ones(4) > 0}, ValueError, "mask: a shape that broadcasts"),
        (da.ones(3), {"mask": np.ones((2, 3), bool)}, ValueError, "mask: a shape that broadcasts"),
    ],
)
def test_errors_come_before_anything_is_computed(x, options, error, text):
    def never(*args, **kwargs):
        raise AssertionError("computed")

    with dask.config.set(scheduler=never), pytest.raises(error, match=text):
        ours.moments(x, **options)


# -- Schedulers ----------------------------------------------------------------------------------


def check_scheduler(scheduler, times=3, num_workers=4):
    x = normal(64, 4, 50, dtype=np.float32, offset=1e4)
    array = da.from_array(x, chunks=(3, 2, 50))
    expected = numbanorm.moments(x, (0, 2))
    with dask.config.set(scheduler=scheduler, num_workers=num_workers):
        for _ in range(times):
            found = ours.moments(array, (0, 2))
            assert_close(found.mean, expected.mean)
            assert_close(found.m2, expected.m2)


@pytest.mark.parametrize("layer", ["tbb", "omp", "workqueue"])
def test_threads_on_every_threading_layer(layer):
    if layer == "tbb" and not any(d.name == "tbb" for d in importlib.metadata.distributions()):
        pytest.skip("tbb is not installed")
    run(check_scheduler, "threads", NUMBA_THREADING_LAYER=layer)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["synchronous", "processes"])
def test_schedulers(scheduler):
    check_scheduler(scheduler, 1, 2)


def check_distributed():
    from dask.distributed import Client, LocalCluster

    options = {"dashboard_address": None, "n_workers": 2, "threads_per_worker": 2}
    with LocalCluster(processes=True, **options) as cluster, Client(cluster):
        x = normal(30, 4, dtype=np.float32, offset=1e4)
        found = ours.moments(da.from_array(x, chunks=(4, 2)), 0)
        expected = numbanorm.moments(x, 0)
        assert_close(found.mean, expected.mean)
        assert_close(found.m2, expected.m2)


def test_distributed():
    pytest.importorskip("distributed", reason="distributed is not installed")
    # Its processes import what starts them.
    code = "if __name__ == '__main__':\n    import test_dask\n    test_dask.check_distributed()\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
