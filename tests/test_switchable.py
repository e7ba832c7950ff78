from itertools import permutations

import numpy as np
import pytest
import reference as ref
from cases import assert_close, fill, masks, normal, switchable

import numbanorm as nn

KINDS = ("in", "ln", "bn", "gn")
OVERS = [o for n in (1, 2, 3, 4) for o in permutations(KINDS, n)]
every_over = pytest.mark.parametrize("over", OVERS, ids="-".join)


def over_case(over, shape=(3, 4, 2, 3), axis=1):
    channels = shape[axis]
    groups = {"num_groups": 2} if "gn" in over else {}

    def make(**options):
        return nn.SwitchableNorm(channels, over=over, axis=axis, **groups, **options)

    return switchable("-".join(over), make, shape, *over, axis=axis, groups=2)


@every_over
@pytest.mark.parametrize("axis", [1, -1], ids=["channels first", "channels last"])
def test_any_choice_in_any_order(over, axis):
    shape = (3, 4, 2, 3) if axis == 1 else (3, 2, 3, 4)
    case = over_case(over, shape, axis)
    x, dy = case.input(), normal(*shape, seed=1)
    mask = normal(*shape, seed=2) < 0.5
    layer = case.layer()
    for given in (None, mask):
        case.check(layer.train(), x, dy, given)
        case.check(layer.eval(), x, dy, given)


@every_over
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_logit_gradients(over, training, masked):
    case = over_case(over)
    layer, x, dy = case.layer().train(training), case.input(), normal(*case.shape, seed=1)
    mask = normal(*case.shape, seed=2) < 0.5 if masked else None
    layer(x, mask=mask)
    layer.backward(dy)
    for name in ("mean_weight", "var_weight"):
        value = layer.parameters()[name]
        expected = ref.central_difference(lambda: np.sum(layer(x, mask=mask) * dy), value)
        got = layer.gradients()[name]
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-7, err_msg=name)


def test_order_of_over_only_permutes_the_logits():
    x, dy = normal(3, 4, 5, 6), normal(3, 4, 5, 6, seed=1)
    logits = dict(zip(KINDS, normal(4, seed=2), strict=True))
    results = []
    for over in [KINDS, KINDS[::-1], ("bn", "in", "gn", "ln")]:
        layer = nn.SwitchableNorm2d(4, over=over, num_groups=2, dtype=np.float64)
        for w in (layer.mean_weight, layer.var_weight):
            w[...] = [logits[k] for k in over]
        results.append((layer(x), layer.backward(dy), layer.running_var))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_close(got, expected, scale=1)


def test_initial_state():
    layer = nn.SwitchableNorm2d(5)
    for name, value in {"weight": 1, "bias": 0, "mean_weight": 1, "var_weight": 1}.items():
        np.testing.assert_array_equal(getattr(layer, name), value, err_msg=name)
    assert list(layer.parameters()) == ["weight", "bias", "mean_weight", "var_weight"]
    assert layer.mean_weight.shape == layer.var_weight.shape == (3,)


def test_zero_init():
    layer = nn.SwitchableNorm2d(5, zero_init=True)
    np.testing.assert_array_equal(layer.weight, 0)
    np.testing.assert_array_equal(layer(normal(2, 5, 3, 4, dtype=np.float32)), 0)
    assert "zero_init=True" in repr(layer)
    layer.backward(normal(2, 5, 3, 4, dtype=np.float32))
    assert np.all(layer.gradients()["weight"] != 0)  # so that it can leave 0


def test_1d_has_two_statistics():
    layer = nn.SwitchableNorm1d(5)
    assert layer.mean_weight.shape == (2,)
    assert list(layer.importance()["mean"]) == ["ln", "bn"]


@pytest.mark.parametrize(
    ("layer", "kinds"),
    [
        (lambda: nn.SwitchableNorm2d(4), ["in", "ln", "bn"]),
        (lambda: nn.SwitchableNorm2d(4, over=("bn", "in")), ["bn", "in"]),
        (lambda: nn.SwitchableNorm2d(4, over=["gn", "ln"], num_groups=2), ["gn", "ln"]),
        (lambda: nn.SwitchableNorm2d(4, over=("ln",)), ["ln"]),
    ],
    ids=["default", "two", "a list", "one"],
)
def test_importance(layer, kinds):
    layer = layer()
    got = layer.importance()
    assert list(got) == ["mean", "var"]
    for weights in got.values():
        assert list(weights) == kinds
        np.testing.assert_allclose(list(weights.values()), 1 / len(kinds), rtol=1e-7)
    fill(layer)
    got = layer.importance()
    for which, logits in (("mean", layer.mean_weight), ("var", layer.var_weight)):
        expected = ref.softmax(logits.astype(np.float64))
        np.testing.assert_allclose(list(got[which].values()), expected, rtol=1e-6)
        assert all(isinstance(v, float) for v in got[which].values())


