"""What others leave on the table: offsets, constants, scales, and where a NaN goes."""

from dataclasses import replace

import numpy as np
import pytest
from cases import by_id, cases, fill, normal

import numbanorm as nn

OFFSETS = pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6], ids=str)

# Data that the sums have work with: many values to a statistic, short rows and long ones.
ACCURATE = {
    "BatchNorm1d": (4096, 5),
    "BatchNorm1d-ncl": (2, 3, 100_003),
    "BatchNorm2d": (16, 4, 56, 56),
    "BatchNorm2d-last": (16, 56, 56, 4),
    "BatchNorm3d": (3, 3, 16, 28, 28),
    "InstanceNorm2d": (4, 4, 181, 183),
    "InstanceNorm2d-last": (4, 181, 183, 4),
    "InstanceNorm2d-tracking": (300, 4, 7, 7),
    "GroupNorm": (16, 6, 56, 56),
    "GroupNorm-last": (16, 56, 56, 6),
    "LayerNorm": (2048, 10),
    "LayerNorm-3axes": (1024, 2, 4, 5),
    "RMSNorm": (2048, 10),
    "Norm-columns": (64, 5, 28, 28),
    "Norm-scattered": (33, 4, 300, 6),
    "Norm-outer": (128, 128, 5),
    "Norm-groups-per-element": (512, 6, 4),
    "SwitchableNorm1d": (4096, 4),
    "SwitchableNorm2d": (16, 4, 56, 56),
    "SwitchableNorm2d-last": (16, 56, 56, 4),
    "SwitchableNorm2d-all": (16, 6, 56, 56),
    "SwitchableNorm2d-all-last": (16, 56, 56, 6),
}


def plain(case, dtype=np.float32):
    """Make the layer with weight 1 and bias 0, and unequal logits."""
    layer = case.layer(dtype)
    for name, p in layer.parameters().items():
        if name in ("weight", "bias"):
            p[...] = name == "weight"
    return layer


@OFFSETS
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", ACCURATE)
def test_offset(name, masked, offset):
    case, shape = by_id[name], ACCURATE[name]
    x = normal(*shape, dtype=np.float32, offset=offset)
    dy = normal(*shape, seed=1, dtype=np.float32)
    mask = normal(*shape, seed=2) < 0.5 if masked else None
    layer = plain(case)
    naive = case.naive(layer, x, mask)
    # A row of few values has not the standard deviation 1 of what it was drawn from.
    bound = 1e-5 * np.maximum(1, naive.rstd)
    # Two values that are left may be as close as they like, and what does not count then has any y.
    left = [n[stat.ids] for n, stat in zip(naive.counts, naive.statistics, strict=True)]
    far = ~naive.counted & (np.min(left, axis=0) < 16)
    dy[far] = 0
    error = np.abs(layer(x, mask=mask) - naive.y)
    assert np.all(error <= bound * np.where(far, np.maximum(1, np.abs(naive.y)), 1))
    error = np.abs(layer.backward(dy) - naive.backward(dy)["dx"])
    assert np.all(error <= bound), f"dx is off by {error.max():.3g}"


