"""Every layer against its definition: modes, shapes, memory layouts, types, `out`."""

import copy
import pickle

import numpy as np
import pytest
from cases import (
    CASES,
    CHANNEL_SHAPES,
    DTYPES,
    FEW,
    OUT_LAYOUTS,
    ROW_SHAPES,
    TRACKING,
    assert_close,
    cases,
    channel,
    fill,
    layouts,
    normal,
    over_axes,
    shapes,
)

import numbanorm as nn

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
positions = pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])


@cases()
@modes
@dtypes
def test_definition(case, dtype, training):
    layer = case.layer(dtype).train(training)
    for seed in (1, 2):  # twice: running statistics move on
        x = case.input(dtype, seed=seed)
        case.check(layer, x, normal(*case.shape, seed=3, dtype=dtype))


# -- shapes --------------------------------------------------------------------------------------

FAMILIES = {
    "batch": (nn.BatchNorm, ["bn"], {}),
    "instance": (nn.InstanceNorm, ["in"], {"affine": True, "track_running_stats": True}),
    "group": (nn.GroupNorm, ["gn"], {}),
    "switchable": (nn.SwitchableNorm, ["in", "ln", "bn"], {}),
}


def channel_case(family, shape, axis):
    make, kinds, options = FAMILIES[family]
    channels = shape[1]
    if axis == -1:
        shape = (shape[0], *shape[2:], channels)
    groups = next(g for g in (3, 2, 1) if channels % g == 0)
    sizes = (groups, channels) if family == "group" else (channels,)
    tracked = None if family == "group" else kinds.index("bn") if "bn" in kinds else 0
    return channel(family, lambda **k: make(*sizes, axis=axis, **options, **k), shape, *kinds,
                   axis=axis, groups=groups, tracked=tracked)  # fmt: skip


def values_per_statistic(family, shape):
    return int(np.prod(shape[2:])) * (shape[0] if family == "batch" else 1)


@shapes(CHANNEL_SHAPES)
@positions
@pytest.mark.parametrize("family", FAMILIES)
@dtypes
def test_channel_shapes(shape, axis, family, dtype):
    case = channel_case(family, shape, axis)
    layer, x = case.layer(dtype), case.input(dtype)
    dy = normal(*x.shape, seed=1, dtype=dtype)
    if family in ("batch", "instance") and values_per_statistic(family, shape) == 1:
        with pytest.raises(ValueError, match="value"):
            layer(x)
        layer.eval()
    case.check(layer, x, dy)
    case.check(layer.eval(), x, dy)


@shapes(ROW_SHAPES)
@pytest.mark.parametrize("center", [True, False], ids=["LayerNorm", "RMSNorm"])
@dtypes
def test_row_shapes(shape, center, dtype):
    make = nn.LayerNorm if center else nn.RMSNorm
    for axes in [(-1,), (-2, -1)][: len(shape) - 1]:
        normalized = shape[-len(axes) :]
        case = over_axes("rows", lambda n=normalized, **k: make(n, **k), shape, axes, axes,
                         center=center, eps=1e-5 if center else None)  # fmt: skip
        x, dy = case.input(dtype), normal(*shape, seed=1, dtype=dtype)
        case.check(case.layer(dtype), x, dy)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3, 0)], ids=str)
@pytest.mark.parametrize("make", [nn.BatchNorm, nn.InstanceNorm, nn.SwitchableNorm])
def test_no_values_leave_running_statistics_alone(make, shape):
    layer = fill(make(3, track_running_stats=True))
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    y = layer(np.zeros(shape, np.float32))
    assert layer.backward(np.zeros(shape, np.float32)).shape == y.shape == shape
    np.testing.assert_array_equal(layer.running_mean, mean)
    np.testing.assert_array_equal(layer.running_var, var)
    for gradient in layer.gradients().values():
        np.testing.assert_array_equal(gradient, 0)


# -- memory layouts ------------------------------------------------------------------------------


@cases(*FEW)
@layouts()
@dtypes
def test_layout_of_x(case, layout, dtype):
    x, dy = case.input(dtype), normal(*case.shape, seed=1, dtype=dtype)
    laid_out = layout(x)
    case.check(case.layer(dtype), laid_out, dy)
    np.testing.assert_array_equal(laid_out, x)  # never written to


