"""Attributes of a layer that are set later are checked as in the constructor, or cannot be set."""

import numpy as np
import pytest
from cases import normal

import numbanorm as nn

LAYERS = {
    "BatchNorm2d": lambda **k: nn.BatchNorm2d(4, **k),
    "InstanceNorm2d": lambda **k: nn.InstanceNorm2d(4, affine=True, track_running_stats=True, **k),
    "GroupNorm": lambda **k: nn.GroupNorm(2, 4, **k),
    "LayerNorm": lambda **k: nn.LayerNorm(5, **k),
    "RMSNorm": lambda **k: nn.RMSNorm(5, **k),
    "SwitchableNorm2d": lambda **k: nn.SwitchableNorm2d(4, **k),
    "Norm": lambda **k: nn.Norm((0, 2, 3), track_stats=True, **k),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
X = normal(3, 4, 2, 5, dtype=np.float32)

WRONG = [
    ("eps", -1), ("eps", np.nan), ("eps", np.inf), ("eps", "small"), ("eps", True), ("eps", [1]),
    ("momentum", 3), ("momentum", -0.1), ("momentum", np.nan), ("momentum", "big"),
    ("training", "eval"), ("training", None), ("training", 1), ("skip_nonfinite", "yes"),
    ("device", "cuda"),
]  # fmt: skip
FIXED = {
    "BatchNorm2d": {"num_features": 3, "affine": False, "axis": -1, "dtype": np.float64},
    "InstanceNorm2d": {"num_features": 3, "affine": False, "track_running_stats": False},
    "GroupNorm": {"num_groups": 3, "num_channels": 6, "axis": -1, "groups": 4},
    "LayerNorm": {"normalized_shape": 4, "elementwise_affine": False, "axes": (1,)},
    "RMSNorm": {"normalized_shape": (2, 5), "center": True},
    "SwitchableNorm2d": {"over": ("in",), "num_groups": 2, "sample_variance": True},
    "Norm": {"axes": 1, "groups": 2, "shape": (4,), "feature_axes": 1, "track_stats": False},
}


def check_unchanged(layer, other):
    assert repr(layer) == repr(other)
    assert layer.training is other.training
    np.testing.assert_array_equal(layer(X), other(X))
    np.testing.assert_array_equal(layer.backward(X), other.backward(X))


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
@every_layer
def test_a_wrong_value_is_refused(make, name, value):
    layer = make()
    with pytest.raises((TypeError, ValueError), match=f"^{name}: .*needed"):
        setattr(layer, name, value)
    check_unchanged(layer, make())


@every_layer
def test_train_takes_no_words(make):
    layer = make()
    for mode in ("eval", "train", None, 0):
        with pytest.raises(TypeError, match="mode: True or False is needed"):
            layer.train(mode)
    assert layer.training is True
    assert layer.train(np.False_).training is False


@pytest.mark.parametrize(
    ("layer", "name", "value"), [(k, *item) for k, v in FIXED.items() for item in v.items()]
)
def test_what_all_depends_on_cannot_be_set(layer, name, value):
    changed = LAYERS[layer]()
    with pytest.raises(AttributeError, match=name):
        setattr(changed, name, value)
    check_unchanged(changed, LAYERS[layer]())


@every_layer
def test_right_values_are_as_in_the_constructor(make):
    layer = make()
    layer.eps, layer.momentum = np.float32(0.5), 1
    assert (type(layer.eps), type(layer.momentum)) == (float, float)
    np.testing.assert_array_equal(layer(X), make(eps=0.5)(X))
    layer.momentum = None
    assert layer.momentum is None
    layer.weight = 2 * layer.weight
    assert (layer.weight == 2).all()


@pytest.mark.parametrize("make", [LAYERS["RMSNorm"], LAYERS["Norm"]], ids=["RMSNorm", "Norm"])
def test_eps_of_the_type(make):
    layer = make()
    layer.eps = None
    np.testing.assert_array_equal(layer(X), make(eps=None)(X))


@pytest.mark.parametrize("make", [LAYERS[k] for k in ("BatchNorm2d", "GroupNorm", "LayerNorm")])
def test_eps_is_a_number_where_the_constructor_wants_one(make):
    with pytest.raises(TypeError, match="eps"):
        make().eps = None
    with pytest.raises(TypeError, match="eps"):
        make(eps=None)


@every_layer
def test_device_and_dtype_as_in_pytorch(make):
    layer = make(device=None, dtype=None)
    assert (repr(layer), layer.dtype) == (repr(make()), np.float32)
    assert repr(make(device="cpu")) == repr(make())
    for device in ("cuda", "cuda:0", "meta", 0):
        with pytest.raises(ValueError, match="device"):
            make(device=device)
