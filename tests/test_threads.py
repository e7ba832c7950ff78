"""The same bits for every number of threads."""

from dataclasses import replace

import numba
import numpy as np
import pytest
from cases import CASES, by_id, cases, normal
from children import run

import numbanorm as nn

MOST = numba.config.NUMBA_NUM_THREADS
COUNTS = sorted({1, 2, 3, 4, MOST} & set(range(1, MOST + 1)))

# Enough for every chunk and every thread to have something to do, and nothing even.
BIG = {
    "BatchNorm2d": (9, 4, 57, 61),
    "BatchNorm2d-untracked": (301, 4, 9, 11),
    "BatchNorm2d-last": (21, 57, 61, 4),
    "BatchNorm1d": (20011, 5),
    "BatchNorm1d-ncl": (2, 3, 40009),
    "BatchNorm3d": (3, 3, 9, 31, 33),
    "BatchNorm-middle": (31, 33, 4, 35),
    "InstanceNorm2d-tracking": (9, 4, 57, 61),
    "InstanceNorm2d-last": (9, 57, 61, 4),
    "GroupNorm": (9, 6, 57, 61),
    "GroupNorm-last": (9, 57, 61, 6),
    "LayerNorm": (12007, 10),
    "LayerNorm-3axes": (3001, 2, 4, 5),
    "RMSNorm": (12007, 10),
    "Norm-columns": (101, 5, 17, 19),
    "Norm-scattered": (57, 4, 61, 6),
    "Norm-outer": (101, 103, 7),
    "Norm-groups-per-element": (3001, 6, 4),
    "Norm-groups-batch": (501, 6, 29),
    "SwitchableNorm1d": (20011, 4),
    "SwitchableNorm2d": (9, 4, 57, 61),
    "SwitchableNorm2d-last": (9, 57, 61, 4),
    "SwitchableNorm2d-all": (9, 6, 57, 61),
    "SwitchableNorm2d-all-last": (9, 57, 61, 6),
}


def bits(case, dtype, training, mask):
    """Run one forward and backward; give all that comes of it as bytes."""
    layer = case.layer(dtype).train(training)
    x, dy = case.input(dtype), case.input(dtype, seed=1)
    arrays = {"y": layer(x, mask=mask), "dx": layer.backward(dy)}
    arrays |= {f"gradient of {k}": v for k, v in layer.gradients().items()}
    arrays |= layer.state_dict()
    return {k: np.asarray(v).tobytes() for k, v in arrays.items()}


def check(case, dtype, masked):
    mask = normal(*case.shape, seed=2) < 0.5 if masked else None
    for training in (True, False):
        nn.set_num_threads(1)
        expected = bits(case, dtype, training, mask)
        for n in COUNTS[1:]:
            nn.set_num_threads(n)
            for name, value in bits(case, dtype, training, mask).items():
                assert value == expected[name], f"{name} is different for {n} threads"


needs_two = pytest.mark.skipif(MOST < 2, reason="NUMBA_NUM_THREADS allows one thread only")
masked = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])


@needs_two
@pytest.mark.parametrize("name", BIG)
@masked
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.usefixtures("restore_threads")
def test_big(name, dtype, masked):
    check(replace(by_id[name], shape=BIG[name]), dtype, masked)


def test_many_more_threads_than_cores():
    run(check_many, NUMBA_NUM_THREADS="16")


def check_many():
    for name in ("BatchNorm2d", "BatchNorm2d-untracked", "BatchNorm1d-ncl", "GroupNorm-last",
                 "LayerNorm", "Norm-columns", "SwitchableNorm2d"):  # fmt: skip
        case, results = replace(by_id[name], shape=BIG[name]), []
        for n in (1, 5, 16):
            nn.set_num_threads(n)
            results.append([bits(case, np.float32, training, None) for training in (True, False)])
        assert results[0] == results[1] == results[2], name


@needs_two
@cases(*(c.id for c in CASES if c.id != "LayerNorm-no-batch"))
@masked
@pytest.mark.usefixtures("restore_threads")
def test_small(case, masked):
    check(case, np.float32, masked)


@needs_two
@pytest.mark.parametrize("axes", [None, 0, 1, 2, (0, 2), (1, 2), (0, 1)], ids=str)
@pytest.mark.usefixtures("restore_threads")
def test_moments(axes):
    x = normal(37, 41, 43, dtype=np.float32)
    results = set()
    for n in COUNTS:
        nn.set_num_threads(n)
        got = nn.moments(x, axes)
        results.add((np.asarray(got.mean).tobytes(), np.asarray(got.m2).tobytes()))
    assert len(results) == 1


@pytest.mark.usefixtures("restore_threads")
def test_set_and_get():
    for n in COUNTS:
        nn.set_num_threads(n)
        assert nn.get_num_threads() == n


@pytest.mark.parametrize("n", [0, -1, MOST + 1, 10**9])
@pytest.mark.usefixtures("restore_threads")
def test_a_number_out_of_range(n):
    before = nn.get_num_threads()
    with pytest.raises(ValueError, match=str(n)):
        nn.set_num_threads(n)
    assert nn.get_num_threads() == before


@pytest.mark.parametrize("n", [1.5, "2", None, np.nan, [1]], ids=repr)
@pytest.mark.usefixtures("restore_threads")
def test_not_a_number_of_threads(n):
    before = nn.get_num_threads()
    with pytest.raises((TypeError, ValueError)):
        nn.set_num_threads(n)
    assert nn.get_num_threads() == before
