"""Wrong calls: an error that names the argument, and a layer that is as it was before."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from cases import assert_same_state, fill, normal, state

import numbanorm as nn
import numbanorm.functional as F

F32 = np.float32
X = normal(4, 3, 5, dtype=F32)
DY = normal(4, 3, 5, seed=1, dtype=F32)
ROW = normal(4, 6, dtype=F32)


def refused(call, *words):
    """Call, and expect an error whose message has all the words, as words."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    for word in words:
        found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message)
        assert found, f"{word!r} is not in {message!r}"


def table(rows):
    return pytest.mark.parametrize(("call", "words"), [pytest.param(*r[1:], id=r[0]) for r in rows])


# -- making a layer ------------------------------------------------------------------------------


@table([
    ("no features", lambda: nn.BatchNorm2d(-1), ["num_features", "-1"]),
    ("features no int", lambda: nn.BatchNorm2d(2.5), ["num_features", "2.5"]),
    ("features a string", lambda: nn.BatchNorm2d("3"), ["num_features", "3"]),
    ("features None", lambda: nn.InstanceNorm2d(None), ["num_features", "None"]),
    ("features of switchable", lambda: nn.SwitchableNorm2d(-3), ["num_features", "-3"]),
    ("eps negative", lambda: nn.BatchNorm2d(3, eps=-1e-5), ["eps", "-1e-05"]),
    ("eps NaN", lambda: nn.BatchNorm2d(3, eps=np.nan), ["eps", "nan"]),
    ("eps infinite", lambda: nn.BatchNorm2d(3, eps=np.inf), ["eps", "inf"]),
    ("eps a string", lambda: nn.BatchNorm2d(3, eps="small"), ["eps", "small"]),
    ("eps None", lambda: nn.BatchNorm2d(3, eps=None), ["eps", "None"]),
    ("eps of LayerNorm", lambda: nn.LayerNorm(3, eps=-1.0), ["eps", "-1"]),
    ("eps of GroupNorm", lambda: nn.GroupNorm(1, 3, eps=np.nan), ["eps", "nan"]),
    ("eps of RMSNorm", lambda: nn.RMSNorm(3, eps=-1.0), ["eps", "-1"]),
    ("eps of InstanceNorm", lambda: nn.InstanceNorm1d(3, eps=-1.0), ["eps", "-1"]),
    ("eps of SwitchableNorm", lambda: nn.SwitchableNorm2d(3, eps=-1.0), ["eps", "-1"]),
    ("eps of Norm", lambda: nn.Norm(-1, eps=-1.0), ["eps", "-1"]),
    ("momentum above 1", lambda: nn.BatchNorm2d(3, momentum=1.1), ["momentum", "1.1"]),
    ("momentum negative", lambda: nn.BatchNorm2d(3, momentum=-0.1), ["momentum", "-0.1"]),
    ("momentum NaN", lambda: nn.InstanceNorm2d(3, momentum=np.nan), ["momentum", "nan"]),
    ("momentum a string", lambda: nn.SwitchableNorm2d(3, momentum="x"), ["momentum", "x"]),
    ("momentum of Norm", lambda: nn.Norm(0, momentum=2), ["momentum", "2"]),
    ("dtype int", lambda: nn.BatchNorm2d(3, dtype=np.int32), ["dtype", "int32", "float32"]),
    ("dtype float16", lambda: nn.LayerNorm(3, dtype=np.float16), ["dtype", "float16"]),
    ("dtype of nothing", lambda: nn.LayerNorm(3, dtype="real"), ["dtype", "real"]),
    ("groups that do not divide", lambda: nn.GroupNorm(4, 6), ["num_groups", "4", "6"]),
    ("no groups", lambda: nn.GroupNorm(0, 6), ["num_groups", "0"]),
    ("groups negative", lambda: nn.GroupNorm(-2, 6), ["num_groups", "-2"]),
    ("groups no int", lambda: nn.GroupNorm(1.5, 6), ["num_groups", "1.5"]),
    ("channels negative", lambda: nn.GroupNorm(1, -6), ["num_channels", "-6"]),
    ("normalized_shape negative", lambda: nn.LayerNorm(-5), ["normalized_shape", "-5"]),
    ("normalized_shape empty", lambda: nn.LayerNorm(()), ["normalized_shape"]),
    ("normalized_shape no int", lambda: nn.LayerNorm((2, 2.5)), ["normalized_shape", "2.5"]),
    ("normalized_shape a string", lambda: nn.RMSNorm("ab"), ["normalized_shape"]),
    ("axis no int", lambda: nn.BatchNorm2d(3, axis=1.5), ["axis", "1.5"]),
    ("axis the batch", lambda: nn.BatchNorm2d(3, axis=0), ["axis", "0"]),
    ("axes twice", lambda: nn.Norm((1, 1)), ["axes", "1"]),
    ("axes none", lambda: nn.Norm(()), ["axes"]),
    ("axes no int", lambda: nn.Norm((0, 1.5)), ["axes", "1.5"]),
    ("axes a string", lambda: nn.Norm("ab"), ["axes"]),
    ("feature_axes twice", lambda: nn.Norm(0, feature_axes=(1, 1)), ["feature_axes", "1"]),
    ("feature_axes no int", lambda: nn.Norm(0, feature_axes="1"), ["feature_axes"]),
    ("shape negative", lambda: nn.Norm(-1, shape=(-4,)), ["shape", "-4"]),
    ("groups of Norm", lambda: nn.Norm((1, 2), groups=0), ["groups", "0"]),
    ("over empty", lambda: nn.SwitchableNorm2d(4, over=()), ["over"]),
    ("over unknown", lambda: nn.SwitchableNorm2d(4, over=("in", "xn")), ["over", "xn"]),
    ("over twice", lambda: nn.SwitchableNorm2d(4, over=("in", "in")), ["over", "in"]),
    ("over a string", lambda: nn.SwitchableNorm2d(4, over="in"), ["over"]),
    ("over no strings", lambda: nn.SwitchableNorm2d(4, over=(1, 2)), ["over", "1"]),
    ("gn without groups", lambda: nn.SwitchableNorm2d(4, over=("gn", "bn")), ["num_groups"]),
    ("gn groups that do not divide",
     lambda: nn.SwitchableNorm2d(4, over=("gn",), num_groups=3), ["num_groups", "3", "4"]),
    ("keyword-only by position", lambda: nn.BatchNorm2d(3, 1e-5, 0.1, True, True, 1), []),
])  # fmt: skip
def test_making(call, words):
    refused(call, *words)


