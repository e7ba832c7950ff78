"""Checkpoints of the authors of SwitchableNorm, against their arithmetic written down anew."""

import copy
import pickle

import numpy as np
import pytest
import reference as ref
from cases import DTYPES, assert_close, normal

import numbanorm as nn

CLASSES = {2: nn.SwitchableNorm1d, 4: nn.SwitchableNorm2d, 5: nn.SwitchableNorm3d}
KEPT = {2: 0.997, 4: 0.9, 5: 0.997}  # the weight of the old running value in the authors' classes

SHAPES = {
    "1d": (6, 5),
    "1d, two samples": (2, 3),
    "2d": (3, 4, 5, 6),
    "2d, one sample": (1, 4, 3, 3),
    "2d, one channel": (4, 1, 3, 2),
    "2d, two pixels": (4, 3, 1, 2),
    "3d": (3, 4, 2, 3, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
several_axes = pytest.mark.parametrize(
    "shape", [s for s in SHAPES.values() if len(s) > 2], ids=[k for k in SHAPES if k[0] != "1"]
)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
# The authors' 1d class always has BN.
every_kind = pytest.mark.parametrize(
    ("shape", "bn"),
    [(shape, bn) for shape in SHAPES.values() for bn in (True, False) if bn or len(shape) > 2],
    ids=[f"{k}{b}" for k, s in SHAPES.items() for b in ("", ", no bn") if not b or len(s) > 2],
)


def checkpoint(shape, bn=True, dtype=np.float64, seed=0):
    """Draw a state dict in the authors' layout."""
    rng = np.random.default_rng(seed)
    channels, ones = shape[1], (1,) * (len(shape) - 2)
    n_logits = 3 if bn and ones else 2
    state = {
        "weight": 0.5 + rng.random((1, channels, *ones)),
        "bias": rng.standard_normal((1, channels, *ones)),
        "mean_weight": rng.standard_normal(n_logits),
        "var_weight": rng.standard_normal(n_logits),
    }
    if bn:
        per_channel = (1, channels, 1) if ones else (1, channels)
        state["running_mean"] = rng.standard_normal(per_channel)
        state["running_var"] = 0.5 + rng.random(per_channel)
    return {name: value.astype(dtype) for name, value in state.items()}


def load(shape, state, **options):
    return CLASSES[len(shape)].from_official(state, **{"dtype": np.float64} | options)


def official(x, state, training, eps=1e-5, kept=None):
    """Normalise as the authors' code does; return y and the running statistics after it.

    Works on arrays and on tensors. Their formulas cancel where means are large: give shifted data.
    """
    mean_weight, var_weight = (_softmax(state[name]) for name in ("mean_weight", "var_weight"))
    running = [state.get(name) for name in ("running_mean", "running_var")]
    kept = KEPT[x.ndim] if kept is None else kept
    if x.ndim == 2:
        ln = x.mean(1, keepdims=True), _sample_variance(x, 1)
        batch = x.mean(0, keepdims=True), _sample_variance(x, 0)
        means, variances = [ln[0]], [ln[1]]
        flat = x
    else:
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        mean, var = flat.mean(-1, keepdims=True), _sample_variance(flat, -1)
        square = var + mean**2
        means = [mean, mean.mean(1, keepdims=True)]
        variances = [var, square.mean(1, keepdims=True) - means[1] ** 2]
        mean_bn = mean.mean(0, keepdims=True)
        batch = mean_bn, square.mean(0, keepdims=True) - mean_bn**2
    if running[0] is not None:
        means.append(batch[0] if training else running[0])
        variances.append(batch[1] if training else running[1])
        if training:
            running = [kept * r + (1 - kept) * b for r, b in zip(running, batch, strict=True)]
    mean = sum(w * m for w, m in zip(mean_weight, means, strict=True))
    var = sum(w * v for w, v in zip(var_weight, variances, strict=True))
    y = ((flat - mean) / (var + eps) ** 0.5).reshape(x.shape)
    return y * state["weight"] + state["bias"], running


def _softmax(logits):
    e = logits.exp() if hasattr(logits, "exp") else np.exp(logits)
    return e / e.sum()


def _sample_variance(x, axis):
    centred = x - x.mean(axis, keepdims=True)
    return (centred**2).sum(axis, keepdims=True) / (x.shape[axis] - 1)


# -- outputs and running statistics --------------------------------------------------------------


@pytest.mark.fast
@every_kind
@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_outputs(shape, training, bn, dtype):
    state = checkpoint(shape, bn)
    layer = load(shape, state).train(training)
    for step in range(4):
        x = normal(*shape, seed=step, offset=step).astype(dtype)
        expected, running = official(x.astype(np.float64), state, training)
        y = layer(x)
        assert y.dtype == dtype
        assert_close(y, expected, scale=1)
        if bn:
            state |= dict(zip(("running_mean", "running_var"), running, strict=True))
            assert_close(layer.running_mean, state["running_mean"].ravel(), scale=1, dtype=dtype)
            assert_close(layer.running_var, state["running_var"].ravel(), scale=1, dtype=dtype)


@shapes
@modes
def test_a_float32_checkpoint(shape, training):
    """As the authors save it; the aim is 1e-5."""
    state = checkpoint(shape, dtype=np.float32)
    exact = {name: value.astype(np.float64) for name, value in state.items()}
    layer = CLASSES[len(shape)].from_official(state).train(training)
    assert layer.weight.dtype == layer.mean_weight.dtype == layer.running_var.dtype == np.float32
    for step in range(4):
        x = normal(*shape, seed=step, dtype=np.float32)
        expected, running = official(x.astype(np.float64), exact, training)
        exact |= dict(zip(("running_mean", "running_var"), running, strict=True))
        np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
        for name in ("running_mean", "running_var"):
            value = getattr(layer, name)
            np.testing.assert_allclose(value, exact[name].ravel(), rtol=1e-5, atol=1e-6)


@shapes
def test_training_then_evaluation(shape):
    state = checkpoint(shape)
    layer = load(shape, state)
    for step in range(3):
        x = normal(*shape, seed=step, offset=2)
        _, running = official(x, state, True)
        state |= dict(zip(("running_mean", "running_var"), running, strict=True))
        layer(x)
    x = normal(*shape, seed=9)
    assert_close(layer.eval()(x), official(x, state, False)[0], scale=1)
    assert layer.num_batches_tracked == 3


@several_axes
@modes
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_large_offsets(shape, training, offset):
    """Where the authors' own formulas cancel: the result is that of shifted data."""
    state = checkpoint(shape)
    layer = load(shape, state).train(training)
    layer.running_mean += offset
    for dtype, bound in ((np.float32, 1e-5), (np.float64, 1e-8)):
        x = normal(*shape, seed=1, offset=offset).astype(dtype)
        state["running_mean"] = (layer.running_mean - offset).reshape(1, -1, 1)
        state["running_var"] = layer.running_var.reshape(1, -1, 1).copy()
        expected, running = official(x.astype(np.float64) - offset, state, training)
        np.testing.assert_allclose(layer(x), expected, rtol=bound, atol=bound)
        if training:
            np.testing.assert_allclose(layer.running_var, running[1].ravel(), rtol=1e-6)


@modes
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_large_offsets_in_one_dimension(training, offset):
    """Here they do not cancel; nor do ours."""
    state = checkpoint((6, 5))
    layer = load((6, 5), state).train(training)
    layer.running_mean += offset
    x = normal(6, 5, seed=1, offset=offset)
    state["running_mean"] = (layer.running_mean - offset)[None]
    expected, _ = official(x - offset, state, training)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-8, atol=1e-8)


# -- gradients -----------------------------------------------------------------------------------


@every_kind
@modes
def test_gradients_of_pytorch(shape, training, bn):
    torch = pytest.importorskip("torch")
    state = checkpoint(shape, bn)
    x, dy = normal(*shape, offset=1), normal(*shape, seed=1)
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    leaves = [torch.from_numpy(x), *(tensors[n] for n in list(tensors)[:4])]
    for leaf in leaves:
        leaf.requires_grad_()
    y, _ = official(leaves[0], tensors, training)
    y.backward(torch.from_numpy(dy))

    layer = load(shape, state).train(training)
    assert_close(layer(x), y.detach().numpy(), scale=1)
    dx = layer.backward(dy)
    assert_close(dx, leaves[0].grad.numpy(), scale=10, what="dx")
    for (name, got), leaf in zip(layer.gradients().items(), leaves[1:], strict=True):
        expected = leaf.grad.numpy().reshape(got.shape)
        assert_close(got, expected, scale=np.abs(dy).sum(), what=name)


@shapes
@modes
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_gradients_by_central_differences(shape, training, masked):
    layer = load(shape, checkpoint(shape)).train(training)
    x, dy = normal(*shape, offset=1), normal(*shape, seed=1)
    mask = normal(*shape, seed=2) < 0.5 if masked else None
    layer(x, mask=mask)
    gradients = {"x": layer.backward(dy), **layer.gradients()}
    for name, value in {"x": x, **layer.parameters()}.items():
        expected = ref.central_difference(lambda: np.sum(layer(x, mask=mask) * dy), value)
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.fast
@modes
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_gradients_at_large_offsets(training, offset):
    """In float64, dx does not depend on where the data lie."""
    shape = (3, 4, 5, 6)
    near, far = (load(shape, checkpoint(shape)).train(training) for _ in range(2))
    far.running_mean += offset
    x, dy = normal(*shape), normal(*shape, seed=1)
    near(x)
    far(x + offset)
    expected, got = near.backward(dy), far.backward(dy)
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-7)
    for name, gradient in far.gradients().items():
        np.testing.assert_allclose(gradient, near.gradients()[name], rtol=1e-6, atol=1e-6)


