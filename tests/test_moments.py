import math
from itertools import chain, combinations

import numpy as np
import pytest
import reference as ref
from cases import DTYPES, LAYOUTS, assert_close, layouts, masks, normal

import numbanorm as nn
from numbanorm import Moments


def expected_moments(x, axes, mask=None):
    """Count, mean and m2 by the reference, in the shape of the kept axes."""
    axes = tuple(range(x.ndim)) if axes is None else (axes,) if isinstance(axes, int) else axes
    stat = ref.statistic(x.shape, axes)
    n, mean, var = ref.moments(x, stat, mask)
    return tuple(v.reshape(stat.sizes) for v in (n, mean, var * n))


def check(x, axes=None, mask=None):
    got = nn.moments(x, axes, mask=mask)
    n, mean, m2 = expected_moments(x, axes, mask)
    assert_close(got.mean, mean, scale=1, dtype=x.dtype, what="mean")
    assert_close(got.m2, m2, scale=1, dtype=x.dtype, what="m2")
    np.testing.assert_array_equal(np.broadcast_to(got.count, n.shape), n)
    assert got.mean.dtype == got.m2.dtype == np.float64
    return got


def subsets(ndim):
    return chain.from_iterable(combinations(range(ndim), k) for k in range(ndim + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [*subsets(4), None, -1, 1, (-1, 0), (3, 1)], ids=str)
def test_any_axes(axes, dtype):
    check(normal(3, 4, 5, 6, dtype=dtype), axes)


@pytest.mark.parametrize("axes", [*subsets(5)], ids=str)
def test_any_axes_of_five(axes):
    check(normal(2, 3, 2, 4, 3), axes)


@layouts()
@pytest.mark.parametrize("axes", [(0, 2, 3), (2, 3), (0, 1, 2), (1,), (3,), (0, 2), (1, 3), None])
def test_any_layout(layout, axes):
    check(layout(normal(3, 4, 5, 6, dtype=np.float32)), axes)


@pytest.mark.parametrize("axes", [(0, 2, 3), (2, 3), (0, 1, 2), (3,), (1, 3), None], ids=str)
@pytest.mark.parametrize("stretched", range(4))
def test_broadcast(stretched, axes):
    small = [3, 4, 5, 6]
    small[stretched] = 1
    check(np.broadcast_to(normal(*small), (3, 4, 5, 6)), axes)


def test_one_value_broadcast_to_all():
    got = check(np.broadcast_to(np.float32(0.1), (30, 40, 50)), (0, 2))
    np.testing.assert_array_equal(got.mean, np.float64(np.float32(0.1)))
    np.testing.assert_array_equal(got.m2, 0.0)


# Each size is one block or chunk, one less or one more, for rows and for columns.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n", [1, 2, 7, 15, 17, 49, 63, 64, 65, 255, 1023, 1025, 2047, 2048, 2049, 4095, 4096, 4097,
          32767, 32768, 32769, 65535, 65537, 100003]
)  # fmt: skip
def test_sizes(n, dtype):
    check(normal(2, n, dtype=dtype), 1)
    check(normal(n, 2, dtype=dtype), 0)
    check(normal(n, dtype=dtype))


@masks()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [(0, 2, 3), (2, 3), (0, 1, 2), (3,), (1,), (0, 2), None, ()])
def test_masks(axes, dtype, make_mask):
    x = normal(3, 4, 5, 6, dtype=dtype)
    check(x, axes, make_mask(x.shape))


@layouts()
def test_mask_and_layout(layout):
    x = normal(3, 4, 5, 6, dtype=np.float32)
    check(layout(x), (0, 2, 3), layout(normal(3, 4, 5, 6, seed=1) < 0.5))