# -- calling a layer -----------------------------------------------------------------------------

LAYERS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    "GroupNorm": lambda: nn.GroupNorm(3, 3),
    "LayerNorm": lambda: nn.LayerNorm((3, 5)),
    "RMSNorm": lambda: nn.RMSNorm(5),
    "SwitchableNorm1d": lambda: nn.SwitchableNorm1d(3),
    "Norm": lambda: nn.Norm((0, 2), shape=(3,), track_stats=True),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def read_only(shape):
    a = np.zeros(shape, F32)
    a.flags.writeable = False
    return a


def overlapping(shape):
    """Give two arrays of which the second begins one element later."""
    n = int(np.prod(shape))
    memory = np.zeros(n + 1, F32)
    return memory[:n].reshape(shape), memory[1:].reshape(shape)


def forward_into_overlapping(layer):
    x, out = overlapping(X.shape)
    x[...] = X
    layer(x, out=out)


def forward_into_reversed(layer):
    x = X.copy()
    layer(x, out=x[::-1])


def backward_into_overlapping(layer):
    dy, out = overlapping(X.shape)
    layer.backward(dy, out=out)


FORWARD = [
    ("x of int64", lambda m: m(np.ones(X.shape, np.int64)), ["x", "int64", "float32"]),
    ("x of int8", lambda m: m(np.ones(X.shape, np.int8)), ["x", "int8"]),
    ("x of bool", lambda m: m(X > 0), ["x", "bool"]),
    ("x of longdouble", lambda m: m(X.astype(np.longdouble)), ["x", "float128"]),
    ("x complex", lambda m: m(X.astype(np.complex64)), ["x", "complex64"]),
    ("x complex of double precision", lambda m: m(X.astype(np.complex128)), ["x", "complex128"]),
    ("x of objects", lambda m: m(X.astype(object)), ["x", "object"]),
    ("x of strings", lambda m: m(X.astype(str)), ["x"]),
    ("x None", lambda m: m(None), ["x"]),
    ("x a list of ints", lambda m: m([[[1, 2, 3, 4, 5]] * 3] * 4), ["x", "int64"]),
    ("x ragged", lambda m: m([[1.0, 2.0], [1.0]]), ["x"]),
    ("x a scalar", lambda m: m(F32(1)), ["x", "()"]),
    ("x of other sizes", lambda m: m(normal(4, 7, 6, dtype=F32)), ["x", "(4, 7, 6)"]),
    ("mask of ints", lambda m: m(X, mask=np.ones(X.shape, np.int64)), ["mask", "int64", "bool"]),
    ("mask of floats", lambda m: m(X, mask=np.ones(X.shape)), ["mask", "float64"]),
    ("mask of another shape", lambda m: m(X, mask=np.ones((4, 3, 4), bool)), ["mask", "(4, 3, 4)"]),
    ("mask with an axis too many",
     lambda m: m(X, mask=np.ones((1, 4, 3, 5), bool)), ["mask", "(1, 4, 3, 5)"]),
    ("mask from the wrong side", lambda m: m(X, mask=np.ones(4, bool)), ["mask", "(4,)"]),
    ("mask a string", lambda m: m(X, mask="all"), ["mask"]),
    ("out of another shape",
     lambda m: m(X, out=np.empty((4, 3, 4), F32)), ["out", "(4, 3, 4)", "(4, 3, 5)"]),
    ("out that would broadcast", lambda m: m(X, out=np.empty((1, 4, 3, 5), F32)), ["out"]),
    ("out of another type", lambda m: m(X, out=np.empty(X.shape)), ["out", "float64", "float32"]),
    ("out of ints", lambda m: m(X, out=np.empty(X.shape, np.int32)), ["out", "int32"]),
    ("out a list", lambda m: m(X, out=X.tolist()), ["out", "list"]),
    ("out read-only", lambda m: m(X, out=read_only(X.shape)), ["out"]),
    ("out broadcast", lambda m: m(X, out=np.broadcast_to(F32(0), X.shape)), ["out"]),
    ("out partly over x", forward_into_overlapping, ["out", "overlap"]),
    ("out x backwards", forward_into_reversed, ["out", "overlap"]),
    ("mask by position", lambda m: m.forward(X, X > 0), []),
]  # fmt: skip