# -- a layer as any other ------------------------------------------------------------------------


@shapes
def test_what_is_loaded(shape):
    state = checkpoint(shape)
    layer = load(shape, state)
    own = layer.state_dict()
    assert set(own) == {*state, "num_batches_tracked"}
    for name, value in state.items():
        np.testing.assert_array_equal(own[name], value.ravel())
        assert not np.shares_memory(getattr(layer, name), value)
    assert layer.over == (("ln", "bn") if len(shape) == 2 else ("in", "ln", "bn"))
    assert "sample_variance=True" in repr(layer)
    np.testing.assert_allclose(layer.momentum, 1 - KEPT[len(shape)], rtol=1e-12)


@several_axes
def test_without_batch_statistics(shape):
    layer = load(shape, checkpoint(shape, bn=False))
    assert layer.over == ("in", "ln")
    assert layer.running_mean is layer.running_var is None
    assert list(layer.importance()["var"]) == ["in", "ln"]
    x = normal(*shape)
    np.testing.assert_array_equal(layer(x), layer.eval()(x))


def test_three_logits_without_running_statistics():
    """The batch's own are used, in evaluation too."""
    shape = (3, 4, 5, 6)
    state = checkpoint(shape)
    bare = {name: value for name, value in state.items() if not name.startswith("running")}
    layer, x = load(shape, bare), normal(3, 4, 5, 6)
    expected = official(x, state, True)[0]
    assert_close(layer(x), expected, scale=1)
    assert_close(layer.eval()(x), expected, scale=1)