@pytest.mark.parametrize("logit", [100.0, 1e4, 1e30], ids=str)
def test_big_logits_do_not_overflow(logit):
    layer = nn.SwitchableNorm2d(4)
    layer.mean_weight[...] = [logit, -logit, 0]
    layer.var_weight[...] = [-logit, logit, 0]
    got = layer.importance()["mean"]
    np.testing.assert_allclose([got[k] for k in ("in", "ln", "bn")], [1, 0, 0], atol=1e-40)
    x = normal(3, 4, 5, 6, dtype=np.float32)
    assert np.isfinite(layer(x)).all()
    assert np.isfinite(layer.backward(x)).all()
    assert all(np.isfinite(g).all() for g in layer.gradients().values())


def test_without_bn_there_are_no_running_statistics():
    layer = nn.SwitchableNorm2d(4, over=("in", "ln"))
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
    assert set(layer.state_dict()) == {"weight", "bias", "mean_weight", "var_weight"}
    x = normal(3, 4, 5, 6, dtype=np.float32)
    np.testing.assert_array_equal(layer(x), layer.eval()(x))


def test_without_tracking_evaluation_uses_the_batch():
    layer = fill(nn.SwitchableNorm2d(4, track_running_stats=False))
    assert layer.running_mean is None
    x = normal(3, 4, 5, 6, dtype=np.float32)
    np.testing.assert_array_equal(layer(x), layer.eval()(x))


def test_running_statistics_are_those_of_batch_norm():
    switch, batch = nn.SwitchableNorm2d(4), nn.BatchNorm2d(4)
    fill(switch)  # whatever the mixture
    switch.running_mean[...], switch.running_var[...] = 0, 1
    for seed in range(3):
        x = normal(3, 4, 5, 6, seed=seed, dtype=np.float32)
        switch(x)
        batch(x)
    assert_close(switch.running_mean, batch.running_mean, scale=1)
    assert_close(switch.running_var, batch.running_var, scale=1)


def test_an_instance_of_one_value_is_its_own_mean():
    # (N, C) with "in": mean x, variance 0, asked for on its own the output is the bias.
    layer = fill(nn.SwitchableNorm1d(4, over=("in",)))
    x = normal(6, 4, dtype=np.float32)
    np.testing.assert_array_equal(layer(x), np.broadcast_to(layer.bias, x.shape))
    # The terms of dx cancel, and are as big as 1 / sqrt(eps).
    assert_close(layer.backward(x), np.zeros_like(x), scale=np.abs(layer.weight).max() * 1e3)


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)], ids=str)
def test_one_value_per_channel_in_training_goes_on(shape):
    layer = fill(nn.SwitchableNorm(4))
    x = normal(*shape, dtype=np.float32)
    assert np.isfinite(layer(x)).all()
    assert np.isfinite(layer.backward(x)).all()
    assert all(np.isfinite(v).all() for v in layer.state_dict().values())


def test_a_batch_of_one_is_evaluated_with_the_tracked_statistics():
    case = over_case(("in", "ln", "bn"), (1, 4, 5, 6))
    layer = case.layer().eval()
    case.check(layer, case.input(), normal(1, 4, 5, 6, seed=1))


@every_over
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (3, 4, 2, 3)], ids=["single values", "images"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_float32_far_from_the_running_statistics(over, shape, training):
    # The mixture is far from the batch's own means then, and they are what dx is made with.
    case = over_case(over, shape)
    for offset in (1e3, -1e5):
        x = normal(*shape, dtype=np.float32, offset=offset)
        layer = case.layer(np.float32).train(training)
        case.check(layer, x, normal(*shape, seed=1, dtype=np.float32))


@masks("full", "outer and inner", "padded lengths", "by sample")
def test_the_mixture_is_of_what_the_mask_leaves(make_mask):
    case = over_case(("gn", "bn", "in", "ln"))
    mask = make_mask(case.shape)
    case.check(case.layer(), case.input(), normal(*case.shape, seed=1), mask)


def test_learning_the_logits_lowers_the_loss():
    # Plain descent on the logits alone: they are gradients, of the right sign, for both.
    case = over_case(("in", "ln", "bn"), (4, 4, 3, 3))
    layer = nn.SwitchableNorm(4, affine=False, dtype=np.float64)
    x = case.input() + 3 * normal(1, 4, 1, 1, seed=5)
    target = normal(*case.shape, seed=2)
    losses = []
    for _ in range(20):
        layer.zero_grad()
        difference = layer(x) - target
        layer.backward(2 * difference)
        losses.append(np.sum(difference**2))
        for name, logits in layer.parameters().items():
            logits -= 1e-3 * layer.gradients()[name]
    assert np.all(np.diff(losses) < 0)
