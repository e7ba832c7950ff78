"""The stateless functions: the layers' arithmetic, bit for bit, in PyTorch's argument order."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from cases import assert_close, by_id, normal

import numbanorm.functional as F

TAIL = {"mask": None, "activation": None, "residual": None, "out": None}
SIGNATURES = {
    "batch_norm": (
        {"x": ..., "running_mean": ..., "running_var": ..., "weight": None, "bias": None,
         "training": False, "momentum": 0.1, "eps": 1e-5},
        {"axis": 1} | TAIL,
    ),
    "layer_norm": (
        {"x": ..., "normalized_shape": ..., "weight": None, "bias": None, "eps": 1e-5},
        TAIL,
    ),
    "instance_norm": (
        {"x": ..., "running_mean": None, "running_var": None, "weight": None, "bias": None,
         "use_input_stats": True, "momentum": 0.1, "eps": 1e-5},
        {"axis": 1} | TAIL,
    ),
    "group_norm": (
        {"x": ..., "num_groups": ..., "weight": None, "bias": None, "eps": 1e-5},
        {"axis": 1} | TAIL,
    ),
    "rms_norm": ({"x": ..., "normalized_shape": ..., "weight": None, "eps": None}, TAIL),
    "switchable_norm": (
        {"x": ..., "mean_weight": ..., "var_weight": ..., "weight": None, "bias": None,
         "running_mean": None, "running_var": None, "training": True, "momentum": 0.1,
         "eps": 1e-5},
        {"over": ("in", "ln", "bn"), "num_groups": None, "axis": 1} | TAIL,
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["", "_forward"], ids=["whole", "forward"])
@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name, suffix):
    signature = inspect.signature(getattr(F, name + suffix))
    by_position, by_keyword = {}, {}
    for p in signature.parameters.values():
        default = ... if p.default is p.empty else p.default
        (by_keyword if p.kind is p.KEYWORD_ONLY else by_position)[p.name] = default
    assert list(by_position.items()) == list(SIGNATURES[name][0].items())
    assert by_keyword == SIGNATURES[name][1]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_of_backward(name):
    parameters = inspect.signature(getattr(F, f"{name}_backward")).parameters
    assert list(parameters) == ["dy", "saved", "out", "out_residual"]
    for name in ("out", "out_residual"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


@dataclass
class Call:
    """A function with a layer's parameters, for a case of that layer."""

    name: str
    case: str
    arguments: Callable
    gradients: tuple[str, ...] = ("weight", "bias")


def running(layer):
    return {k: getattr(layer, k) for k in ("running_mean", "running_var")}


def affine(layer):
    return {"weight": layer.weight, "bias": layer.bias}


CALLS = [
    Call("batch_norm", "BatchNorm2d",
         lambda m: running(m) | affine(m) | {"training": m.training}),
    Call("batch_norm", "BatchNorm2d-last",
         lambda m: running(m) | affine(m) | {"training": m.training, "axis": -1}),
    Call("batch_norm", "BatchNorm2d-eps",
         lambda m: running(m) | affine(m) | {"training": m.training, "momentum": 0.7, "eps": 0.1}),
    Call("batch_norm", "BatchNorm2d-plain",
         lambda m: running(m) | {"training": m.training}, ()),
    Call("batch_norm", "BatchNorm2d-scale",
         lambda m: running(m) | {"weight": m.weight, "training": m.training}, ("weight",)),
    Call("batch_norm", "BatchNorm2d-untracked",
         lambda m: affine(m) | {"running_mean": None, "running_var": None, "training": True}),
    Call("instance_norm", "InstanceNorm2d", lambda m: affine(m)),
    Call("instance_norm", "InstanceNorm2d-last", lambda m: affine(m) | {"axis": -1}),
    Call("instance_norm", "InstanceNorm2d-tracking",
         lambda m: running(m) | affine(m) | {"use_input_stats": m.training}),
    Call("layer_norm", "LayerNorm", lambda m: {"normalized_shape": 10} | affine(m)),
    Call("layer_norm", "LayerNorm-3axes",
         lambda m: {"normalized_shape": [2, 4, 5]} | affine(m)),
    Call("layer_norm", "LayerNorm-plain", lambda m: {"normalized_shape": (10,)}, ()),
    Call("layer_norm", "LayerNorm-scale",
         lambda m: {"normalized_shape": (10,), "weight": m.weight}, ("weight",)),
    Call("group_norm", "GroupNorm", lambda m: {"num_groups": 2} | affine(m)),
    Call("group_norm", "GroupNorm-last", lambda m: {"num_groups": 2, "axis": -1} | affine(m)),
    Call("rms_norm", "RMSNorm",
         lambda m: {"normalized_shape": 10, "weight": m.weight}, ("weight",)),
    Call("rms_norm", "RMSNorm-2axes",
         lambda m: {"normalized_shape": (4, 5), "weight": m.weight, "eps": 1e-3}, ("weight",)),
    Call("rms_norm", "RMSNorm-plain", lambda m: {"normalized_shape": 10}, ()),
    *(
        Call("switchable_norm", case,
             lambda m, more=more: running(m) | affine(m) | more | {
                 "mean_weight": m.mean_weight, "var_weight": m.var_weight,
                 "training": m.training},
             ("weight", "bias", "mean_weight", "var_weight"))
        for case, more in [
            ("SwitchableNorm2d", {}),
            ("SwitchableNorm2d-last", {"axis": -1}),
            ("SwitchableNorm2d-all", {"over": ("gn", "bn", "in", "ln"), "num_groups": 2}),
            ("SwitchableNorm2d-no-bn", {"over": ["in", "ln"]}),
        ]
    ),
]  # fmt: skip