def test_a_fresh_layer_of_the_authors():
    """Weights of 1, biases of 0, and running variances that start at 0, not at 1."""
    state = {name: np.zeros_like(value) for name, value in checkpoint((3, 4, 5, 6)).items()}
    state |= {name: np.ones_like(state[name]) for name in ("weight", "mean_weight", "var_weight")}
    layer, x = load((3, 4, 5, 6), state).eval(), normal(3, 4, 5, 6)
    np.testing.assert_array_equal(layer.running_var, 0)
    assert_close(layer(x), official(x, state, False)[0], scale=1)


@pytest.mark.parametrize("momentum", [0.5, 0.1, 1.0])
def test_another_momentum(momentum):
    state, x = checkpoint((3, 4, 5, 6)), normal(3, 4, 5, 6)
    layer = load((3, 4, 5, 6), state, momentum=momentum)
    layer(x)
    _, (mean, var) = official(x, state, True, kept=1 - momentum)
    assert_close(layer.running_mean, mean.ravel(), scale=1)
    assert_close(layer.running_var, var.ravel(), scale=1)


def test_another_eps():
    state, x = checkpoint((3, 4, 5, 6)), normal(3, 4, 5, 6)
    layer = load((3, 4, 5, 6), state, eps=0.25)
    assert_close(layer(x), official(x, state, True, eps=0.25)[0], scale=1)


def test_sample_variance_makes_a_difference():
    shape = (3, 4, 2, 2)
    layer, x = load(shape, checkpoint(shape)), normal(*shape)
    plain = nn.SwitchableNorm2d(4, dtype=np.float64)
    plain.load_state_dict(layer.state_dict())
    assert "sample_variance" not in repr(plain)
    assert np.abs(layer(x) - plain(x)).max() > 0.1


@shapes
def test_copies(shape):
    layer, x = load(shape, checkpoint(shape)), normal(*shape)
    twins = [pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)]
    fresh = CLASSES[len(shape)](shape[1], sample_variance=True, momentum=layer.momentum,
                                dtype=np.float64)  # fmt: skip
    fresh.load_state_dict(layer.state_dict())
    expected = layer(x)
    for twin in (*twins, fresh):
        assert repr(twin) == repr(layer)
        np.testing.assert_array_equal(twin(x), expected)
        np.testing.assert_array_equal(twin.running_var, layer.running_var)


@pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])
def test_memory_order_does_not_matter(axis):
    shape = (3, 4, 5, 6)
    layer, x, dy = load(shape, checkpoint(shape)), normal(*shape), normal(*shape, seed=1)
    if axis == 1:
        twin = load(shape, checkpoint(shape))
        last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        got, dx = twin(last), twin.backward(dy)
    else:
        twin = nn.SwitchableNorm2d(4, sample_variance=True, axis=-1, dtype=np.float64)
        twin.load_state_dict(layer.state_dict())
        got = np.moveaxis(twin(np.moveaxis(x, 1, -1)), -1, 1)
        dx = np.moveaxis(twin.backward(np.moveaxis(dy, 1, -1)), -1, 1)
    assert_close(got, layer(x), scale=1)
    assert_close(dx, layer.backward(dy), scale=1)