@cases(*FEW)
@layouts()
def test_layout_of_dy(case, layout):
    x, dy = case.input(np.float32), normal(*case.shape, seed=1, dtype=np.float32)
    laid_out = layout(dy)
    case.check(case.layer(np.float32), x, laid_out)
    case.check(case.layer(np.float32), layout(x), laid_out)
    np.testing.assert_array_equal(laid_out, dy)


@cases(*FEW)
def test_outputs_are_new_and_c_contiguous(case):
    layer, x = case.layer(), np.asfortranarray(case.input())
    y = layer(x)
    dx = layer.backward(np.asfortranarray(y))
    for array in (y, dx):
        assert array.flags.c_contiguous and array.flags.writeable
        assert not np.shares_memory(array, x)


@cases(*FEW)
def test_broadcast_x_and_dy(case):
    for axis in range(len(case.shape)):
        small = tuple(1 if a == axis else s for a, s in enumerate(case.shape))
        x = np.broadcast_to(normal(*small), case.shape)
        case.check(case.layer(), x, np.broadcast_to(normal(*small, seed=1), case.shape))
    one = np.broadcast_to(np.float64(1.5), case.shape)
    case.check(case.layer(), case.input(), one)


@cases("BatchNorm2d", "LayerNorm-3axes", "SwitchableNorm2d", "GroupNorm")
def test_big_and_laid_out_otherwise(case):
    # Enough for several chunks, so that each of them meets the strides.
    shape = (5, *case.shape[1:-1], 1111) if case.id != "LayerNorm-3axes" else (700, 2, 4, 5)
    x, dy = (normal(*shape, seed=s, dtype=np.float32) for s in (0, 1))
    for order in ((3, 2, 1, 0), (0, 2, 3, 1), (1, 0, 2, 3)):
        back = np.argsort(order)
        other = np.ascontiguousarray(x.transpose(order)).transpose(back)
        case.check(case.layer(np.float32), other, dy)
        case.check(case.layer(np.float32), x, other)


def test_array_likes_are_arrays():
    layer = fill(nn.LayerNorm(3))
    x = [[1.0, 2.0, 4.0], [0.5, 0.25, 9.0]]
    np.testing.assert_array_equal(layer(x), layer(np.array(x)))
    layer(x)
    dx = layer.backward(x)
    layer(np.array(x))
    np.testing.assert_array_equal(dx, layer.backward(np.array(x)))


def test_other_byte_order():
    x, dy = normal(3, 4, dtype=np.float32), normal(3, 4, seed=1, dtype=np.float32)
    layer = fill(nn.LayerNorm(4))
    expected = layer(x), layer.backward(dy)
    other = x.dtype.newbyteorder()
    found = layer(x.astype(other)), layer.backward(dy.astype(other))
    for array, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, wanted, strict=True)


# -- types ---------------------------------------------------------------------------------------


@cases(*FEW)
def test_float64_x_in_a_float32_layer(case):
    layer, x, dy = case.layer(np.float32), case.input(), normal(*case.shape, seed=1)
    naive = case.naive(layer, x)
    y = layer(x)
    dx = layer.backward(dy)
    assert y.dtype == dx.dtype == np.float64
    # The parameters are float32 numbers, but the arithmetic is float64.
    assert_close(y, naive.y, scale=1)
    assert_close(dx, naive.backward(dy)["dx"], scale=naive.scale["dx"])
    assert all(g.dtype == np.float32 for g in layer.gradients().values())


@cases(*FEW)
def test_float32_x_in_a_float64_layer(case):
    layer, x = case.layer(np.float64), case.input(np.float32)
    case.check(layer, x, normal(*case.shape, seed=1, dtype=np.float32))
    assert all(g.dtype == np.float64 for g in layer.gradients().values())


@cases(*FEW)
@dtypes
def test_dy_of_the_other_type_is_converted(case, dtype):
    other = np.float64 if dtype is np.float32 else np.float32
    x, dy = case.input(dtype), normal(*case.shape, seed=1, dtype=np.float32)
    layers = [case.layer(dtype), case.layer(dtype)]
    for layer in layers:
        layer(x)
    dx = layers[0].backward(dy.astype(other))
    assert dx.dtype == dtype
    np.testing.assert_array_equal(dx, layers[1].backward(dy.astype(dtype)))