BACKWARD = [
    ("dy of another shape", lambda m: m.backward(DY[:3]), ["dy", "(3, 3, 5)", "(4, 3, 5)"]),
    ("dy that would broadcast", lambda m: m.backward(DY[:1]), ["dy", "(1, 3, 5)"]),
    ("dy a scalar", lambda m: m.backward(1.0), ["dy", "()"]),
    ("dy flat", lambda m: m.backward(DY.ravel()), ["dy", "(60,)"]),
    ("dy of ints", lambda m: m.backward(np.ones(DY.shape, np.int64)), ["dy", "int64"]),
    ("dy of longdouble", lambda m: m.backward(DY.astype(np.longdouble)), ["dy", "float128"]),
    ("dy of objects", lambda m: m.backward(DY.astype(object)), ["dy", "object"]),
    ("dy None", lambda m: m.backward(None), ["dy"]),
    ("out of another shape", lambda m: m.backward(DY, out=np.empty((4, 3, 4), F32)), ["out"]),
    ("out of another type", lambda m: m.backward(DY, out=np.empty(X.shape)), ["out", "float64"]),
    ("out read-only", lambda m: m.backward(DY, out=read_only(X.shape)), ["out"]),
    ("out a list", lambda m: m.backward(DY, out=[0.0]), ["out"]),
    ("out partly over dy", backward_into_overlapping, ["out", "overlap"]),
    ("out by position", lambda m: m.backward(DY, np.empty_like(DY)), []),
]  # fmt: skip

