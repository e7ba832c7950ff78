"""numbanorm.jit: functions for the user's own compiled code, and outside it."""

import importlib
import json
import os
import shutil
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from children import ROOT, run
from numba import njit, prange

import numbanorm
import numbanorm.functional as F
from numbanorm import jit
from numbanorm.jit import (
    batch_norm,
    batch_norm_backward,
    batch_norm_inference,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    moments,
    rms_norm,
    rms_norm_backward,
)
from numbanorm.numba_ext import threads

EPS = 1e-5


def layer(x, dy, weight, bias, eps):
    y, mean, rstd = layer_norm(x, weight, bias, eps)
    dx, dweight, dbias = layer_norm_backward(dy, x, weight, mean, rstd)
    return y, (mean, rstd), (dx, dweight, dbias)


def rms(x, dy, weight, bias, eps):
    y, rstd = rms_norm(x, weight, eps)
    dx, dweight = rms_norm_backward(dy, x, weight, rstd)
    return y, (rstd,), (dx, dweight)


def batch(x, dy, weight, bias, eps):
    y, mean, var, rstd = batch_norm(x, weight, bias, eps)
    dx, dweight, dbias = batch_norm_backward(dy, x, weight, mean, rstd)
    return y, (mean, var, rstd), (dx, dweight, dbias)


def instance(x, dy, weight, bias, eps):
    y, mean, rstd = instance_norm(x, weight, bias, eps)
    dx, dweight, dbias = instance_norm_backward(dy, x, weight, mean, rstd)
    return y, (mean, rstd), (dx, dweight, dbias)


def group(x, dy, weight, bias, eps):
    y, mean, rstd = group_norm(x, 2, weight, bias, eps)
    dx, dweight, dbias = group_norm_backward(dy, x, 2, weight, mean, rstd)
    return y, (mean, rstd), (dx, dweight, dbias)


def one_group(x, dy, weight, bias, eps):
    y, mean, rstd = group_norm(x, 1, weight, bias, eps)
    dx, dweight, dbias = group_norm_backward(dy, x, 1, weight, mean, rstd)
    return y, (mean, rstd), (dx, dweight, dbias)


# By name: all of it, and the same of numbanorm.functional.
METHODS = {
    "layer": (layer, lambda x, w, b, eps: F.layer_norm_forward(x, x.shape[-1], w, b, eps)),
    "rms": (rms, lambda x, w, b, eps: F.rms_norm_forward(x, x.shape[-1], w, eps)),
    "batch": (batch, lambda x, w, b, e: F.batch_norm_forward(x, None, None, w, b, True, eps=e)),
    "instance": (instance, lambda x, w, b, e: F.instance_norm_forward(x, None, None, w, b, eps=e)),
    "group": (group, lambda x, w, b, eps: F.group_norm_forward(x, 2, w, b, eps)),
    "one group": (one_group, lambda x, w, b, eps: F.group_norm_forward(x, 1, w, b, eps)),
}  # fmt: skip
SHAPES = (32, 64), (3, 4, 5), (4, 8, 7, 7), (2, 2, 2, 3, 2), (0, 4, 3), (3, 4, 0)
# With the small ones they take every layout, in one part and in several.
LARGE_SHAPES = (700, 2, 7, 7), (2, 4, 100_000), (100_000, 4), (20, 64, 9, 9)

methods = pytest.mark.parametrize("method", METHODS)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
affine = pytest.mark.parametrize("has_weights", [True, False], ids=["affine", "plain"])