def test_the_default_is_float32():
    layer = nn.BatchNorm2d(3)
    kept = [*layer.parameters().values(), *layer.gradients().values(), layer.running_mean,
            layer.running_var]  # fmt: skip
    assert {a.dtype for a in kept} == {np.dtype(np.float32)}
    kept = nn.SwitchableNorm2d(3, dtype=np.float64)
    assert {a.dtype for a in kept.parameters().values()} == {np.dtype(np.float64)}


# -- out -----------------------------------------------------------------------------------------


@cases(*FEW)
@layouts("out_layout", OUT_LAYOUTS)
@modes
def test_out(case, out_layout, training):
    x, dy = (normal(*case.shape, seed=s, dtype=np.float32) for s in (0, 1))
    layer = case.layer(np.float32).train(training)
    y, dx = (out_layout(np.full(case.shape, np.nan, np.float32)) for _ in range(2))

    def forward(layer, x):
        assert layer(x, out=y) is y
        return y

    def backward(layer, dy):
        assert layer.backward(dy, out=dx) is dx
        return dx

    case.check(layer, x, dy, forward=forward, backward=backward)


@cases()
def test_out_leaves_what_is_around_it_alone(case):
    x = case.input()
    wide = np.full([s + 2 for s in x.shape], 7.0)
    inner = (slice(1, -1),) * x.ndim
    layer = case.layer()
    layer(x, out=wide[inner])
    layer.backward(normal(*case.shape, seed=1), out=wide[inner])
    wide[inner] = 7.0
    np.testing.assert_array_equal(wide, 7.0)


def _neighbours(shape, axis, step):
    """Give two arrays of one piece of memory: halves of an axis, or every second of it."""
    wide = np.full([2 * s if a == axis else s for a, s in enumerate(shape)], np.nan, np.float32)
    n = shape[axis]
    halves = (slice(n), slice(n, None)) if step == 1 else (slice(0, None, 2), slice(1, None, 2))
    return tuple(np.moveaxis(np.moveaxis(wide, axis, 0)[h], 0, axis) for h in halves)