@shapes
def test_recalibrated_as_if_the_batches_were_one(shape):
    """The statistic is the authors': of all batches together, if instances are equal in size."""
    layer = load(shape, checkpoint(shape))
    batches = [normal(n, *shape[1:], seed=n, offset=n) for n in (2, 5, 3)]
    nn.recalibrate(layer, batches, [layer])
    together = np.concatenate(batches)
    start = checkpoint(shape)
    _, (mean, var) = official(together, start, True, kept=0.0)
    np.testing.assert_allclose(layer.running_mean, mean.ravel(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(layer.running_var, var.ravel(), rtol=1e-11)


def test_tensors():
    torch = pytest.importorskip("torch")
    state, x = checkpoint((3, 4, 5, 6)), normal(3, 4, 5, 6)
    expected = load((3, 4, 5, 6), state)(x)
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    tensors["weight"] = torch.nn.Parameter(tensors["weight"])
    np.testing.assert_array_equal(load((3, 4, 5, 6), tensors)(x), expected)


def changed(**entries):
    state = checkpoint((3, 4, 5, 6)) | entries
    return {name: value for name, value in state.items() if value is not None}


# fmt: off
BAD = [
    ("no state dict", lambda: [1, 2], TypeError, ["state_dict", "list"]),
    ("empty", dict, ValueError, ["state_dict", "mean_weight"]),
    ("no weight", lambda: changed(weight=None), ValueError, ["weight"]),
    ("no bias", lambda: changed(bias=None), ValueError, ["bias"]),
    ("no mean_weight", lambda: changed(mean_weight=None), ValueError, ["mean_weight"]),
    ("no var_weight", lambda: changed(var_weight=None), ValueError, ["var_weight"]),
    ("no running_var", lambda: changed(running_var=None), ValueError, ["running_var"]),
    ("no running_mean", lambda: changed(running_mean=None), ValueError, ["running_"]),
    ("an unknown entry", lambda: changed(gamma=np.ones(4)), ValueError, ["gamma"]),
    ("four logits", lambda: changed(mean_weight=np.ones(4)), ValueError, ["mean_weight", "4"]),
    ("logits of different numbers", lambda: changed(var_weight=np.ones(2)),
     ValueError, ["var_weight", "(3,)", "(2,)"]),
    ("running statistics without BN",
     lambda: changed(mean_weight=np.ones(2), var_weight=np.ones(2)), ValueError, ["running_"]),
    ("channels in the wrong place", lambda: changed(weight=np.ones((4, 1, 1, 1))),
     ValueError, ["weight", "(4, 1, 1, 1)"]),
    ("a bias of another size", lambda: changed(bias=np.ones((1, 5, 1, 1))),
     ValueError, ["bias", "(1, 5, 1, 1)"]),
    ("running statistics of another size", lambda: changed(running_mean=np.ones((1, 5, 1))),
     ValueError, ["running_mean", "(1, 5, 1)"]),
    ("one value for all channels", lambda: changed(bias=np.ones((1, 1, 1, 1))),
     ValueError, ["bias"]),
    ("a weight for each pixel", lambda: changed(weight=np.ones((1, 4, 5, 6))),
     ValueError, ["'weight'", "(1, 4, 5, 6)"]),
    ("integers", lambda: changed(bias=np.ones((1, 4, 1, 1), int)), TypeError, ["bias", "int64"]),
    ("a scalar", lambda: changed(weight=np.float64(1)), ValueError, ["'weight'", "()"]),
    ("no logits", lambda: changed(mean_weight=np.ones(0)), ValueError, ["mean_weight"]),
]
# fmt: on


@pytest.mark.parametrize(
    ("state", "error", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_state_dicts(state, error, words):
    with pytest.raises(error) as caught:
        nn.SwitchableNorm2d.from_official(state())
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("given", [None, np.float32, np.float64])
@pytest.mark.parametrize("kept", [np.float16, np.float32, np.float64])
def test_the_dtype_is_that_of_the_checkpoint(kept, given):
    shape = (1, 4, 1, 1)
    state = {"weight": np.full(shape, 1 / 3), "bias": np.zeros(shape)}
    state |= {name: np.full(2, 0.1) for name in ("mean_weight", "var_weight")}
    state = {name: value.astype(kept) for name, value in state.items()}
    options = {} if given is None else {"dtype": given}
    layer = nn.SwitchableNorm2d.from_official(state, **options)
    expected = given or {np.float16: np.float32}.get(kept, kept)
    assert layer.dtype == layer.weight.dtype == layer.mean_weight.dtype == expected
    np.testing.assert_array_equal(layer.weight, state["weight"].reshape(4).astype(expected))
