"""float16 and bfloat16: the float32 layer's results, rounded once; conversions bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from cases import CASES, FORCED_VIEWS, by_id, cases, normal
from runs import make_mask
from test_fast import FORCED, MASKS, MODES, STORES, in_turn

import numbanorm as nn
import numbanorm.functional as F
from numbanorm.tuning import use

bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
HALVES = [np.dtype(np.float16), bfloat16]
ACTIVATIONS = None, "relu", "gelu"


def assert_same(actual, expected, what=""):
    """Compare bits, but for those of NaN; the sign of 0 counts."""
    assert actual.dtype == expected.dtype, what
    wide, nan = actual.astype(np.float32), np.isnan(actual.astype(np.float32))
    np.testing.assert_array_equal(wide, expected.astype(np.float32), err_msg=what)
    kind = f"u{actual.itemsize}"
    different = (actual.view(kind) != expected.view(kind)) & ~nan
    assert not different.any(), what


def rounded(array, dtype):
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def check(case, dtype, mask="none", mode="train", store="cached", activation=None, **limits):
    """Compare with the float32 layer for the widened input, whose results are rounded."""
    x, dy, r = (normal(*case.shape, seed=seed, dtype=np.float32).astype(dtype) for seed in range(3))
    mask, residual = make_mask(case.shape, mask), r if activation else None
    halves, wide = (
        getattr(case.layer(np.float32, activation=activation), mode)() for _ in range(2)
    )
    with use(**limits, **STORES[store]):
        y = halves(x, mask=mask, residual=residual)
        wide_residual = None if residual is None else residual.astype(np.float32)
        expected = wide(x.astype(np.float32), mask=mask, residual=wide_residual)
        assert_same(y, rounded(expected, dtype), "y")
        results, expected = halves.backward(dy), wide.backward(dy.astype(np.float32))
    if activation is None:
        results, expected = (results,), (expected,)
    for name, result, other in zip(("dx", "dresidual"), results, expected, strict=False):
        assert_same(result, rounded(other, dtype), name)
    for kind in ("parameters", "gradients", "state_dict"):
        for name, value in getattr(halves, kind)().items():
            np.testing.assert_array_equal(value, getattr(wide, kind)()[name], name, strict=True)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("case", "dtype", "mask", "mode", "activation"),
    in_turn(CASES, HALVES, MASKS, MODES, ACTIVATIONS),
)
def test_layers(case, dtype, mask, mode, activation):
    check(case, dtype, mask, mode, activation=activation)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("case", "forced", "dtype", "store"), in_turn(CASES[::3], FORCED, HALVES, STORES)
)
def test_layouts(case, forced, dtype, store):
    check(case, dtype, store=store, **FORCED[forced])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("forced", FORCED_VIEWS)
def test_kernels(forced, store, dtype):
    from dataclasses import replace

    limits, case, shape, _ = FORCED_VIEWS[forced]
    check(replace(by_id[case], shape=shape), dtype, "random", store=store, **limits)


# Layers of n elements next to each other.
ROWS_OF = {
    "rows": (lambda n: nn.LayerNorm(n), lambda n: (3, n)),
    "rows of groups": (lambda n: nn.GroupNorm(2, 4), lambda n: (2, 4, n)),
    "pieces": (lambda n: nn.SwitchableNorm(2), lambda n: (3, 2, n)),
    "columns": (lambda n: nn.BatchNorm2d(n, axis=-1), lambda n: (2, 3, 3, n)),
    "columns of pieces": (lambda n: nn.SwitchableNorm(n, axis=-1), lambda n: (2, 7, n)),
    "columns of elements": (lambda n: nn.Norm(1, shape=3), lambda n: (2, 3, n)),
}
SIZES = *range(1, 34), 95, 129


@pytest.mark.parametrize("kind", ROWS_OF)
@pytest.mark.parametrize("store", STORES)
def test_outputs_that_begin_anywhere_in_a_line(store, kind):
    make, shape = ROWS_OF[kind]
    for i, n in enumerate(SIZES):
        dtype, start = HALVES[i // 5 % 2], (1, 8, 16, 24, 31)[i % 5]
        check_outputs(make(n), make(n), shape(n), dtype, store, start)


@pytest.mark.fast
def test_streamed_columns_begin_late_in_a_line():
    # The first block has the elements that precede a line: of 16 bits up to 31.
    layers = (nn.Norm(1, shape=3, activation="silu") for _ in range(2))
    with use(column_run=64):
        check_outputs(*layers, (1, 3, 150), bfloat16, "streamed", 1, residual=True)


def after_line(like, start):
    """Return an output that begins ``start`` elements after where a line does."""
    memory = np.zeros(like.nbytes + 128, np.uint8)
    at = -memory.ctypes.data % 64 + start * like.itemsize
    return memory[at : at + like.nbytes].view(like.dtype).reshape(like.shape)


def check_outputs(halves, wide, shape, dtype, store, start, residual=False):
    """Compare outputs that begin so many elements after a line with the float32 layer's."""
    x, dy, r = (normal(*shape, seed=seed, dtype=np.float32).astype(dtype) for seed in range(3))
    x.flat[::41], dy.flat[::43] = 0.0, np.float32(1e-39).astype(dtype)
    outs = [after_line(x, start) for _ in range(3)]
    args = ({"residual": v} if residual else {} for v in (r, r.astype(np.float32)))
    with use(**STORES[store]):
        y = halves(x, out=outs[0], **next(args))
        expected = wide(x.astype(np.float32), **next(args))
        assert_same(y, rounded(expected, dtype), f"y {shape}")
        into = {"out_residual": outs[2]} if residual else {}
        results = halves.backward(dy, out=outs[1], **into)
        expected = wide.backward(dy.astype(np.float32))
    if not residual:
        results, expected = (results,), (expected,)
    for name, result, other in zip(("dx", "dresidual"), results, expected, strict=False):
        assert_same(result, rounded(other, dtype), f"{name} {shape}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@cases("BatchNorm2d", "LayerNorm", "SwitchableNorm2d")
def test_strides_out_and_other_types_of_dy(case, dtype):
    layer, x = case.layer(np.float32), case.input(np.float32).astype(dtype)
    y, dy = layer(x), normal(*case.shape, seed=1)
    dx = layer.backward(dy.astype(dtype))
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype)
    strided, out = wide[..., ::2], wide[..., 1::2]
    strided[...] = x
    assert layer(strided, out=out) is out
    assert_same(out, y)
    assert_same(layer.backward(dy.astype(dtype).astype(np.float64)), dx)
    shifted = np.zeros(x.nbytes + 1, np.uint8)[1:].view(dtype).reshape(x.shape)
    shifted[...] = x
    assert_same(layer(shifted), y)
    assert_same(layer(own := x.copy(), out=own), y)
    swapped = x.astype(dtype.newbyteorder(">")) if dtype == np.float16 else x
    assert_same(layer(swapped), y)
    with pytest.raises(TypeError, match=f"out: dtype {dtype} is needed"):
        layer(x, out=np.empty(x.shape, np.float32))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_extremes(dtype):
    # The sum of squares is beyond float16 by far.
    x = np.array([[65504, -65504, 1000, 0]], np.float32).astype(dtype)
    y = F.layer_norm(x, 4).astype(np.float64)
    assert abs(y.mean()) < 1e-2
    assert abs(y.var() - 1) < 1e-2
    # Infinite where float16 overflows, and subnormal where it is small.
    weight = np.array([1e6, 1e-7, 1.0, 1.0])
    y = F.layer_norm(x, 4, weight).astype(np.float32)[0]
    assert np.isinf(y[0]) == (dtype == np.float16)
    assert y[1] < 0
    nan = np.array([[np.nan, 1, 2, 3], [1, 2, 3, 4]]).astype(dtype)
    assert np.isnan(F.layer_norm(nan, 4).astype(np.float32)).tolist() == [[True] * 4, [False] * 4]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_moments_and_functional(dtype):
    x = normal(300, 7, offset=3.0).astype(dtype)
    moments = nn.moments(x, 0)
    expected = nn.moments(x.astype(np.float64), 0)
    np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(moments.m2, expected.m2, rtol=1e-12)
    # eps=None is that of float32, and running statistics of 16 bits are averaged as such.
    constant = np.full((1, 4), 1e-3).astype(dtype)
    assert_same(F.rms_norm(constant, 4), F.rms_norm(constant.astype(np.float32), 4).astype(dtype))
    mean, var = np.zeros(7, dtype), np.ones(7, dtype)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert_same(mean, expected.mean.astype(np.float32).astype(dtype))
    assert_same(var, expected.var(ddof=1).astype(np.float32).astype(dtype))


