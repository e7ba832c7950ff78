"""Masked-out elements take part in no statistic, and are normalised with it all the same."""

import numpy as np
import pytest
from cases import (
    DTYPES,
    FEW,
    LAYOUTS,
    SEVERAL_AXES,
    assert_close,
    by_id,
    cases,
    fill,
    layouts,
    masks,
    normal,
)

import numbanorm as nn

modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@cases(*SEVERAL_AXES)
@masks()
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_definition(case, dtype, make_mask):
    mask = make_mask(case.shape)
    x, dy = case.input(dtype), normal(*case.shape, seed=1, dtype=dtype)
    layer = case.layer(dtype)
    case.check(layer, x, dy, mask)
    case.check(layer.eval(), x, dy, mask)


@cases(*FEW)
@layouts()
def test_layouts(case, layout):
    x, dy = (layout(normal(*case.shape, seed=s, dtype=np.float32)) for s in (0, 1))
    mask = layout(normal(*case.shape, seed=2) < 0.5)
    case.check(case.layer(np.float32), x, dy, mask)
    np.testing.assert_array_equal(mask, normal(*case.shape, seed=2) < 0.5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("BatchNorm2d", (5, 4, 91, 93)),
        ("BatchNorm2d-last", (5, 91, 93, 4)),
        ("BatchNorm1d", (4099, 5)),
        ("InstanceNorm2d-tracking", (2, 4, 181, 183)),
        ("InstanceNorm2d-last", (2, 181, 183, 4)),
        ("GroupNorm", (9, 6, 49, 50)),
        ("LayerNorm", (5001, 10)),
        ("LayerNorm-3axes", (1700, 2, 4, 5)),
        ("SwitchableNorm2d", (5, 4, 91, 93)),
        ("SwitchableNorm2d-all-last", (5, 91, 93, 6)),
    ],
)
@pytest.mark.parametrize("sparse", [0.5, 0.0005], ids=["half", "few"])
def test_big(name, shape, sparse):
    # Many blocks and chunks; with few elements left, most of the blocks have nothing in them.
    case = by_id[name]
    x, dy = (normal(*shape, seed=s, dtype=np.float32) for s in (0, 1))
    mask = np.random.default_rng(2).random(shape) < sparse
    case.check(case.layer(np.float32), x, dy, mask)
    one_channel = np.random.default_rng(3).random(shape[:1] + (1,) * (len(shape) - 1)) < 0.5
    case.check(case.layer(np.float32), x, dy, one_channel)


@cases(*SEVERAL_AXES)
@modes
def test_a_mask_of_ones_is_no_mask(case, training):
    x, dy = case.input(), normal(*case.shape, seed=1)
    layers = [case.layer().train(training) for _ in range(2)]
    y = layers[0](x, mask=np.ones(case.shape, dtype=bool)), layers[1](x)
    assert_close(*y, scale=1)
    dx = [layer.backward(dy) for layer in layers]
    assert_close(*dx, scale=10)


@cases(*SEVERAL_AXES)
def test_a_mask_may_be_a_list(case):
    mask = normal(*case.shape, seed=2) < 0.5
    x = case.input()
    np.testing.assert_array_equal(case.layer()(x, mask=mask.tolist()), case.layer()(x, mask=mask))


@cases(*SEVERAL_AXES)
@modes
@pytest.mark.parametrize("bad", [np.nan, np.inf, np.finfo(np.float64).max], ids=str)
def test_what_is_masked_out_reaches_nothing(case, training, bad):
    x, dy = case.input(), normal(*case.shape, seed=1)
    mask = normal(*case.shape, seed=2) < 0.5
    dy[~mask] = 0
    clean, spoiled = (case.layer().train(training) for _ in range(2))
    y = clean(np.where(mask, x, 0), mask=mask)
    dx = clean.backward(dy)
    got = spoiled(np.where(mask, x, bad), mask=mask)
    np.testing.assert_array_equal(got[mask], y[mask])
    np.testing.assert_array_equal(spoiled.backward(dy), dx)
    for name, gradient in clean.gradients().items():
        np.testing.assert_array_equal(spoiled.gradients()[name], gradient, err_msg=name)
    for name, value in clean.state_dict().items():
        np.testing.assert_array_equal(spoiled.state_dict()[name], value, err_msg=name)