LOADING = [
    ("no mapping", lambda m: m.load_state_dict([1, 2]), ["state_dict", "list"]),
    ("None", lambda m: m.load_state_dict(None), ["state_dict"]),
    ("nothing in it", lambda m: m.load_state_dict({}), ["weight"]),
    ("missing", lambda m: m.load_state_dict(without(m, "weight")), ["weight"]),
    ("extra", lambda m: m.load_state_dict(m.state_dict() | {"scale": np.ones(3)}), ["scale"]),
    ("of another shape",
     lambda m: m.load_state_dict(m.state_dict() | {"weight": np.ones((2, 7))}),
     ["weight", "(2, 7)"]),
    ("that would broadcast",
     lambda m: m.load_state_dict(m.state_dict() | {"weight": np.ones(())}), ["weight", "()"]),
    ("no numbers",
     lambda m: m.load_state_dict(m.state_dict() | {"weight": np.full(m.weight.shape, "one")}),
     ["weight"]),
    ("complex",
     lambda m: m.load_state_dict(m.state_dict() | {"weight": np.full(m.weight.shape, 1j)}),
     ["weight", "complex128"]),
]  # fmt: skip


def without(layer, name):
    return {k: v for k, v in layer.state_dict().items() if k != name}


def check_unchanged(make, call, words):
    """Refuse in the middle of training: what is pending goes on as if nothing had been."""
    layer, other = fill(make()), fill(make())
    for m in (layer, other):
        m(normal(4, 3, 5, seed=7, dtype=F32))
        m.backward(DY)
        m(X)
    before = state(layer)
    refused(lambda: call(layer), *words)
    assert_same_state(layer, before)
    assert layer.num_batches_skipped == other.num_batches_skipped
    np.testing.assert_array_equal(layer.backward(DY), other.backward(DY))
    assert_same_state(layer, state(other))
    np.testing.assert_array_equal(layer.eval()(X), other.eval()(X))


@every_layer
@table(FORWARD + BACKWARD + LOADING)
def test_calling(make, call, words):
    check_unchanged(make, call, words)


@table([
    ("running_mean missing", lambda m: m.load_state_dict(without(m, "running_mean")),
     ["running_mean"]),
    ("running_var missing", lambda m: m.load_state_dict(without(m, "running_var")),
     ["running_var"]),
    ("bias missing", lambda m: m.load_state_dict(without(m, "bias")), ["bias"]),
    ("running_mean too long",
     lambda m: m.load_state_dict(m.state_dict() | {"running_mean": np.zeros(4)}),
     ["running_mean", "(4,)", "(3,)"]),
    ("running_var in two axes",
     lambda m: m.load_state_dict(m.state_dict() | {"running_var": np.ones((1, 3))}),
     ["running_var", "(1, 3)"]),
    ("num_batches_tracked an array",
     lambda m: m.load_state_dict(m.state_dict() | {"num_batches_tracked": np.arange(3)}),
     ["num_batches_tracked", "(3,)"]),
    ("too few axes", lambda m: m(X[0, 0]), ["x", "(5,)"]),
    ("too many axes", lambda m: m(X[None]), ["x", "(1, 4, 3, 5)"]),
    ("too many channels", lambda m: m(normal(4, 5, 5, dtype=F32)), ["x", "5", "3"]),
    ("one value per channel", lambda m: m(X[:1, :, :1]), ["(1, 3, 1)"]),
    ("one sample of (N, C)", lambda m: m(X[:1, :, 0]), ["(1, 3)"]),
])  # fmt: skip
def test_batch_norm(call, words):
    check_unchanged(LAYERS["BatchNorm1d"], call, words)