@cases(*FEW)
@pytest.mark.parametrize("step", [1, 2], ids=["halves", "every second"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_out_beside_the_input(case, step, masked):
    # Their ranges of memory overlap, their elements do not.
    mask = normal(*case.shape, seed=2) < 0.5 if masked else None
    for axis in (0, 1, -1):
        axis %= len(case.shape)
        (x, y), (dy, dx) = (_neighbours(case.shape, axis, step) for _ in range(2))
        x[...], dy[...] = case.input(np.float32), case.input(np.float32, seed=1)
        kept = x.copy(), dy.copy()
        case.check(
            case.layer(np.float32), x, dy, mask,
            forward=lambda layer, x, y=y: layer(x, mask=mask, out=y),
            backward=lambda layer, dy, dx=dx: layer.backward(dy, out=dx),
        )  # fmt: skip
        np.testing.assert_array_equal(x, kept[0])
        np.testing.assert_array_equal(dy, kept[1])


@cases()
@modes
def test_in_place(case, training):
    x, dy = case.input(), normal(*case.shape, seed=1)
    layer, other = (case.layer().train(training) for _ in range(2))
    expected = other(x.copy())
    assert layer(x, out=x) is x
    np.testing.assert_array_equal(x, expected)
    if case.tracked is not None:
        np.testing.assert_array_equal(layer.running_var, other.running_var)
    with pytest.raises(RuntimeError, match="out"):
        layer.backward(dy)


@cases(*FEW)
@layouts("in_place_layout", OUT_LAYOUTS)
def test_in_place_and_laid_out_otherwise(case, in_place_layout):
    x = case.input(np.float32)
    expected = case.layer(np.float32)(x)
    laid_out = in_place_layout(x.copy())
    case.layer(np.float32)(laid_out, out=laid_out)
    assert_close(laid_out, expected, scale=1)


@cases()
@modes
def test_dx_in_place_of_dy(case, training):
    x, dy = case.input(), normal(*case.shape, seed=1)

    def backward(layer, dy):
        gradient = dy.copy()
        assert layer.backward(gradient, out=gradient) is gradient
        return gradient

    case.check(case.layer().train(training), x, dy, backward=backward)


@cases(*FEW)
def test_out_that_is_x_by_another_name(case):
    # The same memory, looked at through a new view: y is there, or it is refused, but backward
    # never takes y for x.
    layer, x = case.layer(), case.input()
    expected = case.layer()(x.copy())
    try:
        y = layer(x, out=x[...])
    except ValueError:
        return
    np.testing.assert_array_equal(y, expected)
    with pytest.raises(RuntimeError):
        layer.backward(np.ones(case.shape))


@cases(*FEW)
def test_forward_and_backward_of_the_same_layer_again(case):
    layer = case.layer()
    for seed in range(4):
        shape = (case.shape[0] + seed, *case.shape[1:])
        case.check(layer, normal(*shape, seed=seed), normal(*shape, seed=9))


@cases(*FEW)
def test_a_view_of_x_may_go_out_of_scope(case):
    layer = case.layer()
    x, dy = case.input(), normal(*case.shape, seed=1)
    layer(x)
    expected = layer.backward(dy)
    layer(x.copy())  # only the layer keeps this one
    np.testing.assert_array_equal(layer.backward(dy), expected)


# -- the generic layer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "options", "shape"),
    [
        ((0, 2, 3), {}, (4,)),  # BatchNorm's rule: the kept axes
        ((0, 2), {}, (4, 6)),
        (0, {}, (4, 5, 6)),
        ((0, 1, 2, 3), {}, ()),
        ((1, 2, 3), {}, (4, 5, 6)),  # LayerNorm's: the reduced ones
        (-1, {}, (6,)),
        ((3, 1), {}, (4, 6)),
        ((-4, -1), {}, (4, 5)),
        ((2, 3), {"feature_axes": 1}, (4,)),
        ((2, 3), {"feature_axes": (-1, 1)}, (4, 6)),
        ((2, 3), {"feature_axes": (0, 1, 2, 3)}, (3, 4, 5, 6)),
        ((1, 2, 3), {"feature_axes": 1, "groups": 2}, (4,)),
    ],
    ids=str,
)
def test_parameters_have_the_sizes_of_the_feature_axes(axes, options, shape):
    layer = nn.Norm(axes, **options)
    layer(normal(3, 4, 5, 6, dtype=np.float32))
    assert layer.weight.shape == layer.bias.shape == shape
    np.testing.assert_array_equal(layer.weight, 1)
    np.testing.assert_array_equal(layer.bias, 0)


@pytest.mark.parametrize(
    ("axes", "options", "shape"),
    [
        ((0, 2, 3), {}, (4,)),
        ((0, 2), {}, (4, 6)),
        ((2, 3), {}, (4,)),  # averaged over axis 0
        (-1, {}, (4, 5)),
        ((1, 2, 3), {}, ()),
        ((1, 2, 3), {"feature_axes": 1, "groups": 2}, (2,)),
        ((0, 1, 2, 3), {"feature_axes": 1, "groups": 2}, (2,)),
    ],
    ids=str,
)
def test_running_statistics_span_the_kept_axes(axes, options, shape):
    layer = nn.Norm(axes, track_stats=True, **options)
    layer(normal(3, 4, 5, 6, dtype=np.float32))
    assert layer.running_mean.shape == layer.running_var.shape == shape
    assert layer.num_batches_tracked == 1


def test_parameters_come_from_the_first_x_or_from_shape():
    layer = nn.Norm((0, 2))
    assert layer.weight is None
    layer(normal(2, 3, 4, dtype=np.float32))
    weight = layer.weight
    layer(normal(5, 3, 7, dtype=np.float32))
    assert layer.weight is weight
    with pytest.raises(ValueError, match="x"):
        layer(normal(2, 4, 4, dtype=np.float32))
    given = nn.Norm((0, 2), shape=(3,))
    assert given.weight.shape == given.bias.shape == given.gradients()["weight"].shape == (3,)
    with pytest.raises(ValueError, match="x"):
        given(normal(2, 4, 4, dtype=np.float32))


def test_a_failed_first_call_creates_no_parameters():
    layer = nn.Norm((0, 2), track_stats=True)
    with pytest.raises(ValueError, match="out"):
        layer(normal(2, 3, 4, dtype=np.float32), out=np.empty((2, 3), np.float32))
    assert layer.weight is None
    layer(normal(2, 5, 4, dtype=np.float32))
    assert layer.weight.shape == (5,)


def test_a_state_dict_loads_before_the_first_x():
    layer = nn.Norm((0, 2), track_stats=True)
    layer(normal(2, 3, 4, dtype=np.float32))
    fill(layer).eval()
    fresh = nn.Norm((0, 2), track_stats=True).eval()
    fresh.load_state_dict(layer.state_dict())
    x = normal(4, 3, 2, dtype=np.float32)
    np.testing.assert_array_equal(fresh(x), layer(x))


def test_without_affine_there_are_no_parameters():
    layer = nn.Norm((0, 2), affine=False, track_stats=True)
    layer(normal(2, 3, 4, dtype=np.float32))
    assert layer.weight is layer.bias is None
    assert layer.parameters() == layer.gradients() == {}
    assert set(layer.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}


def test_without_bias_there_is_weight_only():
    layer = nn.Norm(-1, bias=False)
    layer(normal(2, 3, dtype=np.float32))
    assert layer.bias is None
    assert (
        set(layer.parameters()) == set(layer.gradients()) == set(layer.state_dict()) == {"weight"}
    )


def test_the_layers_are_norms():
    layers = [case.make(dtype=np.float32) for case in CASES]
    assert all(isinstance(layer, nn.Norm) for layer in layers)


def test_evaluation_without_running_statistics_is_as_training():
    x = normal(3, 4, 5, dtype=np.float32)
    layer = fill(nn.Norm((0, 2), shape=(4,)))
    np.testing.assert_array_equal(layer(x), layer.eval()(x))


# -- running statistics --------------------------------------------------------------------------


def tracking():
    return cases(*(case.id for case in CASES if case.tracked is not None))


@tracking()
def test_running_statistics_start_at_0_and_1(case):
    layer = case.layer(np.float32, filled=False)
    if type(layer) is nn.Norm:  # which has seen one batch: its shape comes from there
        assert layer.num_batches_tracked == 1
        return
    np.testing.assert_array_equal(layer.running_mean, 0)
    np.testing.assert_array_equal(layer.running_var, 1)
    count = layer.num_batches_tracked
    assert (count, count.shape, count.dtype) == (0, (), np.int64)


@tracking()
def test_num_batches_tracked_counts_training_forwards(case):
    layer = case.layer()
    start = int(layer.num_batches_tracked)
    for _ in range(3):
        layer(case.input())
    layer.eval()
    layer(case.input())
    assert layer.num_batches_tracked == start + 3


@tracking()
def test_evaluation_leaves_running_statistics_alone(case):
    layer = case.layer().eval()
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    layer(case.input())
    layer.backward(case.input())
    np.testing.assert_array_equal(layer.running_mean, mean)
    np.testing.assert_array_equal(layer.running_var, var)


def test_momentum_none_is_the_plain_average():
    batches = [normal(6, 3, 4, seed=s, offset=s) for s in range(5)]
    layer = nn.BatchNorm1d(3, momentum=None, dtype=np.float64)
    for batch in batches:
        layer(batch)
    np.testing.assert_allclose(layer.running_mean, np.mean([b.mean((0, 2)) for b in batches], 0))
    np.testing.assert_allclose(
        layer.running_var, np.mean([b.var((0, 2), ddof=1) for b in batches], 0)
    )


CUMULATIVE = {
    "BatchNorm": lambda **k: nn.BatchNorm1d(3, momentum=None, **k),
    "InstanceNorm": lambda **k: nn.InstanceNorm1d(
        3, momentum=None, track_running_stats=True, **k
    ),
    "SwitchableNorm": lambda **k: nn.SwitchableNorm1d(3, momentum=None, **k),
    "Norm": lambda **k: nn.Norm((0, 2), track_stats=True, momentum=None, **k),
}  # fmt: skip
cumulative = pytest.mark.parametrize("make", CUMULATIVE.values(), ids=CUMULATIVE)


def go_on(how, layer, make):
    """Return the layer after it was kept in some way."""
    if how == "state dict":
        new = make(dtype=np.float64, skip_nonfinite=True)
        new.load_state_dict(layer.state_dict())
        return new
    return {"itself": lambda m: m, "pickle": lambda m: pickle.loads(pickle.dumps(m)),
            "copy": copy.deepcopy}[how](layer)  # fmt: skip


@pytest.mark.parametrize("how", ["itself", "pickle", "copy", "state dict"])
@cumulative
def test_momentum_none_is_the_average_of_what_was_tracked(make, how):
    # Neither a batch that is skipped nor an empty one nor one that is wholly masked.
    layer = make(dtype=np.float64, skip_nonfinite=True)
    batches = [normal(6, 3, 4, seed=s, offset=s) for s in range(5)]
    spoiled = batches[0].copy()
    spoiled[1, 1, 1] = np.nan
    layer(batches[0])
    layer(spoiled)
    layer(batches[1])
    layer(batches[1], mask=False)
    layer(np.zeros((0, 3, 4)))
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (2, 1)
    layer = go_on(how, layer, make)
    for x in (batches[2], spoiled, *batches[3:]):
        layer(x)
    assert layer.num_batches_tracked == 5
    np.testing.assert_allclose(layer.running_mean, np.mean([b.mean((0, 2)) for b in batches], 0))


@pytest.mark.parametrize("how", ["itself", "pickle", "copy", "state dict"])
@cumulative
def test_momentum_none_counts_by_channel(make, how):
    layer = make(dtype=np.float64)
    batches = [normal(6, 3, 4, seed=s, offset=s) for s in range(5)]
    first = np.array([True, True, False])[:, None]
    layer(batches[0])
    layer(batches[1], mask=first)
    layer(batches[2], mask=~first)
    assert layer.num_batches_tracked == 3
    kept = layer.running_mean.copy()
    means = [b.mean((0, 2)) for b in batches]
    expected = np.where(first[:, 0], means[0] + means[1], means[0] + means[2]) / 2
    np.testing.assert_allclose(kept, expected)
    layer = go_on(how, layer, make)
    layer(batches[3])
    layer(batches[4])
    # A state dict has one number for all channels.
    n = 3 if how == "state dict" else 2
    np.testing.assert_allclose(layer.running_mean, (n * kept + means[3] + means[4]) / (n + 2))
    layer.reset_running_stats()
    layer(batches[0])
    np.testing.assert_allclose(layer.running_mean, means[0])


@pytest.mark.parametrize("momentum", [0, 0.0, 0.25, 1, 1.0])
def test_momentum_weights_the_new_value(momentum):
    x = normal(6, 3, 4)
    layer = fill(nn.BatchNorm1d(3, momentum=momentum, dtype=np.float64))
    old = layer.running_mean.copy()
    layer(x)
    expected = (1 - momentum) * old + momentum * x.mean((0, 2))
    np.testing.assert_allclose(layer.running_mean, expected, rtol=1e-13, atol=1e-15)


def test_one_value_has_no_unbiased_variance_and_stays_finite():
    for layer in (nn.SwitchableNorm(3), nn.Norm((0, 2), shape=(3,), track_stats=True)):
        layer(np.full((1, 3, 1), 5.0, np.float32))
        np.testing.assert_allclose(layer.running_mean, 0.5, rtol=1e-6)
        np.testing.assert_allclose(layer.running_var, 0.9, rtol=1e-6)


# -- batches that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@cases(*TRACKING)
def test_skip_nonfinite(case, bad):
    good = [case.input(np.float32, seed=s) for s in range(2)]
    spoiled = case.input(np.float32, seed=2)
    spoiled.flat[-5] = bad
    plain, skipping = case.layer(np.float32), case.layer(np.float32, skip_nonfinite=True)
    for x in good:
        plain(x)
    for x in (good[0], spoiled, good[1]):
        skipping(x)
    assert skipping.num_batches_skipped == 1
    # The cumulative average counts the batches that are in it.
    np.testing.assert_array_equal(skipping.running_mean, plain.running_mean)
    np.testing.assert_array_equal(skipping.running_var, plain.running_var)


@cases(*TRACKING)
def test_without_skip_nonfinite_only_its_channel_is_lost(case):
    layer, x = case.layer(np.float32), case.input(np.float32)
    x.flat[-5] = np.nan
    layer(x)
    lost = ~np.isfinite(layer.running_mean)
    assert lost.sum() == 1
    np.testing.assert_array_equal(~np.isfinite(layer.running_var), lost)