calls = pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c.name}-{c.case}")


@calls
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_same_as_the_layer(call, training, masked, dtype):
    case = by_id[call.case]
    layers = [case.layer(dtype).train(training) for _ in range(3)]
    x, dy = case.input(dtype), normal(*case.shape, seed=1, dtype=dtype)
    mask = normal(*case.shape, seed=2) < 0.5 if masked else None
    y = layers[0](x, mask=mask)
    dx = layers[0].backward(dy)

    function, forward, backward = (
        getattr(F, call.name + suffix) for suffix in ("", "_forward", "_backward")
    )
    np.testing.assert_array_equal(function(x, **call.arguments(layers[1]), mask=mask), y)
    got, saved = forward(x, **call.arguments(layers[2]), mask=mask)
    np.testing.assert_array_equal(got, y)
    gradients = backward(dy, saved)
    np.testing.assert_array_equal(gradients.dx, dx)
    assert gradients.dx.dtype == dtype
    for name in ("weight", "bias", "mean_weight", "var_weight"):
        value = getattr(gradients, f"d{name}", None)
        if name in call.gradients:
            expected = layers[0].gradients()[name]
            np.testing.assert_array_equal(value.astype(dtype), expected, err_msg=name)
        else:
            assert value is None
    for layer in layers[1:]:
        for name, value in running(layers[0]).items():
            np.testing.assert_array_equal(getattr(layer, name), value, err_msg=name)


@calls
def test_fields_of_the_gradients(call):
    case = by_id[call.case]
    layer, x = case.layer(), case.input()
    _, saved = getattr(F, f"{call.name}_forward")(x, **call.arguments(layer))
    gradients = getattr(F, f"{call.name}_backward")(x, saved)
    fields = ["dx", "dweight", "dbias"]
    if call.name == "switchable_norm":
        fields += ["dmean_weight", "dvar_weight"]
    assert isinstance(gradients, tuple)
    assert list(gradients._fields) == fields


@calls
def test_out(call):
    case = by_id[call.case]
    layer, x, dy = case.layer(), case.input(), normal(*case.shape, seed=1)
    function, forward, backward = (
        getattr(F, call.name + suffix) for suffix in ("", "_forward", "_backward")
    )
    expected = function(x, **call.arguments(layer))
    y = np.empty_like(x)
    assert function(x, **call.arguments(layer), out=y) is y
    np.testing.assert_array_equal(y, expected)
    got, saved = forward(x, **call.arguments(layer), out=y)
    assert got is y
    gradients = backward(dy, saved)
    _, saved = forward(x, **call.arguments(layer))
    assert backward(dy.copy(), saved, out=y).dx is y
    np.testing.assert_array_equal(y, gradients.dx)
    changed = dy.copy()
    _, saved = forward(x, **call.arguments(layer))
    assert backward(changed, saved, out=changed).dx is changed
    np.testing.assert_array_equal(changed, gradients.dx)

    overwritten = x.copy()
    got, saved = forward(overwritten, **call.arguments(layer), out=overwritten)
    assert got is overwritten
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(RuntimeError, match="out"):
        backward(dy, saved)


def test_batch_norm_evaluates_by_default():
    layer = by_id["BatchNorm2d"].layer()
    x, before = by_id["BatchNorm2d"].input(), layer.running_mean.copy()
    y = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    np.testing.assert_array_equal(y, layer.eval()(x))
    np.testing.assert_array_equal(layer.running_mean, before)


def test_running_statistics_are_updated_in_place_whatever_their_strides():
    x = normal(4, 3, 5)
    both = np.zeros((3, 2))
    F.batch_norm(x, both[:, 0], both[:, 1], training=True, momentum=1.0)
    np.testing.assert_allclose(both[:, 0], x.mean((0, 2)), rtol=1e-13)
    np.testing.assert_allclose(both[:, 1], x.var((0, 2), ddof=1), rtol=1e-13)


def test_parameters_may_be_of_any_float_type_and_strides():
    x, dy = normal(4, 3, 5, dtype=np.float32), normal(4, 3, 5, seed=1, dtype=np.float32)
    both = normal(3, 2)
    y, saved = F.batch_norm_forward(x, None, None, both[:, 0], both[::-1, 1], training=True)
    assert y.dtype == np.float32
    expected, other = F.batch_norm_forward(
        x, None, None, both[:, 0].astype(np.float32), both[::-1, 1].astype(np.float32),
        training=True,
    )  # fmt: skip
    assert_close(y, expected, scale=1)
    got = F.batch_norm_backward(dy, saved)
    for a, b in zip(got, F.batch_norm_backward(dy, other), strict=True):
        assert_close(a, b, scale=10, dtype=np.float32)


def test_arguments_stay_as_they_are():
    x, dy, weight, bias = (normal(3, 4, 5, seed=s) for s in range(4))
    before = [a.copy() for a in (x, dy, weight[0], bias[0])]
    _, saved = F.layer_norm_forward(x, (4, 5), weight[0], bias[0])
    F.layer_norm_backward(dy, saved)
    for now, then in zip((x, dy, weight[0], bias[0]), before, strict=True):
        np.testing.assert_array_equal(now, then)