def test_integers_and_booleans():
    draw = np.random.default_rng(0)
    for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64, np.bool_):
        x = draw.integers(0, 100, (40, 3, 5)).astype(dtype)
        exact = nn.moments(x.astype(np.float64), (0, 2))
        for limits in ({}, {"mapped_part": 64}):
            with use(**limits):
                moments = nn.moments(x, (0, 2))
            np.testing.assert_allclose(moments.mean, exact.mean, rtol=1e-15)
            np.testing.assert_allclose(moments.m2, exact.m2, rtol=1e-13)
    large = nn.moments(np.array([2**53 - 1, 2**53 - 3, 2**53 - 5]))
    assert (large.count, float(large.mean), float(large.m2)) == (3, 2.0**53 - 3, 8.0)


def test_wrong_types():
    with pytest.raises(TypeError, match="float16 or bfloat16 is needed, got uint16"):
        nn.LayerNorm(3)(np.ones((2, 3), np.uint16))
    for dtype in HALVES:
        with pytest.raises(TypeError, match="dtype: float32 or float64 is needed"):
            nn.LayerNorm(3, dtype=dtype)


CONVERT = """
import sys
import ml_dtypes, numpy as np
from numba import njit
from numbanorm.numba_ext import halves
from numbanorm.numba_ext.jit import FLAGS
from numbanorm.numba_ext.vectors import load, store

@njit(**FLAGS)
def widen(x, y):
    for i in range(0, x.shape[0], 16):
        store(halves.decode(load(x, i, None)), y, i, None)

@njit(**FLAGS)
def round_all(x, y):
    for i in range(0, x.shape[0], 16):
        store(halves.encode(load(x, i, None), y), y, i, None)

assert halves._has_float16() == (sys.argv[1] == "True")
every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
draw = np.random.default_rng(0)
for stored, dtype in ((np.int16, np.float16), (np.uint16, ml_dtypes.bfloat16)):
    with np.errstate(all="ignore"):
        wide = every.view(dtype).astype(np.float32)
        result = np.empty(1 << 16, np.float32)
        widen(every.view(stored), result)
        assert np.array_equal(result, wide, equal_nan=True)
        # Ties, what is next to them, and anything.
        near = wide.view(np.uint32)[:, None] + np.array(
            [0, 1, -1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
        bits = np.concatenate((near.ravel(), draw.integers(0, 1 << 32, 1 << 18)))
        x = bits.astype(np.uint32).view(np.float32)
        expected, result = x.astype(dtype), np.empty(len(x), stored)
        round_all(x, result)
        nan = np.isnan(x)
        assert np.array_equal(result[~nan].view(np.uint16), expected[~nan].view(np.uint16))
        assert np.isnan(result[nan].view(dtype).astype(np.float32)).all()
print("done")
"""


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="nothing is compiled")
@pytest.mark.parametrize("baseline", [False, True])
def test_conversions_have_the_same_bits_on_every_cpu(baseline, tmp_path):
    from numbanorm.numba_ext.halves import _has_float16

    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    if baseline:
        env |= {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    elif not _has_float16():
        pytest.skip("this CPU converts no float16 itself")
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(not baseline)],
        env=env, cwd=Path(nn.__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