@cases(*SEVERAL_AXES)
@modes
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_what_is_not_finite_there_reaches_nothing_else_with_any_dy(case, training, bad):
    # y is not finite there, and has no gradient: as if dy were 0.
    x, dy = case.input(), normal(*case.shape, seed=1)
    mask = normal(*case.shape, seed=2) < 0.5
    layers = [case.layer().train(training) for _ in range(2)]
    layers[0](np.where(mask, x, 0), mask=mask)
    dx = layers[0].backward(np.where(mask, dy, 0))
    layers[1](np.where(mask, x, bad), mask=mask)
    got = layers[1].backward(dy)
    np.testing.assert_array_equal(got[mask], dx[mask])
    for name, gradient in layers[1].gradients().items():
        assert np.isfinite(gradient).all(), name


@cases(*SEVERAL_AXES)
def test_big_values_masked_out_cost_no_accuracy(case):
    # Finite ones as well: a padding of 1e30 is subtracted by nobody.
    x, dy = case.input(np.float32), normal(*case.shape, seed=1, dtype=np.float32)
    mask = normal(*case.shape, seed=2) < 0.5
    dy[~mask] = 0
    layers = [case.layer(np.float32) for _ in range(2)]
    y = [layers[i](np.where(mask, x, np.float32(p)), mask=mask) for i, p in enumerate((0, 1e30))]
    np.testing.assert_array_equal(y[1][mask], y[0][mask])
    np.testing.assert_array_equal(layers[1].backward(dy), layers[0].backward(dy))


@cases(*SEVERAL_AXES)
def test_a_nan_in_dy_is_in_the_gradient_of_its_own_group(case):
    # dy is not 0 at this masked-out element, so its gradient is really not a number.
    layer, x = case.layer(), case.input()
    mask = np.ones(case.shape, dtype=bool)
    first = (0,) * len(case.shape)
    mask[first] = False
    dy = normal(*case.shape, seed=1)
    dy[first] = np.nan
    layer(x, mask=mask)
    assert np.isnan(layer.backward(dy)[first])


@cases(*SEVERAL_AXES)
def test_a_nan_that_counts_is_in_every_gradient_of_its_group(case):
    # Masked-out elements are normalised, too, and to NaN: so are the gradients of their weights.
    x, dy = case.input(), normal(*case.shape, seed=1)
    mask = normal(*case.shape, seed=2) < 0.5
    x[tuple(np.argwhere(mask)[0])] = np.nan
    layer = case.layer()
    got = {"y": layer(x, mask=mask), "dx": layer.backward(dy), **layer.gradients()}
    naive = case.naive(layer, x, mask)
    for name, expected in {"y": naive.y, **naive.backward(dy)}.items():
        np.testing.assert_array_equal(np.isnan(got[name]), np.isnan(expected), name)