def data(method, shape, dtype, has_weights=True, seed=0):
    """Return x, dy, weight and bias."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    n = shape[-1 if method in ("layer", "rms") else 1]
    weight, bias = (rng.normal(size=n).astype(dtype) if has_weights else None for _ in range(2))
    return x, dy, weight, bias


def assert_same(found, expected):
    """Compare bits, shapes and types, in tuples of tuples; None is None."""
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def check_against_functional(method, x, dy, weight, bias, eps=EPS):
    call, forward = METHODS[method]
    y, statistics, gradients = call(x, dy, weight, bias, eps)
    expected, saved = forward(x, weight, bias, eps)
    assert_same(y, expected)
    assert_same(gradients, tuple(F.batch_norm_backward(dy, saved))[: len(gradients)])
    *first, rstd = statistics
    with np.errstate(divide="ignore"):
        exact = 1 / np.sqrt(saved.batch.var + saved.mode.eps)
    exact[np.isinf(exact) | (saved.batch.n == 0)] = 0
    assert_same(rstd, exact.reshape(rstd.shape))
    for found, expected in zip(first, (saved.batch.mean, saved.batch.var), strict=False):
        assert_same(found, np.ascontiguousarray(expected).reshape(rstd.shape))
    return rstd.shape


@pytest.mark.fast
@methods
@dtypes
@affine
def test_bits_are_those_of_functional(method, dtype, has_weights):
    for shape in SHAPES if numba.config.DISABLE_JIT else SHAPES + LARGE_SHAPES:
        if method != "instance" or len(shape) > 2:
            stats_shape = check_against_functional(method, *data(method, shape, dtype, has_weights))
            (n, c), batches = shape[:2], {"batch": shape[1:2], "group": (shape[0], 2)}
            others = {"instance": (n, c), "one group": (n, 1)} | batches
            assert stats_shape == others.get(method, shape[:-1])


@methods
def test_bits_where_numbers_are_odd(method):
    # Backward has rstd alone to find the variance from.
    for scale, eps in (1e-30, 0.0), (1e30, EPS), (1e-3, 0.0), (3.0, 0.0):
        x, *others = data(method, (6, 4, 9), np.float64)
        check_against_functional(method, 1e6 * scale + scale * x, *others, eps)
        check_against_functional(method, np.zeros_like(x), *others, eps)
        x[1, 1] = np.inf
        x[2, 3] = np.nan
        check_against_functional(method, x, *others, eps)


def test_every_float64_rstd_has_a_variance():
    rng = np.random.default_rng(1)
    var = np.concatenate([rng.uniform(0.9, 4.1, 100_000), np.exp(rng.uniform(-600, 600, 100_000))])
    rstd = 1 / np.sqrt(var)
    np.testing.assert_array_equal(1 / np.sqrt(jit._var_of(rstd)), rstd)


@pytest.mark.fast
def test_a_row_and_a_column():
    x = np.arange(6.0)
    y, mean, rstd = layer_norm(x, None, None, EPS)
    assert (mean.shape, rstd.shape) == ((), ())
    dx, dweight, dbias = layer_norm_backward(x, x, np.ones(6), mean, rstd)
    assert (dx.shape, dweight.shape, dbias.shape) == ((6,), (6,), (6,))
    assert_same(y, F.layer_norm(x, 6))
    found = numbanorm.moments(x, 0)
    assert_same(moments(x), (6, found.mean, found.m2))


compiled = {name: njit(call) for name, (call, _) in METHODS.items()}


@methods
@pytest.mark.parametrize(("dtype", "has_weights"), [(np.float32, True), (np.float64, False)])
def test_inside_njit(method, dtype, has_weights):
    for shape in (5, 4, 6), (700, 2, 7, 7):
        args = data(method, shape, dtype, has_weights)
        assert_same(compiled[method](*args, EPS), METHODS[method][0](*args, EPS))


@njit
def others(x, weight, bias):
    found = moments(x)
    mean, var = found[1].ravel()[:4].copy(), found[2].ravel()[:4].copy()
    y = batch_norm_inference(x, weight, bias, running_mean=mean, running_var=var, eps=1e-3)
    return y, found, rms_norm(x, None, None)


@dtypes
def test_moments_and_inference_inside_njit(dtype):
    x, _, weight, bias = data("batch", (7, 4, 3), dtype)
    assert_same(others(x, weight, bias), others.py_func(x, weight, bias))
    found = numbanorm.moments(x, 0)
    assert_same(moments(x), (7, found.mean, found.m2))
    mean, var = weight, bias**2
    y = F.batch_norm(x, mean, var, weight, bias, eps=EPS)
    assert_same(batch_norm_inference(x, weight, bias, mean, var, EPS), y)


@njit
def any_arrays(x, weight):
    return layer_norm(x[::2, ::-1], weight[::2], None, eps=EPS)


def test_strides_and_rows_inside_njit():
    x, _, _, weight = data("layer", (8, 6), np.float64)
    weight = np.repeat(weight, 2)
    assert_same(any_arrays(x, weight), layer_norm(x[::2, ::-1], weight[::2], None, EPS))
    x.flags.writeable = False
    assert_same(any_arrays(x, weight), layer_norm(x[::2, ::-1], weight[::2], None, EPS))
    row = njit(lambda x: layer_norm(x, None, None, 0.0))(x[0])
    assert_same(row, layer_norm(x[0], None, None, 0.0))


@njit
def with_or_without(x, weight, has_weight):
    used = weight if has_weight else None
    y, mean, rstd = layer_norm(x, used, None, 1e-5)
    return y, layer_norm_backward(x, x, used, mean, rstd)


def test_a_weight_that_may_be_none_inside_njit():
    x, _, weight, _ = data("layer", (5, 6), np.float64)
    for has_weight in True, False:
        expected = with_or_without.py_func(x, weight, has_weight)
        assert_same(with_or_without(x, weight, has_weight), expected)


# -- Threads ---------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch, restore_threads):
    """Return a list of how many threads each call of a kernel on several had."""
    found = []

    def note(launcher, n):
        found.append(n)
        return launcher, -1, n

    monkeypatch.setattr(threads, "in_threads", note)
    numbanorm.set_num_threads(2)
    return found


@njit(parallel=True)
def in_prange(x, weight, bias):
    y = np.empty_like(x)
    for i in prange(len(x)):
        y[i] = layer_norm(x[i], weight, bias, 1e-5)[0]
    return y


@njit(parallel=True)
def beside_prange(x, weight, bias):
    y = layer_norm(2 * x, weight, bias, 1e-5)[0]
    for i in prange(len(y)):
        y[i] += i
    return y


@njit(nogil=True)
def without_gil(x, weight, bias):
    return layer_norm(x, weight, bias, 1e-5)[0]


def test_serial_in_prange_and_threads_elsewhere(launches):
    x, _, weight, bias = data("layer", (6, 512, 256), np.float32)
    assert x[0].size >= numbanorm.tuning.tuning().parallel_from
    expected = F.layer_norm(x, 256, weight, bias)
    assert launches.pop() == 2
    assert_same(in_prange(x, weight, bias), expected)
    assert launches == []
    assert_same(without_gil(x, weight, bias), expected)
    assert launches == []
    numbers = np.arange(6, dtype=np.float32)[:, np.newaxis, np.newaxis]
    expected = F.layer_norm(2 * x, 256, weight, bias) + numbers
    launches.clear()
    assert_same(beside_prange(x, weight, bias), expected)
    assert launches == [2]


def test_several_python_threads():
    x, _, weight, bias = data("layer", (500, 256), np.float32)
    expected = F.layer_norm(x, 256, weight, bias)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(without_gil, [x] * 40, [weight] * 40, [bias] * 40):
            assert_same(y, expected)


# -- Memory and errors -----------------------------------------------------------------------------


def test_references_are_counted():
    args = data("layer", (5, 4, 6), np.float64)
    before = [sys.getrefcount(a) for a in args]
    for _ in range(10):
        compiled["layer"](*args, EPS)
    assert [sys.getrefcount(a) for a in args] == before


@njit
def repeat(x, n):
    total = 0.0
    for _ in range(n):
        y, mean, rstd = layer_norm(x + 1.0, None, None, 1e-5)
        total += y[0, 0] + mean[0] + rstd[0]
    return total


def test_no_memory_is_lost():
    resource = pytest.importorskip("resource")
    x = np.ones((256, 1024))

    def peak():
        repeat(x, 50)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    first = peak()
    # 50 arrays of 2 MiB for y, and as many for x + 1.
    assert peak() - first < 50 << 10


@methods
def test_wrong_shapes_raise(method):
    x, dy, weight, bias = data(method, (5, 4, 6), np.float64)
    n = len(weight)
    for call in METHODS[method][0], compiled[method]:
        with pytest.raises(ValueError, match=rf"weight: shape \({n},\) is needed"):
            call(x, dy, np.ones(n + 1), bias, EPS)
        with pytest.raises(ValueError, match="dy: the shape of x"):
            call(x, dy[:-1], weight, bias, EPS)
        with pytest.raises(ValueError, match="eps: a finite number"):
            call(x, dy, weight, bias, -1.0)
        if method != "rms":
            with pytest.raises(ValueError, match=rf"bias: shape \({n},\) is needed"):
                call(x, dy, weight, np.ones((n, 1)), EPS)


@njit
def rows_backward(dy, x, weight, mean, rstd):
    return layer_norm_backward(dy, x, weight, mean, rstd)


@njit
def groups_backward(dy, x, num_groups, weight, mean, rstd):
    return group_norm_backward(dy, x, num_groups, weight, mean, rstd)


def test_wrong_statistics_and_groups_raise():
    x, stats = np.ones((5, 6)), np.ones((5, 2))
    outside, inside = (layer_norm_backward, group_norm_backward), (rows_backward, groups_backward)
    for rows, groups in outside, inside:
        with pytest.raises(ValueError, match=r"mean: shape \(5,\) is needed"):
            rows(x, x, None, np.ones(6), np.ones(5))
        with pytest.raises(ValueError, match=r"rstd: shape \(5,\) is needed"):
            rows(x, x, None, np.ones(5), np.ones(6))
        with pytest.raises(ValueError, match="num_groups: a divisor of the 6 channels"):
            groups(x, x, 4, None, stats, stats)
        with pytest.raises(ValueError, match="num_groups: a positive int"):
            groups(x, x, 0, None, stats, stats)


@njit
def too_few_axes(x):
    try:
        batch_norm(x, None, None, 1e-5)
    except Exception:  # Numba knows no other
        return 1
    return 0


def test_errors_are_caught_by_compiled_code():
    assert too_few_axes(np.ones((2, 3, 4))) == 0
    assert too_few_axes(np.ones(3)) == 1


def test_single_numbers_raise():
    x = np.array(3.0)
    for call in layer_norm, njit(lambda x, w, b, eps: layer_norm(x, w, b, eps)):
        with pytest.raises(ValueError, match="x: at least one axis"):
            call(x, None, None, EPS)
    for call in moments, njit(lambda x: moments(x)):
        with pytest.raises(ValueError, match="axis 0 is out of range"):
            call(x)


def test_types_are_told_when_compiling():
    x = np.ones((3, 4))
    half = x.astype(np.float16)
    wrong = ((x.astype(int), None), "x"), ((half, None), "x"), ((x, np.ones(4, int)), "weight")
    for given, name in wrong:
        with pytest.raises(numba.TypingError, match=f"{name}: an array of float32 or float64"):
            njit(lambda x, weight: layer_norm(x, weight, None, 1e-5))(*given)
    with pytest.raises(TypeError, match="x: an array of float32"):
        layer_norm(x.astype(int), None, None, EPS)


# -- The user's cache ------------------------------------------------------------------------------

USER = """
    import json, sys
    import numpy as np
    from numba import njit, prange
    from numbanorm.jit import rms_norm

    @njit(cache=True)
    def inner(x):
        return rms_norm(x, None, 0.0)

    @njit(cache=True)
    def outer(x):
        return inner(x)[0].sum()

    @njit(cache=True, parallel=True)
    def loop(x):
        y = np.empty(len(x))
        for i in prange(len(x)):
            y[i] = inner(x[i : i + 1])[0].sum()
        return y.sum()

    @njit(cache=True)
    def nothing(x):
        return x.sum()

    x = np.full((3, 4), 2.0)
    values = [float(f(x)) for f in (outer, loop, nothing)]
    hits = [sum(f.stats.cache_hits.values()) for f in (outer, loop, nothing)]
    print(json.dumps([values, hits]))