@pytest.mark.parametrize("name", ["mean_weight", "var_weight"])
def test_loading_logits(name):
    for call in (
        lambda m: m.load_state_dict(without(m, name)),
        lambda m: m.load_state_dict(m.state_dict() | {name: np.ones(3)}),
    ):
        check_unchanged(LAYERS["SwitchableNorm1d"], call, [name])


@table([
    ("BatchNorm1d", lambda: nn.BatchNorm1d(3)(normal(2, 3, 4, 4)), ["x", "(2, 3, 4, 4)"]),
    ("BatchNorm2d", lambda: nn.BatchNorm2d(3)(normal(2, 3, 4)), ["x", "(2, 3, 4)"]),
    ("BatchNorm3d", lambda: nn.BatchNorm3d(3)(normal(2, 3, 4, 4)), ["x", "(2, 3, 4, 4)"]),
    ("BatchNorm", lambda: nn.BatchNorm(3)(normal(3)), ["x", "(3,)"]),
    ("BatchNorm axis out of range",
     lambda: nn.BatchNorm(3, axis=4)(normal(2, 3, 3)), ["x", "(2, 3, 3)"]),
    ("InstanceNorm1d", lambda: nn.InstanceNorm1d(3)(normal(2, 3, 4, 4)), ["x", "(2, 3, 4, 4)"]),
    ("InstanceNorm2d", lambda: nn.InstanceNorm2d(3)(normal(3, 4)), ["x", "(3, 4)"]),
    ("InstanceNorm2d unbatched, other channels",
     lambda: nn.InstanceNorm2d(3)(normal(4, 3, 3)), ["x", "(4, 3, 3)"]),
    ("InstanceNorm3d", lambda: nn.InstanceNorm3d(3)(normal(3, 4, 4)), ["x", "(3, 4, 4)"]),
    ("InstanceNorm1d, one value", lambda: nn.InstanceNorm1d(3)(normal(5, 3, 1)), ["(5, 3, 1)"]),
    ("InstanceNorm, one value", lambda: nn.InstanceNorm(3)(normal(5, 3)), ["(5, 3)"]),
    ("SwitchableNorm1d",
     lambda: nn.SwitchableNorm1d(3)(normal(2, 3, 4, 4)), ["x", "(2, 3, 4, 4)"]),
    ("SwitchableNorm2d", lambda: nn.SwitchableNorm2d(3)(normal(2, 3, 4)), ["x", "(2, 3, 4)"]),
    ("SwitchableNorm2d, channels",
     lambda: nn.SwitchableNorm2d(3)(normal(2, 4, 3, 3)), ["x", "(2, 4, 3, 3)"]),
    ("SwitchableNorm2d, channels last",
     lambda: nn.SwitchableNorm2d(3, axis=-1)(normal(2, 3, 3, 4)), ["x", "(2, 3, 3, 4)"]),
    ("GroupNorm, channels", lambda: nn.GroupNorm(2, 6)(normal(2, 5, 7)), ["x", "5", "6"]),
    ("GroupNorm, other channels that divide",
     lambda: nn.GroupNorm(2, 6)(normal(2, 4, 7)), ["x", "4", "6"]),
    ("GroupNorm, no channels", lambda: nn.GroupNorm(2, 6)(normal(6)), ["x", "(6,)"]),
    ("LayerNorm", lambda: nn.LayerNorm(6)(normal(6, 5)), ["x", "(6, 5)"]),
    ("LayerNorm, too few axes", lambda: nn.LayerNorm((4, 6))(normal(6)), ["x", "(6,)"]),
    ("LayerNorm, other order", lambda: nn.LayerNorm((4, 6))(normal(6, 4)), ["x", "(6, 4)"]),
    ("RMSNorm", lambda: nn.RMSNorm(6)(normal(6, 5)), ["x", "(6, 5)"]),
    ("Norm, axis out of range", lambda: nn.Norm((0, 3))(normal(4, 5, 6)), ["(4, 5, 6)"]),
    ("Norm, negative axis out of range", lambda: nn.Norm(-4)(normal(4, 5, 6)), ["(4, 5, 6)"]),
    ("Norm, the same axis by two names", lambda: nn.Norm((2, -1))(normal(4, 5, 6)), ["axes"]),
    ("Norm, feature_axes out of range",
     lambda: nn.Norm(0, feature_axes=3)(normal(4, 5, 6)), ["(4, 5, 6)"]),
    ("Norm, the same feature axis by two names",
     lambda: nn.Norm(0, feature_axes=(1, -2))(normal(4, 5, 6)), ["feature_axes"]),
    ("Norm, groups that do not divide",
     lambda: nn.Norm((1, 2), groups=2)(normal(4, 5, 6)), ["groups", "2", "5"]),
    ("Norm, shape that does not fit", lambda: nn.Norm(-1, shape=(5,))(normal(4, 6)), ["(4, 6)"]),
])  # fmt: skip
def test_ranks_and_sizes(call, words):
    refused(call, *words)