def test_masked_out_values_do_not_matter():
    x, mask = normal(5, 6), normal(5, 6, seed=1) < 0.3
    spoiled = np.where(mask, x, np.nan)
    spoiled[np.argmax(~mask.ravel()) // 6, np.argmax(~mask.ravel()) % 6] = np.inf
    for axes in (0, 1, None):
        clean, got = nn.moments(x, axes, mask=mask), nn.moments(spoiled, axes, mask=mask)
        np.testing.assert_array_equal(got.mean, clean.mean)
        np.testing.assert_array_equal(got.m2, clean.m2)


def test_a_nan_stays_in_its_group():
    x = normal(4, 5, 6)
    x[1, 2, 3], x[2, 0, 0] = np.nan, np.inf
    got = nn.moments(x, 2)
    finite = np.isfinite(x).all(2)
    assert np.isnan(got.mean[1, 2])
    np.testing.assert_array_equal(np.isfinite(got.mean), finite)
    np.testing.assert_array_equal(np.isfinite(got.m2), finite)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((0,), None), ((0, 3), 0), ((0, 3), 1), ((3, 0), 1), ((3, 0), 0), ((2, 0, 4), (0, 1)),
     ((2, 0, 4), (2,)), ((), None), ((), ()), ((1,), 0)],
)  # fmt: skip
def test_nothing_and_next_to_nothing(shape, axes):
    check(normal(*shape), axes)


@pytest.mark.parametrize("axes", [None, 1, -1, (0, 2), ()], ids=str)
def test_keepdims(axes):
    x = normal(3, 4, 5)
    got = nn.moments(x, axes, keepdims=True)
    np.testing.assert_allclose(got.mean, x.mean(axes, keepdims=True), rtol=1e-12, atol=1e-15)
    assert got.mean.shape == got.m2.shape == x.mean(axes, keepdims=True).shape
    masked = nn.moments(x, axes, mask=x > 0, keepdims=True)
    assert np.shape(masked.count) == masked.mean.shape


def test_count_is_one_number_unless_masked():
    x = normal(3, 4, 5)
    assert nn.moments(x, (0, 2)).count == 15
    assert np.ndim(nn.moments(x, (0, 2)).count) == 0
    np.testing.assert_array_equal(
        nn.moments(x, (0, 2), mask=x > 0).count, (x > 0).sum(axis=(0, 2)), strict=False
    )


@pytest.mark.parametrize("ddof", [0, 1, 2])
def test_var_and_std(ddof):
    x = normal(4, 5, 6)
    got = nn.moments(x, (0, 2))
    np.testing.assert_allclose(got.var(ddof=ddof), x.var((0, 2), ddof=ddof), rtol=1e-13)
    np.testing.assert_allclose(got.std(ddof=ddof), x.std((0, 2), ddof=ddof), rtol=1e-13)
    np.testing.assert_array_equal(got.var(ddof), got.m2 / (24 - ddof))


def test_var_of_too_few_is_finite():
    one = nn.moments(np.array([3.0]))
    assert one.var(ddof=1) == 0
    assert Moments.empty(()).var() == 0


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_accuracy_at_an_offset(offset):
    for shape, axes in (((40, 50_000), 1), ((50_000, 40), 0), ((8, 40, 49), (0, 2))):
        x = normal(*shape, dtype=np.float32, offset=offset)
        _, mean, m2 = expected_moments(x, axes)
        got = nn.moments(x, axes)
        # A mean is as good as float64 of x but for the centred sums, which are in float32.
        np.testing.assert_allclose(got.mean, mean, rtol=0, atol=1e-6)
        np.testing.assert_allclose(got.m2, m2, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [0.0, 0.1, -1 / 3, 1e6 + 0.3, 1e30, 1e-30])
def test_a_constant_is_its_own_mean(constant, dtype):
    value = float(dtype(constant))
    for shape, axes in (((3, 1000), 1), ((1000, 3), 0), ((7, 5, 49), (0, 2)), ((70_001,), 0)):
        got = nn.moments(np.full(shape, constant, dtype), axes)
        np.testing.assert_array_equal(got.mean, value)
        np.testing.assert_array_equal(got.m2, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e30, 1e-20])
def test_scale(scale, dtype):
    for shape, axes in (((3, 5000), 1), ((5000, 3), 0)):
        x = (normal(*shape, offset=1) * scale).astype(dtype)
        _, mean, m2 = expected_moments(x, axes)
        got = nn.moments(x, axes)
        np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(got.m2, m2, rtol=1e-5)


