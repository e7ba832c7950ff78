"""float64 values whose squares are not numbers, and groups of a single value."""

import numpy as np
import pytest
from cases import assert_close, normal

import numbanorm as nn
import numbanorm.functional as F
from numbanorm.tuning import use

# eps, beside such variances, is nothing.
LAYERS = {
    "BatchNorm": lambda eps: nn.BatchNorm2d(4, eps=eps, dtype=np.float64),
    "BatchNorm-last": lambda eps: nn.BatchNorm(6, eps=eps, axis=-1, dtype=np.float64),
    "InstanceNorm": lambda eps: nn.InstanceNorm2d(4, eps=eps, affine=True, dtype=np.float64),
    "GroupNorm": lambda eps: nn.GroupNorm(2, 4, eps=eps, dtype=np.float64),
    "LayerNorm": lambda eps: nn.LayerNorm(6, eps=eps, dtype=np.float64),
    "RMSNorm": lambda eps: nn.RMSNorm(6, eps=eps, dtype=np.float64),
    "SwitchableNorm": lambda eps: nn.SwitchableNorm2d(4, eps=eps, dtype=np.float64),
    "SwitchableNorm-gn": lambda eps: nn.SwitchableNorm2d(
        4, eps=eps, over=("in", "gn"), num_groups=2, dtype=np.float64
    ),
    "Norm": lambda eps: nn.Norm((1, 3), groups=2, eps=eps, dtype=np.float64),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
SHAPE = 3, 4, 5, 6
MAGNITUDES = [1e100, 1e120, 1e150, 1e160, 1e300]
X, DY = normal(*SHAPE), normal(*SHAPE, seed=1)


def fill(layer):
    for k, parameter in enumerate(layer.parameters().values()):
        parameter += normal(*parameter.shape, seed=k) / 3
    return layer


def both(layer, x, dy=DY, **options):
    """Return y and all gradients."""
    layer = fill(layer)
    layer(x)  # weights that come with the first x
    y = layer(x, **options)
    return {"y": y, "dx": layer.backward(dy)} | layer.gradients()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@every_layer
def test_y_and_gradients_do_not_depend_on_the_magnitude(make, magnitude, masked):
    mask = normal(*SHAPE, seed=2) < 0.7
    mask[..., :2] = True  # the variance of one value is eps
    options = {"mask": mask} if masked else {}
    expected = both(make(0.0), X, **options)
    found = both(make(1e-5), X * magnitude, **options)
    found["dx"] *= magnitude
    for name, value in expected.items():
        assert_close(found[name], value, scale=100, what=name)


@every_layer
def test_other_groups_are_as_they_were(make):
    # A sample, a channel and a group are large, what shares nothing with them is not.
    x = X.copy()
    x[0, 0] *= 1e200
    large, small = both(make(1e-5), x), both(make(1e-5), X)
    layer = make(1e-5)
    if isinstance(layer, nn.SwitchableNorm):
        return
    axes = {"BatchNorm": np.s_[:, 1:], "InstanceNorm": np.s_[:, 1:]}
    name = type(layer).__name__.removesuffix("2d")
    rest = axes.get(name, np.s_[1:]) if getattr(layer, "axis", 1) == 1 else None
    if rest is not None:
        np.testing.assert_array_equal(large["y"][rest], small["y"][rest])
        np.testing.assert_array_equal(large["dx"][rest], small["dx"][rest])
    assert np.isfinite(large["y"]).all() and np.isfinite(large["dx"]).all()


@every_layer
def test_in_place_and_over_the_residual(make):
    expected = fill(make(1e-5))
    y = expected(X * 1e160, residual=DY)
    for over in ("x", "residual"):
        arrays = {"x": X * 1e160, "residual": DY.copy()}
        layer = fill(make(1e-5))
        found = layer(arrays["x"], residual=arrays["residual"], out=arrays[over])
        assert found is arrays[over]
        assert_close(found, y, scale=100, what=over)
        with pytest.raises(RuntimeError, match=f"wrote y over {over}"):
            layer.backward(DY)


def test_running_statistics_are_those_of_x():
    x = X.copy()
    x[:, 0] *= 1e160
    for layer in (
        nn.BatchNorm2d(4, momentum=1.0, dtype=np.float64),
        nn.SwitchableNorm2d(4, momentum=1.0, over=("in", "bn"), dtype=np.float64),
    ):
        layer(x)
        np.testing.assert_allclose(layer.running_mean, x.mean((0, 2, 3)))
        np.testing.assert_allclose(layer.running_var[1:], X.var((0, 2, 3), ddof=1)[1:])
        assert layer.running_var[0] == np.inf  # no float64 is as large


def test_evaluation_of_several_statistics():
    mean, var = normal(4, seed=3), normal(4, seed=4) ** 2 + 1
    args = np.ones(3), np.ones(3)
    options = {"training": False, "eps": 0.0}
    expected = F.switchable_norm(X, *args, None, None, mean, var, **options)
    # 1e150 squared is a number: running statistics can be that large.
    found = F.switchable_norm(X * 1e150, *args, None, None, mean * 1e150, var * 1e300, **options)
    assert_close(found, expected, scale=100)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_group(bad):
    x = X * 1e160
    x[0, 0, 0, 0] = bad
    y = nn.LayerNorm(6, dtype=np.float64)(x)
    assert np.isnan(y[0, 0, 0]).all()
    rest = np.ones(SHAPE[:3], bool)
    rest[0, 0, 0] = False
    assert_close(y[rest], nn.LayerNorm(6, eps=0.0, dtype=np.float64)(X)[rest], scale=100)


def test_a_constant_is_the_bias():
    layer = fill(nn.LayerNorm(6, dtype=np.float64))
    x = np.full(SHAPE, 1e160)
    x[0] *= X[0]
    y = layer(x)
    np.testing.assert_array_equal(y[1:], np.broadcast_to(layer.bias, y[1:].shape))
    dx, small = layer.backward(DY), fill(nn.LayerNorm(6, dtype=np.float64))
    small(np.ones(SHAPE))
    np.testing.assert_array_equal(dx[1:], small.backward(DY)[1:])


SINGLE = {
    "LayerNorm": (lambda **k: nn.LayerNorm(1, **k), (9, 1)),
    "GroupNorm": (lambda **k: nn.GroupNorm(4, 4, **k), (5, 4)),
    "InstanceNorm": (lambda **k: nn.InstanceNorm1d(4, affine=True, **k).eval(), (3, 4, 1)),
    "SwitchableNorm": (lambda **k: nn.SwitchableNorm(4, over=("in",), **k), (5, 4)),
    "Norm": (lambda **k: nn.Norm(0, shape=4, **k), (1, 4)),
}


@pytest.mark.parametrize("whole", [True, False], ids=["groups", "pieces"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("make", "shape"), SINGLE.values(), ids=SINGLE)
def test_y_of_a_single_value_does_not_depend_on_it(make, shape, dtype, whole):
    layer = fill(make(dtype=dtype))
    x, dy = (normal(*shape, seed=s, dtype=dtype) for s in (0, 1))
    with use(whole_groups=whole):
        layer(x)
        np.testing.assert_array_equal(layer.backward(dy), 0)
        x[-1] = np.nan
        layer(x)
        dx = layer.backward(dy)
    assert np.isnan(dx[-1]).all()
    np.testing.assert_array_equal(dx[:-1], 0)