# -- What would do --------------------------------------------------------------------------------


class Sparse:
    """What NumPy takes for one object, as a sparse array of SciPy."""

    def toarray(self):
        return np.eye(3, dtype=np.int8)


def ask_for_remedy(x, name="x"):
    """Return what a message says would do, as Python calculates it, or None."""
    with pytest.raises(TypeError, match=f"^{name}: ") as raised:
        nn.LayerNorm(3)(x)
    found = re.search(r"(x\.toarray.*|numpy\.asarray\(.*\)) would do", str(raised.value))
    return eval(found[1], {"x": x, "numpy": np}) if found else None, str(raised.value)


@pytest.mark.parametrize(
    "x",
    [np.eye(3, dtype=int), np.eye(3) > 0, np.eye(3).astype(object), np.eye(3).astype(str),
     np.eye(3).astype(np.longdouble), Sparse()],
    ids=lambda x: type(x).__name__ if isinstance(x, Sparse) else str(x.dtype),
)  # fmt: skip
def test_the_remedy_works(x):
    remedy, _ = ask_for_remedy(x)
    assert nn.LayerNorm(3)(remedy).shape == (3, 3)


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (np.array([["a", "b", "c"]]), "numbers are needed"),
        (np.array([[{}, {}, {}]]), "numbers are needed"),
        (np.ones((2, 3)) * 1j, "x.real and x.imag"),
        (None, "an array is needed, got None"),
    ],
    ids=["strings", "objects", "complex", "None"],
)
def test_no_remedy_that_does_not_work(x, word):
    remedy, message = ask_for_remedy(x)
    assert remedy is None
    assert word in message


def test_tensors_that_are_no_arrays():
    torch = pytest.importorskip("torch")
    for x, remedy in (
        (torch.ones(2, 3, requires_grad=True), "detach"),
        (torch.ones(2, 3).to_sparse(), "to_dense"),
    ):
        _, message = ask_for_remedy(x)
        assert remedy in message


def test_a_layer_that_is_used_twice_is_pointed_to_functions():
    layer = nn.LayerNorm(3)
    layer(normal(2, 3))
    layer(normal(2, 3))
    layer.backward(normal(2, 3))
    with pytest.raises(RuntimeError, match=r"numbanorm\.functional"):
        layer.backward(normal(2, 3))


# -- backward at the wrong time ------------------------------------------------------------------


@every_layer
def test_backward_at_the_wrong_time(make):
    layer = fill(make())
    before = state(layer)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(DY)
    assert_same_state(layer, before)
    layer(X)
    layer.backward(DY)
    before = state(layer)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(DY)
    assert_same_state(layer, before)
    x = X.copy()
    layer(x, out=x)
    before = state(layer)
    with pytest.raises(RuntimeError, match="out"):
        layer.backward(DY)
    assert_same_state(layer, before)