@cases(*SEVERAL_AXES)
def test_nothing_is_left(case):
    x, dy = case.input(), normal(*case.shape, seed=1)
    layer = case.layer()
    running = layer.running_mean, layer.running_var
    before = [None if r is None else r.copy() for r in running]
    y = layer(x, mask=np.zeros(case.shape, dtype=bool))
    if layer.bias is None:
        np.testing.assert_array_equal(y, 0)
    else:
        features = [s if a in {f % x.ndim for f in case.feature_axes} else 1
                    for a, s in enumerate(x.shape)]  # fmt: skip
        np.testing.assert_array_equal(y, np.broadcast_to(layer.bias.reshape(features), x.shape))
    np.testing.assert_array_equal(layer.backward(dy), 0)
    for name, gradient in layer.gradients().items():
        if name != "bias":
            np.testing.assert_array_equal(gradient, 0, err_msg=name)
    for now, then in zip(running, before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("axis", [1, -1])
def test_one_channel_with_nothing_left(axis):
    shape = (4, 3, 5) if axis == 1 else (4, 5, 3)
    mask = np.moveaxis(np.broadcast_to([True, False, True], (4, 5, 3)), -1, axis)
    layer = fill(nn.BatchNorm1d(3, axis=axis))
    before = layer.running_mean.copy(), layer.running_var.copy()
    y = layer(normal(*shape, dtype=np.float32), mask=mask)
    np.testing.assert_array_equal(y.take(1, axis), layer.bias[1])
    for now, then in zip((layer.running_mean, layer.running_var), before, strict=True):
        np.testing.assert_array_equal(now == then, [False, True, False])


def test_padding_is_the_shorter_sequence():
    # Claim 8 of the sources: with a mask, BatchNorm over padded sequences is that over the words.
    lengths, features = [7, 3, 1, 5], 4
    words = normal(sum(lengths), features)
    mask = np.arange(7) < np.array(lengths)[:, None]
    padded = np.zeros((4, 7, features))
    padded[mask] = words
    of_words, of_padded = (
        fill(nn.BatchNorm1d(features, axis=-1, dtype=np.float64)) for _ in range(2)
    )
    y = of_padded(padded, mask=mask[..., None])
    assert_close(y[mask], of_words(words), scale=1)
    dy = np.zeros_like(padded)
    dy[mask] = normal(*words.shape, seed=1)
    dx = of_padded.backward(dy)
    assert_close(dx[mask], of_words.backward(dy[mask]), scale=1)
    np.testing.assert_array_equal(dx[~mask], 0)
    assert of_padded.num_batches_tracked == of_words.num_batches_tracked == 1
    for name in ("running_mean", "running_var"):
        assert_close(getattr(of_padded, name), getattr(of_words, name), scale=1, what=name)
    for name, value in of_words.gradients().items():
        assert_close(of_padded.gradients()[name], value, scale=1, what=name)


@cases(*FEW)
def test_with_out_and_in_place(case):
    x, dy = case.input(), normal(*case.shape, seed=1)
    mask = normal(*case.shape, seed=2) < 0.5
    expected = case.layer()(x, mask=mask)
    for layout in LAYOUTS.values():
        y = layout(np.full(case.shape, np.nan))
        if y.flags.writeable:
            case.layer()(x, mask=mask, out=y)
            assert_close(y, expected, scale=1)
    changed = x.copy()
    case.layer()(changed, mask=mask, out=changed)
    assert_close(changed, expected, scale=1)
    layers = [case.layer() for _ in range(2)]
    for layer in layers:
        layer(x, mask=mask)
    gradient = dy.copy()
    layers[0].backward(gradient, out=gradient)
    assert_close(gradient, layers[1].backward(dy), scale=10)


def test_the_mask_is_kept_until_backward_by_value_or_by_reference():
    # As with x, it must stay as it is; a temporary one may go.
    x, dy = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    layer = fill(nn.BatchNorm1d(3, dtype=np.float64))
    layer(x, mask=x > 0)
    dx = layer.backward(dy)
    layer(x, mask=np.asfortranarray(x > 0))
    assert_close(layer.backward(dy), dx, scale=10)


@pytest.mark.parametrize("training", [True, False])
def test_one_value_counted_in_training_goes_on(training):
    # By its shape x has enough values; that the mask leaves one is no error.
    layer = fill(nn.BatchNorm1d(2)).train(training)
    mask = np.zeros((4, 1), dtype=bool)
    mask[2] = True
    y = layer(normal(4, 2, dtype=np.float32), mask=mask)
    assert np.isfinite(y).all()
    assert np.isfinite(layer.running_var).all()


def test_what_counts_first_in_narrow_rows_bounds_the_rounding():
    # Several narrow rows are seen as one, in the first of which nothing counts.
    x = normal(3, 16, 16, 4) + 1e7
    mask = np.zeros(x.shape, bool)
    mask.reshape(-1, 8, 4)[:, 7] = True
    kept = x[mask].reshape(3, -1, 4)
    found = nn.moments(x, (0, 1, 2), mask=mask)
    np.testing.assert_allclose(found.var(), kept.var((0, 1)), rtol=1e-7)
    y = nn.GroupNorm(2, 4, eps=0.0, affine=False, axis=-1, dtype=float)(x, mask=mask)
    groups = kept.reshape(3, -1, 2, 2)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / groups.std((1, 3), keepdims=True)
    np.testing.assert_allclose(y[mask].reshape(groups.shape), expected, atol=1e-7)