"""
# What a later version may do otherwise: another result, of another type.
EDITS = {
    "__init__.py": ('__version__ = "', '__version__ = "9.'),
    "jit.py": (
        "return y, _statistics(saved, x.shape[:-1])[2]",
        "return 10.0 * y, 0.0, _statistics(saved, x.shape[:-1])[2]",
    ),
}
TYPE = "lambda x, weight, eps: _forward_of(x, x.ndim - 1)"
NEW_TYPE = "lambda x, weight, eps: types.Tuple((_like(x), types.float64, _float64(x.ndim - 1)))"


def import_user():
    import user  # noqa: F401  # it prints


def replace_once(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_the_users_cache_is_used_and_never_stale(tmp_path):
    (tmp_path / "user.py").write_text(textwrap.dedent(USER))
    versions = {"old": tmp_path / "old", "new": tmp_path / "new", "next": tmp_path / "next"}
    for root in versions.values():
        shutil.copytree(
            ROOT / "numbanorm", root / "numbanorm", ignore=shutil.ignore_patterns("__pycache__")
        )
    for name, (old, new) in EDITS.items():
        replace_once(versions["new"] / "numbanorm" / name, old, new)
    replace_once(versions["new"] / "numbanorm" / "jit.py", TYPE, NEW_TYPE)
    replace_once(
        versions["next"] / "numbanorm" / "__init__.py", '__version__ = "', '__version__ = "8.'
    )
    # Kernels need not be compiled again; the user's file is in a new folder.
    cache = {"NUMBA_CACHE_DIR": numba.config.CACHE_DIR or str(tmp_path / "cache")}

    def result_of(version):
        return json.loads(
            run(import_user, root=os.pathsep.join(map(str, (tmp_path, versions[version]))), **cache)
        )

    old, new = [12.0, 12.0, 24.0], [120.0, 120.0, 24.0]
    assert result_of("old") == [old, [0, 0, 0]]
    assert result_of("old") == [old, [1, 1, 1]]
    assert result_of("new") == [new, [0, 0, 1]]
    assert result_of("new") == [new, [1, 1, 1]]
    assert result_of("next") == [old, [0, 0, 1]]
    assert result_of("old") == [old, [0, 0, 1]]


ONE_CALL = """
    from numba import njit
    from numbanorm.jit import {0} as norm

    @njit(cache=True)
    def call(x, weight, bias):
        return norm(x, weight, bias, 1e-5)[0]
"""


def call_files(*names):
    x, _, weight, bias = data("batch", (4, 5, 5), np.float64)
    for name in (*names, *names):
        user = importlib.import_module(f"of_{name}")
        assert_same(user.call(x, weight, bias), getattr(jit, name)(x, weight, bias, EPS)[0])


def test_caches_of_several_files_do_not_mix(tmp_path):
    # Each is the first in its process, of the same types: Numba numbers both alike.
    names = "layer_norm", "instance_norm"
    env = {"NUMBA_CACHE_DIR": numba.config.CACHE_DIR or str(tmp_path / "cache")}
    root = os.pathsep.join(map(str, (tmp_path, ROOT)))
    for name in names:
        (tmp_path / f"of_{name}.py").write_text(textwrap.dedent(ONE_CALL.format(name)))
        run(call_files, name, root=root, **env)
    run(call_files, *names, root=root, **env)