@every_layer
def test_a_failed_forward_writes_nothing_to_out(make):
    layer, out = make(), np.full(X.shape, 7, F32)
    refused(lambda: layer(X, mask=np.ones((9, 9), bool), out=out), "mask")
    refused(lambda: layer(X.astype(np.int32), out=out), "x")
    np.testing.assert_array_equal(out, 7)


# -- functions -----------------------------------------------------------------------------------

ONES = np.ones(3, F32)
SWITCH = np.ones(3, F32)
I64 = np.ones(3, np.int64)


@table([
    ("no running statistics to evaluate with",
     lambda: F.batch_norm(X, None, None), ["running_mean"]),
    ("no running_var", lambda: F.batch_norm(X, ONES, None), ["running_var"]),
    ("x of ints", lambda: F.batch_norm(X.astype(np.int64), ONES, ONES), ["x", "int64"]),
    ("running_mean too long", lambda: F.batch_norm(X, np.ones(4), ONES), ["running_mean", "(4,)"]),
    ("running_var of ints",
     lambda: F.batch_norm(X, ONES, I64, training=True), ["running_var", "int64"]),
    ("running_mean read-only",
     lambda: F.batch_norm(X, read_only(3), np.ones(3, F32), training=True), ["running_mean"]),
    ("running_mean a list",
     lambda: F.batch_norm(X, [0.0] * 3, np.ones(3, F32), training=True), ["running_mean"]),
    ("weight too long", lambda: F.batch_norm(X, ONES, ONES, np.ones(5)), ["weight", "(5,)", "3"]),
    ("weight of ints", lambda: F.batch_norm(X, ONES, ONES, I64), ["weight", "int64"]),
    ("bias in two axes", lambda: F.batch_norm(X, ONES, ONES, ONES, ONES[None]), ["bias", "(1, 3)"]),
    ("momentum", lambda: F.batch_norm(X, ONES, ONES, training=True, momentum=2), ["momentum", "2"]),
    ("eps", lambda: F.batch_norm(X, ONES, ONES, eps=-1), ["eps", "-1"]),
    ("axis out of range", lambda: F.batch_norm(X, ONES, ONES, axis=3), ["axis", "3"]),
    ("one value per channel",
     lambda: F.batch_norm(X[:1, :, :1], None, None, training=True), ["(1, 3, 1)"]),
    ("normalized_shape", lambda: F.layer_norm(ROW, 5), ["normalized_shape", "(5,)", "(4, 6)"]),
    ("normalized_shape too long", lambda: F.layer_norm(ROW, (1, 4, 6)), ["normalized_shape"]),
    ("weight of layer_norm", lambda: F.layer_norm(ROW, 6, np.ones(4)), ["weight", "(4,)", "(6,)"]),
    ("bias of layer_norm", lambda: F.layer_norm(ROW, 6, None, np.ones(4)), ["bias", "(4,)"]),
    ("eps of layer_norm", lambda: F.layer_norm(ROW, 6, eps=np.nan), ["eps", "nan"]),
    ("groups", lambda: F.group_norm(ROW, 4), ["num_groups", "4", "6"]),
    ("groups of gn",
     lambda: F.switchable_norm(ROW, *np.ones((2, 1)), over=("gn",), num_groups=4),
     ["num_groups", "4", "6"]),
    ("no groups", lambda: F.group_norm(ROW, 0), ["num_groups", "0"]),
    ("weight of group_norm", lambda: F.group_norm(ROW, 2, np.ones(2)), ["weight", "(2,)"]),
    ("normalized_shape of rms_norm", lambda: F.rms_norm(ROW, 5), ["normalized_shape", "(5,)"]),
    ("weight of rms_norm", lambda: F.rms_norm(ROW, 6, np.ones(4)), ["weight", "(4,)"]),
    ("use_input_stats without any",
     lambda: F.instance_norm(X, use_input_stats=False), ["running_mean"]),
    ("weight of instance_norm", lambda: F.instance_norm(X, weight=np.ones(4)), ["weight", "(4,)"]),
    ("logits too few",
     lambda: F.switchable_norm(X, SWITCH[:2], SWITCH), ["mean_weight", "(2,)", "(3,)"]),
    ("logits too many", lambda: F.switchable_norm(X, SWITCH, np.ones(4)), ["var_weight", "(4,)"]),
    ("logits of ints",
     lambda: F.switchable_norm(X, SWITCH, I64), ["var_weight", "int64"]),
    ("over", lambda: F.switchable_norm(X, SWITCH, SWITCH, over=("in", "ln", "xn")), ["over", "xn"]),
    ("over twice",
     lambda: F.switchable_norm(X, SWITCH, SWITCH, over=("in", "ln", "in")), ["over", "in"]),
    ("gn without groups",
     lambda: F.switchable_norm(X, SWITCH, SWITCH, over=("in", "ln", "gn")), ["num_groups"]),
    ("switchable without running statistics to evaluate with",
     lambda: F.switchable_norm(X, SWITCH, SWITCH, training=False), ["running_mean"]),
    ("mask", lambda: F.layer_norm(ROW, 6, mask=np.ones((4, 6))), ["mask", "float64"]),
    ("out", lambda: F.layer_norm(ROW, 6, out=np.empty((4, 6))), ["out", "float64"]),
])  # fmt: skip
def test_functions(call, words):
    refused(call, *words)