@OFFSETS
@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNorm2d-last", "SwitchableNorm2d"])
def test_offset_in_evaluation(name, offset):
    case, shape = by_id[name], ACCURATE[name]
    x = normal(*shape, dtype=np.float32, offset=offset)
    layer = plain(case).eval()
    # At 1e6 the mean itself is no float32 number: what is stored is what is used.
    layer.running_mean[...] = x.mean(dtype=np.float64)
    layer.running_var[...] = x.var(dtype=np.float64)
    np.testing.assert_allclose(layer(x), case.naive(layer, x).y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNorm2d-last", "InstanceNorm2d", "GroupNorm"])
def test_each_channel_at_its_own_offset(name):
    case, shape = by_id[name], ACCURATE[name]
    axis = case.feature_axes[0]
    offsets = np.array([1e6, -1e4, 0, 1e2, 1e5, -1e6][: shape[axis]])
    if name == "GroupNorm":
        offsets[...] = [1e6] * 3 + [-1e4] * 3
    x = np.moveaxis(np.moveaxis(normal(*shape), axis, -1) + offsets, -1, axis).astype(np.float32)
    layer = plain(case)
    np.testing.assert_allclose(layer(x), case.naive(layer, x).y, rtol=0, atol=1e-5)


def test_offset_that_drifts_along_a_row():
    # Blocks of one row that have little in common: the merge has to carry the difference.
    x = (normal(4, 50_000) + np.linspace(0, 1e4, 50_000)).astype(np.float32)
    layer = nn.LayerNorm(50_000)
    expected = (x - x.mean(1, dtype=np.float64, keepdims=True)) / np.sqrt(
        x.astype(np.float64).var(1, keepdims=True) + 1e-5
    )
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("far", [1e2, 1e4, 1e8], ids=str)
@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNorm2d-last", "InstanceNorm2d", "LayerNorm"])
def test_first_element_far_from_the_others(name, far):
    # What the statistics are taken around may be anything, and an outlier as well.
    case, shape = by_id[name], ACCURATE[name]
    x = normal(*shape, dtype=np.float32)
    first = (0,) * len(shape)
    for where in (first, tuple(s - 1 for s in shape)):
        spoiled = x.copy()
        spoiled[where] += np.float32(far)
        layer = plain(case)
        naive = case.naive(layer, spoiled)
        bound = 1e-6 * np.maximum(1, np.abs(naive.y))  # y of the far one is up to sqrt(n)
        assert np.all(np.abs(layer(spoiled) - naive.y) <= bound)


# -- constants -----------------------------------------------------------------------------------

CONSTANTS = [0.0, 1.0, 0.1, -1 / 3, np.pi, 1e6 + 0.3, -12345.678, 1e30, -1e30, 1e-20, 3e-39]
CENTRED = [n for n in ACCURATE if n != "RMSNorm"]


def expected_bias(case, layer, shape):
    features = [s if a in {f % len(shape) for f in case.feature_axes} else 1
                for a, s in enumerate(shape)]  # fmt: skip
    return np.broadcast_to(layer.bias.reshape(features), shape)


@pytest.mark.parametrize("eps", [None, 0.0], ids=["eps", "eps=0"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", [n for n in CENTRED if not n.startswith("Norm")])
def test_a_constant_gives_exactly_the_bias(name, dtype, eps):
    case, shape = by_id[name], ACCURATE[name]
    shape = (max(2, shape[0] // 8), *shape[1:])
    layer = case.layer(dtype, **({} if eps is None else {"eps": eps}))
    expected = expected_bias(case, layer, shape)
    for constant in CONSTANTS:
        x = np.full(shape, constant, dtype)
        np.testing.assert_array_equal(layer(x), expected, err_msg=str(constant))
        dx = layer.backward(normal(*shape, dtype=dtype))
        assert np.isfinite(dx).all()
        if eps == 0:
            np.testing.assert_array_equal(dx, 0)


@pytest.mark.parametrize("name", [n for n in CENTRED if n.startswith("Norm")])
@pytest.mark.parametrize("constant", CONSTANTS, ids=str)
def test_a_constant_gives_exactly_the_bias_in_norm(name, constant):
    case, shape = by_id[name], by_id[name].shape
    layer = case.layer(np.float32)
    y = layer(np.full(shape, constant, np.float32))
    np.testing.assert_array_equal(y, expected_bias(case, layer, shape))


@cases("BatchNorm2d", "InstanceNorm2d", "GroupNorm", "SwitchableNorm2d", "SwitchableNorm2d-all")
@pytest.mark.parametrize("constant", CONSTANTS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_a_constant_under_a_mask(case, dtype, constant):
    layer = case.layer(dtype)
    mask = normal(*case.shape, seed=2) < 0.5
    x = np.where(mask, dtype(constant), normal(*case.shape, dtype=dtype))
    y = layer(x, mask=mask)
    np.testing.assert_array_equal(y[mask], expected_bias(case, layer, case.shape)[mask])


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_a_constant_for_each_channel(dtype, axis):
    shape = (3, len(CONSTANTS), 7, 9) if axis == 1 else (3, 7, 9, len(CONSTANTS))
    by_channel = [-1, 1, 1] if axis == 1 else [-1]
    x = np.broadcast_to(np.array(CONSTANTS, dtype).reshape(by_channel), shape)
    for make in (nn.BatchNorm2d, nn.InstanceNorm2d):
        layer = fill(make(len(CONSTANTS), affine=True, axis=axis, dtype=dtype))
        expected = np.broadcast_to(layer.bias.reshape(by_channel), shape)
        np.testing.assert_array_equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_one_constant_row_among_others(dtype):
    layer = fill(nn.LayerNorm(1000, dtype=dtype))
    x = normal(9, 1000, dtype=dtype)
    x[4] = 0.1
    np.testing.assert_array_equal(layer(x)[4], layer.bias)


def test_zeros_in_rms_norm_give_zeros():
    for eps in (None, 0.0):
        layer = nn.RMSNorm(10, eps=eps)
        np.testing.assert_array_equal(layer(np.zeros((3, 10), np.float32)), 0)
        assert np.isfinite(layer.backward(np.ones((3, 10), np.float32))).all()


# -- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-20, 1e-30], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.0], ids=["eps", "eps=0"])
@pytest.mark.parametrize("name", [n for n in ACCURATE if not n.startswith("Norm")])
def test_scale(name, eps, scale, dtype):
    case = by_id[name]
    shape = (max(2, ACCURATE[name][0] // 8), *ACCURATE[name][1:])
    layer = plain(case, dtype) if eps else fill(case.make(dtype=dtype, eps=0.0))
    if eps == 0:
        case = replace(case, eps=0.0)
    x = (normal(*shape, offset=0.5) * scale).astype(dtype)
    dy = normal(*shape, seed=1, dtype=dtype)
    naive = case.naive(layer, x)
    close(layer(x), naive.y, np.abs(naive.x_hat * naive.weight).max())
    expected = naive.backward(dy)
    close(layer.backward(dy), expected["dx"], naive.scale["dx"])
    for parameter, gradient in layer.gradients().items():
        close(gradient, expected[parameter], naive.scale[parameter], x.dtype)


def close(actual, expected, scale, dtype=None):
    assert np.isfinite(actual).all()
    # As for the offsets, but in units of what is added up, however big or small that is.
    bound = (1e-5 if np.float32 in (actual.dtype, dtype) else 1e-12) * scale
    bound += np.finfo(actual.dtype).tiny
    assert np.all(np.abs(actual - expected) <= bound)


# -- where a NaN goes ----------------------------------------------------------------------------


def reach(case, these):
    """Mark the elements that have a statistic in common with any of `these`."""
    together = np.zeros(these.shape, dtype=bool)
    for stat in case.statistics(these.shape):
        together |= np.isin(stat.ids, np.unique(stat.ids[these]))
    return together


def only(shape, where):
    these = np.zeros(shape, dtype=bool)
    these[where] = True
    return these


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("name", ACCURATE)
def test_a_nan_stays_in_its_group(name, bad):
    case = by_id[name]
    shape = (max(2, ACCURATE[name][0] // 8), *ACCURATE[name][1:])
    x, dy = (normal(*shape, seed=s, dtype=np.float32) for s in (0, 1))
    where = (1, *(s // 2 for s in shape[1:]))
    spoiled = x.copy()
    spoiled[where] = bad
    clean_layer, layer = (case.layer(np.float32) for _ in range(2))
    together = reach(case, only(shape, where))
    y, dx = clean_layer(x), clean_layer.backward(dy)
    got, gradient = layer(spoiled), layer.backward(dy)
    np.testing.assert_array_equal(got[~together], y[~together])
    # dx depends on all the y that an element has a part in. Where there is one statistic, they
    # are the same elements again; in a mixture of "ln" and "bn" that is everything.
    further = reach(case, together)
    np.testing.assert_array_equal(gradient[~further], dx[~further])
    assert np.isnan(got[together]).all()
    assert np.isnan(gradient[together]).all()
    if case.tracked is not None:
        # The running statistics of the channels that the element is not in.
        spoilt = ~np.isfinite(layer.running_mean)
        assert spoilt.sum() == 1
        np.testing.assert_array_equal(
            layer.running_mean[~spoilt], clean_layer.running_mean[~spoilt]
        )
        np.testing.assert_array_equal(layer.running_var[~spoilt], clean_layer.running_var[~spoilt])


@pytest.mark.parametrize(
    "name",
    [
        *("BatchNorm2d", "BatchNorm2d-last", "BatchNorm1d", "Norm-batch-1-axis"),
        *("Norm-columns-tracked", "Norm-all-rows-tracked", "Norm-features-channel"),
    ],
)
def test_a_nan_in_evaluation_is_alone(name):
    case = by_id[name]
    layer, x = case.layer(np.float32).eval(), case.input(np.float32)
    expected = layer(x)
    where = (1,) * x.ndim
    x[where] = np.nan
    y = layer(x)
    assert np.isnan(y[where])
    y[where] = expected[where]
    np.testing.assert_array_equal(y, expected)
    dx = layer.backward(np.ones_like(x))
    assert np.isfinite(dx).all()  # the gradient does not depend on x


def test_a_nan_leaves_the_weights_of_other_groups_alone():
    # Four samples at a time share memory with the next ones, of which there are fewer at the end.
    layer, x = nn.GroupNorm(2, 8), normal(17, 8, 3, 3, dtype=np.float32)
    x[7, 5, 1, 1] = np.nan
    layer(x)
    layer.backward(np.ones_like(x))
    for gradient in layer.gradients().values():
        np.testing.assert_array_equal(np.isfinite(gradient[:4]), True)


@pytest.mark.parametrize("name", ACCURATE)
def test_a_nan_in_dy_stays_in_its_group(name):
    case = by_id[name]
    shape = case.shape
    x, dy = (normal(*shape, seed=s, dtype=np.float32) for s in (0, 1))
    where = (1, *(s // 2 for s in shape[1:]))
    layers = [case.layer(np.float32) for _ in range(2)]
    for layer in layers:
        layer(x)
    dx = layers[0].backward(dy)
    dy[where] = np.nan
    got = layers[1].backward(dy)
    together = reach(case, only(shape, where))
    np.testing.assert_array_equal(got[~together], dx[~together])
    assert np.isnan(got[together]).all()
