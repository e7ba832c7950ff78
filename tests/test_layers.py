"""What a layer is besides its arithmetic: signature, repr, state, modes, copies."""

import copy
import inspect
import pickle

import numpy as np
import pytest
from cases import (
    FEW,
    assert_close,
    assert_same_state,
    cases,
    fill,
    normal,
    over_axes,
    state,
)

import numbanorm as nn

NONE = inspect.Parameter.empty
CHANNELS = {"num_features": NONE, "eps": 1e-5, "momentum": 0.1}
BATCH = CHANNELS | {"affine": True, "track_running_stats": True}
INSTANCE = CHANNELS | {"affine": False, "track_running_stats": False}
SIGNATURES = {
    "Norm": {"axes": NONE, "affine": True, "track_stats": False},
    **dict.fromkeys(("BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), BATCH),
    **dict.fromkeys(
        ("InstanceNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), INSTANCE
    ),
    "LayerNorm": {"normalized_shape": NONE, "eps": 1e-5, "elementwise_affine": True, "bias": True},
    "GroupNorm": {"num_groups": NONE, "num_channels": NONE, "eps": 1e-5, "affine": True},
    "RMSNorm": {"normalized_shape": NONE, "eps": None, "elementwise_affine": True},
    **dict.fromkeys(
        ("SwitchableNorm", "SwitchableNorm1d", "SwitchableNorm2d", "SwitchableNorm3d"), BATCH
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_positional_arguments(name):
    parameters = inspect.signature(getattr(nn, name)).parameters.values()
    got = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(got.items()) == list(SIGNATURES[name].items())


def test_keyword_only_arguments_of_norm():
    parameters = inspect.signature(nn.Norm).parameters.values()
    got = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    expected = {"feature_axes": None, "shape": None, "groups": 1, "center": True, "bias": True,
                "eps": 1e-5, "momentum": 0.1, "skip_nonfinite": False,
                "dtype": np.float32}  # fmt: skip
    assert {name: got[name] for name in expected} == expected


@cases()
def test_forward_and_backward_take_keywords(case):
    layer, x = case.layer(), case.input()
    mask, y, dx = np.ones(x.shape, dtype=bool), np.empty_like(x), np.empty_like(x)
    assert layer.forward(x, mask=mask, out=y) is y
    assert layer.backward(y.copy(), out=dx) is dx
    with pytest.raises(TypeError):
        layer.forward(x, mask)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: nn.BatchNorm2d(5),
            "BatchNorm2d(5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        ),
        (
            lambda: nn.BatchNorm1d(5, 1e-3, None, False, False),
            "BatchNorm1d(5, eps=0.001, momentum=None, affine=False, track_running_stats=False)",
        ),
        (
            lambda: nn.BatchNorm(5, axis=-1),
            "BatchNorm(5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, axis=-1)",
        ),
        (
            lambda: nn.BatchNorm3d(5, bias=False),
            "BatchNorm3d(5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, "
            "bias=False)",
        ),
        (
            lambda: nn.BatchNorm2d(5, skip_nonfinite=True),
            "BatchNorm2d(5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, "
            "skip_nonfinite=True)",
        ),
        (
            lambda: nn.InstanceNorm3d(5),
            "InstanceNorm3d(5, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False)",
        ),
        (lambda: nn.LayerNorm(10), "LayerNorm((10,), eps=1e-05, elementwise_affine=True)"),
        (
            lambda: nn.LayerNorm([5, 10, 10]),
            "LayerNorm((5, 10, 10), eps=1e-05, elementwise_affine=True)",
        ),
        (lambda: nn.GroupNorm(3, 6), "GroupNorm(3, 6, eps=1e-05, affine=True)"),
        (lambda: nn.RMSNorm(4), "RMSNorm((4,), eps=None, elementwise_affine=True)"),
        (
            lambda: nn.SwitchableNorm2d(5),
            "SwitchableNorm2d(5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        ),
        (
            lambda: nn.SwitchableNorm1d(5),
            "SwitchableNorm1d(5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        ),
        (
            lambda: nn.SwitchableNorm2d(5, over=("in", "bn")),
            "SwitchableNorm2d(5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, "
            "over=('in', 'bn'))",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_repr(make, text):
    assert repr(make()) == text


def test_repr_names_what_differs():
    text = repr(nn.BatchNorm2d(5, dtype=np.float64))
    assert "dtype" in text and "float64" in text
    text = repr(nn.Norm((0, 2), groups=2, center=False))
    assert text.startswith("Norm((0, 2)") and "groups=2" in text and "center=False" in text
    assert "feature_axes" not in text


# -- worked numbers ------------------------------------------------------------------------------


def test_worked_rows():
    y = nn.BatchNorm1d(3)(np.arange(9, dtype=np.float32).reshape(3, 3))
    np.testing.assert_allclose(y, np.outer([-1.2247, 0, 1.2247], np.ones(3)), atol=5e-5)


def test_worked_channels():
    y = nn.BatchNorm1d(2)(np.arange(12, dtype=np.float32).reshape(2, 2, 3))
    half = np.array([[1.2865, 0.9649, 0.6433], [1.2865, 0.9649, 0.6433]])
    np.testing.assert_allclose(y, [-half, half[:, ::-1]], atol=5e-5)


def test_worked_single_sample():
    x = np.array([2.0, 3, 5, 1, 4])
    got = nn.moments(x)
    assert (got.mean, got.var(), got.var(ddof=1)) == (3.0, 2.0, 2.5)
    y = nn.LayerNorm([5], dtype=np.float64)(x)
    np.testing.assert_allclose(y, (x - 3) / np.sqrt(2 + 1e-5), rtol=1e-14)
    got = nn.moments(y)
    np.testing.assert_allclose([got.mean, got.var(), got.var(1)], [0, 1, 1.25], atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (lambda: nn.LayerNorm(10), 20),
        (lambda: nn.LayerNorm([5, 10, 10]), 1000),
        (lambda: nn.BatchNorm2d(5), 10),
        (lambda: nn.RMSNorm(10), 10),
        (lambda: nn.GroupNorm(3, 6), 12),
        (lambda: nn.InstanceNorm2d(5), 0),
        (lambda: nn.SwitchableNorm2d(5), 16),
    ],
)
def test_parameter_counts(layer, count):
    assert sum(p.size for p in layer().parameters().values()) == count


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(100), (20, 100)),
        (lambda: nn.BatchNorm2d(100), (20, 100, 35, 45)),
        (lambda: nn.BatchNorm2d(100, affine=False), (20, 100, 35, 45)),
        (lambda: nn.InstanceNorm2d(100), (20, 100, 35, 45)),
        (lambda: nn.InstanceNorm2d(100, affine=True), (20, 100, 35, 45)),
        (lambda: nn.LayerNorm(10), (20, 5, 10)),
        (lambda: nn.LayerNorm([5, 10, 10]), (20, 5, 10, 10)),
        (lambda: nn.GroupNorm(3, 6), (20, 6, 10, 10)),
        (lambda: nn.GroupNorm(6, 6), (20, 6, 10, 10)),
        (lambda: nn.GroupNorm(1, 6), (20, 6, 10, 10)),
    ],
    ids=lambda v: str(v) if isinstance(v, tuple) else "",
)
def test_shapes_of_the_sources(make, shape):
    y = make()(normal(*shape, dtype=np.float32))
    assert y.shape == shape
    assert abs(y.mean()) < 1e-6
    assert abs(y.std() - 1) < 1e-3


# -- parameters and gradients --------------------------------------------------------------------


@cases()
def test_parameters_and_attributes_are_the_same_arrays(case):
    layer = case.layer()
    for name, array in layer.parameters().items():
        assert getattr(layer, name) is array
        assert layer.gradients()[name].shape == array.shape
    assert list(layer.parameters()) == list(layer.gradients())
    assert ("weight" in layer.parameters()) == (layer.weight is not None)
    assert ("bias" in layer.parameters()) == (layer.bias is not None)


@cases(*FEW)
def test_parameters_are_live(case):
    layer, x = case.layer(), case.input()
    layer.parameters()["weight"][...] = 0
    if layer.bias is None:
        np.testing.assert_array_equal(layer(x), 0)
    else:
        layer.parameters()["bias"][...] = 3
        np.testing.assert_array_equal(layer(x), 3)


def test_a_step_may_be_written_to_the_attribute():
    layer = nn.BatchNorm1d(3)
    kept = layer.weight
    layer.weight -= 0.5
    layer.bias += 2
    assert layer.weight is kept is layer.parameters()["weight"]
    np.testing.assert_array_equal(layer.weight, 0.5)
    np.testing.assert_array_equal(layer(np.zeros((2, 3), np.float32)), 2)


@cases()
def test_gradients_accumulate_until_zero_grad(case):
    layer, dy = case.layer(), normal(*case.shape, seed=1)
    for gradient in layer.gradients().values():
        np.testing.assert_array_equal(gradient, 0)
    layer(case.input())
    layer.backward(dy)
    once = {k: v.copy() for k, v in layer.gradients().items()}
    layer(case.input())
    layer.backward(dy)
    for name, gradient in layer.gradients().items():
        assert_close(gradient, 2 * once[name], what=name)
    layer.zero_grad()
    for gradient in layer.gradients().values():
        np.testing.assert_array_equal(gradient, 0)


@cases(*FEW)
def test_backward_uses_the_last_forward_once(case):
    layer, dy = case.layer(), normal(*case.shape, seed=1)
    layer(case.input(seed=5))
    layer(case.input())
    dx = layer.backward(dy)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(dy)
    layer(case.input())
    np.testing.assert_array_equal(layer.backward(dy), dx)


def test_backward_goes_with_the_mode_of_its_forward():
    x, dy = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    layers = [fill(nn.BatchNorm1d(3, dtype=np.float64)) for _ in range(2)]
    for layer in layers:
        layer(x)
    dx = layers[0].backward(dy)
    np.testing.assert_array_equal(layers[1].eval().backward(dy), dx)


@cases(*FEW)
def test_backward_goes_with_the_parameters_of_its_forward(case):
    dy = normal(*case.shape, seed=1)
    layers = [case.layer() for _ in range(2)]
    for layer in layers:
        layer(case.input())
    for p in layers[1].parameters().values():
        p += 1
    np.testing.assert_array_equal(layers[1].backward(dy), layers[0].backward(dy))
    for name, gradient in layers[0].gradients().items():
        np.testing.assert_array_equal(layers[1].gradients()[name], gradient, err_msg=name)


def test_backward_goes_with_the_statistics_of_its_forward():
    x, dy = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    layers = [fill(nn.BatchNorm1d(3, dtype=np.float64)).eval() for _ in range(2)]
    for layer in layers:
        layer(x)
    dx = layers[0].backward(dy)
    layers[1].running_mean[...] += 1
    layers[1].running_var[...] *= 2
    np.testing.assert_array_equal(layers[1].backward(dy), dx)
    assert_close(layers[1].gradients()["weight"], layers[0].gradients()["weight"], scale=1)


# -- modes ---------------------------------------------------------------------------------------


@cases(*FEW)
def test_modes(case):
    layer = case.layer()
    assert layer.training is True
    assert layer.eval() is layer and layer.training is False
    assert layer.train() is layer and layer.training is True
    assert layer.train(False) is layer and layer.training is False


# -- state ---------------------------------------------------------------------------------------


@cases()
def test_what_comes_in_between_does_not_matter(case):
    """A layer remembers how some shapes and modes are done; each time it is as for a new one."""
    layer, x = fill(case.layer()), case.input()
    numbers = np.random.default_rng(0)
    # Some have parameters along axis 0, whose size is then what it is.
    weight = layer.weight
    is_fixed = weight is not None and weight.shape == x.shape[: weight.ndim]
    inputs = [np.concatenate([x] * n).astype(dtype) for n in ((1,) if is_fixed else range(1, 5))
              for dtype in (np.float32, np.float64)]  # fmt: skip
    for i in numbers.integers(0, len(inputs), 40):
        given, training = inputs[i], bool(numbers.integers(2))
        mask = np.ones(given.shape, np.bool_) if numbers.integers(2) else None
        if numbers.integers(8) == 0:
            layer.eps = (1e-5, 1e-3)[numbers.integers(2)]
        new = copy.deepcopy(layer).train(training)
        new.eps = layer.eps  # which forgets all
        np.testing.assert_array_equal(
            layer.train(training)(given, mask=mask), new(given, mask=mask), strict=True
        )
        np.testing.assert_array_equal(layer.backward(given), new.backward(given))
        assert_same_state(layer, state(new))


@cases()
def test_state_dict_goes_round(case):
    layer = case.layer(np.float32)
    for seed in range(3):
        layer(case.input(np.float32, seed=seed))
    kept = {k: np.array(v) for k, v in layer.state_dict().items()}
    assert set(kept) == set(layer.parameters()) | (
        {"running_mean", "running_var", "num_batches_tracked"}
        if case.tracked is not None
        else set()
    )
    other = case.layer(np.float32, filled=False)
    arrays = other.parameters() | {"running_mean": other.running_mean}
    other.load_state_dict(kept)
    for name, array in arrays.items():
        assert getattr(other, name) is array  # an optimiser goes on holding them
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(value, kept[name], err_msg=name, strict=True)
    x = case.input(np.float32)
    np.testing.assert_array_equal(other.eval()(x), layer.eval()(x))


@cases(*FEW)
def test_a_loaded_state_dict_is_copied(case):
    layer = case.layer()
    given = {k: np.array(v) for k, v in layer.state_dict().items()}
    layer.load_state_dict(given)
    before = state(layer)
    for array in given.values():
        array[...] = 77
    assert_same_state(layer, before)


def test_state_dict_of_switchable_norm():
    got = {k: v.shape for k, v in nn.SwitchableNorm2d(5).state_dict().items()}
    assert got == {
        "weight": (5,),
        "bias": (5,),
        "mean_weight": (3,),
        "var_weight": (3,),
        "running_mean": (5,),
        "running_var": (5,),
        "num_batches_tracked": (),
    }


def test_an_old_checkpoint_without_num_batches_tracked_loads():
    layer = fill(nn.BatchNorm2d(3))
    given = {k: v for k, v in layer.state_dict().items() if k != "num_batches_tracked"}
    other = nn.BatchNorm2d(3)
    other.load_state_dict(given)
    np.testing.assert_array_equal(other.running_var, layer.running_var)


def test_a_state_dict_of_the_other_float_type_is_converted():
    layer = fill(nn.BatchNorm2d(3, dtype=np.float64))
    other = nn.BatchNorm2d(3)
    other.load_state_dict(layer.state_dict())
    assert other.weight.dtype == other.running_mean.dtype == np.float32
    np.testing.assert_array_equal(other.weight, layer.weight.astype(np.float32))


COPIES = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@cases()
def test_copies(case, copied):
    layer = case.layer()
    layer(case.input())
    layer.backward(case.input(seed=1))
    layer.eval()
    other = copied(layer)
    assert type(other) is type(layer) and repr(other) == repr(layer)
    assert_same_state(other, state(layer))
    x = case.input(seed=2)
    np.testing.assert_array_equal(other(x), layer(x))
    before = state(layer)
    other.train()
    for array in (*other.parameters().values(), *other.gradients().values()):
        array += 1
    other(x)
    other.backward(x)
    assert_same_state(layer, before)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_before_the_first_x(copied):
    layer = copied(nn.Norm((0, 2), track_stats=True))
    assert layer(normal(2, 3, 4, dtype=np.float32)).shape == (2, 3, 4)
    assert layer.weight.shape == (3,)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_with_a_forward_behind_it(copied):
    # Whether the saved forward goes with the copy is free; that either has its right gradient,
    # or says that there was no forward, is not.
    layer = fill(nn.BatchNorm1d(3))
    layer(normal(4, 3, dtype=np.float32))
    other = copied(layer)
    dy = normal(4, 3, seed=1, dtype=np.float32)
    dx = layer.backward(dy)
    try:
        got = other.backward(dy)
    except RuntimeError:
        return
    np.testing.assert_array_equal(got, dx)


# -- InstanceNorm without the batch axis ---------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize(
    ("make", "space"),
    [(nn.InstanceNorm1d, (7,)), (nn.InstanceNorm2d, (4, 5)), (nn.InstanceNorm3d, (2, 3, 4))],
)
def test_instance_norm_without_batch_axis(make, space, tracked, axis):
    shape = (3, *space) if axis == 1 else (*space, 3)
    x, dy = normal(*shape), normal(*shape, seed=1)
    mask = normal(*shape, seed=2) < 0.5
    layers = [
        fill(make(3, affine=True, track_running_stats=tracked, axis=axis, dtype=np.float64))
        for _ in range(2)
    ]
    for training in (True, False):
        for given in (None, mask):
            y = [
                layers[0].train(training)(x, mask=given),
                layers[1].train(training)(x[None], mask=None if given is None else given[None]),
            ]
            dx = [layers[0].backward(dy), layers[1].backward(dy[None])]
            for one, batch in (y, dx):
                assert one.shape == shape
                np.testing.assert_array_equal(one, batch[0])
    assert_same_state(layers[0], state(layers[1]))


def test_instance_norm_without_batch_axis_into_out():
    x = normal(3, 4, 5, dtype=np.float32)
    layer, out = nn.InstanceNorm2d(3), np.empty((3, 4, 5), np.float32)
    expected = layer(x)
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    dy = x.copy()
    assert layer.backward(dy, out=dy) is dy
    layer(x)
    np.testing.assert_array_equal(dy, layer.backward(x))


# -- families agree ------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
    ("fixed", "general", "shape"),
    [
        (nn.BatchNorm1d, nn.BatchNorm, (6, 3)),
        (nn.BatchNorm1d, nn.BatchNorm, (6, 3, 3)),
        (nn.BatchNorm2d, nn.BatchNorm, (6, 3, 4, 3)),
        (nn.BatchNorm3d, nn.BatchNorm, (6, 3, 2, 4, 3)),
        (nn.InstanceNorm1d, nn.InstanceNorm, (6, 3, 3)),
        (nn.InstanceNorm2d, nn.InstanceNorm, (6, 3, 4, 3)),
        (nn.InstanceNorm3d, nn.InstanceNorm, (6, 3, 2, 4, 3)),
        (nn.SwitchableNorm2d, nn.SwitchableNorm, (6, 3, 4, 3)),
        (nn.SwitchableNorm3d, nn.SwitchableNorm, (6, 3, 2, 4, 3)),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v),
)
def test_any_rank_is_the_same_arithmetic(fixed, general, shape, axis):
    x = normal(*shape)
    np.testing.assert_array_equal(fixed(3, axis=axis)(x), general(3, axis=axis)(x))


def test_norm_is_each_of_them():
    x = normal(4, 6, 5, 7)
    for layer, norm in [
        (nn.BatchNorm2d(6), nn.Norm((0, 2, 3))),
        (nn.BatchNorm2d(7, axis=-1), nn.Norm((0, 1, 2))),
        (nn.InstanceNorm2d(6, affine=True), nn.Norm((2, 3), feature_axes=1)),
        (nn.GroupNorm(2, 6), nn.Norm((1, 2, 3), feature_axes=1, groups=2)),
        (nn.LayerNorm(7), nn.Norm(-1)),
        (nn.LayerNorm((6, 5, 7)), nn.Norm((1, 2, 3))),
        (nn.RMSNorm(7, eps=1e-5), nn.Norm(-1, center=False, bias=False)),
    ]:
        np.testing.assert_array_equal(norm(x), layer(x), err_msg=repr(layer))
        dx = norm.backward(x), layer.backward(x)
        np.testing.assert_array_equal(*dx, err_msg=repr(layer))


def test_rms_norm_eps_is_that_of_x():
    # None stands for the machine epsilon of the type of x, as in PyTorch.
    for dtype in (np.float32, np.float64):
        case = over_axes("", lambda **k: nn.RMSNorm(5, **k), (4, 5), (-1,), (-1,),
                         center=False, eps=None)  # fmt: skip
        x = (case.input(dtype) * 1e-4).astype(dtype)
        case.check(case.layer(np.float32), x, normal(4, 5, seed=1, dtype=dtype))