# -- algebra -------------------------------------------------------------------------------------


@pytest.mark.fast
def test_add_and_merge():
    x = normal(50, 4)
    parts = [nn.moments(p, 0) for p in np.split(x, [1, 20, 21, 45])]
    whole = nn.moments(x, 0)
    added = parts[0]
    for part in parts[1:]:
        added = added + part
    merged = Moments.merge(iter(parts))
    for got in (added, merged, sum(parts[1:], parts[0])):
        np.testing.assert_array_equal(np.broadcast_to(got.count, 4), 50)
        np.testing.assert_allclose(got.mean, whole.mean, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(got.m2, whole.m2, rtol=1e-13)


def test_merge_of_one_is_itself():
    whole = nn.moments(normal(50, 4), 0)
    got = Moments.merge([whole])
    np.testing.assert_array_equal(got.mean, whole.mean)
    np.testing.assert_array_equal(got.m2, whole.m2)


def test_merge_changes_none_of_its_arguments():
    a, b = (nn.moments(normal(5, 4, seed=s), 0) for s in (0, 1))
    before = a.mean.copy(), a.m2.copy(), b.mean.copy(), b.m2.copy()
    _, _ = a + b, Moments.merge([a, b])
    for now, then in zip((a.mean, a.m2, b.mean, b.m2), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_empty_is_neutral(shape):
    nothing = Moments.empty(shape)
    assert nothing.mean.shape == nothing.m2.shape == shape
    assert np.all(np.asarray(nothing.count) == 0)
    something = nn.moments(normal(5, *shape, offset=1e6), 0)
    for got in (nothing + something, something + nothing, Moments.merge([nothing, something])):
        np.testing.assert_array_equal(got.mean, something.mean)
        np.testing.assert_array_equal(got.m2, something.m2)
        assert np.all(np.asarray(got.count) == 5)
    twice = nothing + nothing
    np.testing.assert_array_equal(twice.mean, 0)
    np.testing.assert_array_equal(twice.m2, 0)


def test_masked_parts_with_counts_that_differ():
    x, mask = normal(30, 5, offset=100), normal(30, 5, seed=1) < 0
    mask[:10, 0] = False  # nothing in the first part
    mask[:, 4] = False  # nothing at all
    parts = [nn.moments(x[s], 0, mask=mask[s]) for s in (slice(10), slice(10, 30))]
    got = parts[0] + parts[1]
    n, mean, m2 = expected_moments(x, 0, mask)
    np.testing.assert_array_equal(got.count, n)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(got.m2, m2, rtol=1e-11)


def test_masked_and_unmasked_parts():
    x, mask = normal(30, 5), normal(10, 5, seed=1) < 0
    got = nn.moments(x[:10], 0, mask=mask) + nn.moments(x[10:], 0)
    n, mean, _ = expected_moments(x, 0, np.concatenate([mask, np.ones((20, 5), dtype=bool)]))
    np.testing.assert_array_equal(got.count, n)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-12)


def test_far_apart_parts_do_not_cancel():
    a, b = nn.moments(normal(1000)), nn.moments(normal(10, seed=1, offset=1e8))
    both = np.concatenate([normal(1000), normal(10, seed=1, offset=1e8)])
    _, mean, m2 = expected_moments(both, None)
    got = a + b
    np.testing.assert_allclose(got.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(got.m2, m2, rtol=1e-14)


def test_lists_are_arrays():
    got = nn.moments([[1.0, 2.0], [3.0, 5.0]], axes=[0])
    np.testing.assert_array_equal(got.mean, [2.0, 3.5])
    assert math.isclose(float(nn.moments([1.0, 2.0, 4.0]).mean), 7 / 3)


def test_axes_by_name_and_position():
    x = normal(3, 4)
    np.testing.assert_array_equal(nn.moments(x, 1).mean, nn.moments(x, axes=1).mean)


def test_x_is_left_alone():
    for layout in LAYOUTS.values():
        x = layout(normal(3, 4, 5))
        before = x.copy()
        nn.moments(x, (0, 2))
        np.testing.assert_array_equal(x, before)