def test_a_failed_function_leaves_running_statistics_alone():
    mean, var = np.zeros(3, F32), np.ones(3, F32)
    for wrong in (
        {"out": np.empty(3, F32)},
        {"mask": np.ones(2, bool)},
        {"weight": np.ones(4)},
        {"momentum": 3.0},
        {"x": X[:1, :, :1]},
    ):
        given = {"x": X, "running_mean": mean, "running_var": var, "training": True} | wrong
        refused(lambda given=given: F.batch_norm(**given))
        np.testing.assert_array_equal(mean, 0)
        np.testing.assert_array_equal(var, 1)


@pytest.mark.parametrize("name", ["batch", "layer", "instance", "group", "rms", "switchable"])
def test_saved_that_is_something_else(name):
    with pytest.raises((TypeError, ValueError)):
        getattr(F, f"{name}_norm_backward")(X, SimpleNamespace())


# -- moments -------------------------------------------------------------------------------------


@table([
    ("complex", lambda: nn.moments(X.astype(complex)), ["x", "complex128"]),
    ("objects", lambda: nn.moments(X.astype(object)), ["x", "object"]),
    ("axes out of range", lambda: nn.moments(X, 3), ["axes", "3"]),
    ("axes out of range below", lambda: nn.moments(X, (0, -4)), ["axes", "-4"]),
    ("axes twice", lambda: nn.moments(X, (1, 1)), ["axes", "1"]),
    ("axes twice by two names", lambda: nn.moments(X, (2, -1)), ["axes"]),
    ("axes no int", lambda: nn.moments(X, 1.5), ["axes", "1.5"]),
    ("axes a string", lambda: nn.moments(X, "01"), ["axes"]),
    ("mask of ints", lambda: nn.moments(X, mask=np.ones(X.shape, np.int64)), ["mask", "int64"]),
    ("mask of another shape", lambda: nn.moments(X, mask=np.ones(4, bool)), ["mask", "(4,)"]),
    ("adding other shapes", lambda: nn.moments(X, 0) + nn.moments(X, 1), ["(3, 5)", "(4, 5)"]),
    ("adding a number", lambda: nn.moments(X) + 1, []),
    ("adding an array", lambda: nn.moments(X, 0) + np.ones((3, 5)), []),
    ("merging other shapes", lambda: nn.Moments.merge([nn.moments(X, 0), nn.moments(X)]), []),
    ("merging what are no moments", lambda: nn.Moments.merge([1.0]), []),
    ("empty of a negative shape", lambda: nn.Moments.empty((-1,)), []),
])  # fmt: skip
def test_moments(call, words):
    refused(call, *words)
