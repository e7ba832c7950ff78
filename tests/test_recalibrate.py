"""Exact pooled statistics instead of moving averages, and what stays as it was."""

import sys

import numpy as np
import pytest
import reference as ref
from cases import DTYPES, TRACKING, assert_close, cases, fill, normal

import numbanorm as nn

SIZES = (5, 1, 8, 2)  # of the batches
tracking = cases(*TRACKING)


def batches_of(case, dtype=np.float64, sizes=SIZES):
    rest = case.shape[1:]
    batches = [normal(n, *rest, seed=n, dtype=dtype, offset=n) for n in sizes]
    # BatchNorm refuses one value in each channel, as PyTorch does.
    return [b for b in batches if b[0].size > rest[0] or len(b) > 1]


def pooled(case, layer, batches, masks=None):
    """Take the statistics of all batches as if they were one, by the reference."""
    x = np.concatenate(batches).astype(np.float64)
    mask = None if masks is None else np.concatenate(masks)
    naive = case.naive(layer.train(), x, mask)
    start = np.zeros(layer.running_mean.shape), np.ones(layer.running_mean.shape)
    return ref.track(*start, naive, case.tracked, momentum=1.0)


def assert_pooled(layer, expected, dtype=np.float64):
    for name, value in zip(("running_mean", "running_var"), expected, strict=True):
        got = getattr(layer, name)
        assert_close(got, value, scale=1, dtype=dtype, what=name)


def batch_norm(channels=3, **options):
    return fill(nn.BatchNorm1d(channels, dtype=np.float64, **options))


def running(layer):
    buffers = layer.running_mean, layer.running_var, layer.num_batches_tracked
    return [np.array(b) for b in buffers]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


# -- the statistics ------------------------------------------------------------------------------


@tracking
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_as_if_the_batches_were_one(case, dtype):
    layer, batches = case.layer(dtype), batches_of(case, dtype)
    nn.recalibrate(layer, batches, [layer])
    assert_pooled(layer, pooled(case, layer, batches), dtype)
    assert layer.num_batches_tracked == len(batches)


@tracking
def test_with_masks(case):
    """Each batch has its own, one of them nothing at all."""
    layer, batches = case.layer(), batches_of(case)
    masks = [normal(*b.shape, seed=1) < 0.5 for b in batches]
    masks[1][...] = False
    nn.recalibrate(
        lambda pair: layer(pair[0], mask=pair[1]), list(zip(batches, masks, strict=True)), [layer]
    )
    assert_pooled(layer, pooled(case, layer, batches, masks))


def test_a_moving_average_is_something_else():
    batches = [normal(n, 3, seed=n, offset=n) for n in (4, 9)]
    layer = nn.BatchNorm1d(3, dtype=np.float64)
    for batch in batches:
        layer(batch)
    moving = running(layer)
    nn.recalibrate(layer, batches, [layer])
    together = np.concatenate(batches)
    np.testing.assert_allclose(layer.running_mean, together.mean(0), rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, together.var(0, ddof=1), rtol=1e-13)
    assert np.all(np.abs(layer.running_mean - moving[0]) > 1)


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_momentum_does_not_matter(momentum):
    layer, batches = batch_norm(momentum=momentum), [normal(n, 3, seed=n) for n in (4, 9)]
    nn.recalibrate(layer, batches, [layer])
    np.testing.assert_allclose(layer.running_mean, np.concatenate(batches).mean(0), rtol=1e-12)


def test_training_goes_on_with_the_cumulative_average():
    layer = batch_norm(momentum=None)
    batches = [normal(6, 3, seed=s) for s in range(3)]
    nn.recalibrate(layer, batches[:2], [layer])
    layer(batches[2])
    assert layer.num_batches_tracked == 3
    np.testing.assert_allclose(layer.running_mean, np.concatenate(batches).mean(0), rtol=1e-12)


def test_large_offsets():
    """Batch means that are far from each other, and much larger than the deviations."""
    batches = [normal(n, 2, seed=n) + 1e6 * (n % 3 + 1) for n in (40, 2, 30, 77)]
    together = np.concatenate(batches)
    layer = nn.BatchNorm1d(2, dtype=np.float64)
    nn.recalibrate(layer, batches, [layer])
    np.testing.assert_allclose(layer.running_mean, together.mean(0), rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, together.var(0, ddof=1), rtol=1e-12)


def test_a_sample_without_the_batch_axis():
    layer = nn.InstanceNorm2d(3, track_running_stats=True, dtype=np.float64)
    x = normal(4, 3, 5, 6)
    nn.recalibrate(layer, list(x), [layer])
    np.testing.assert_allclose(layer.running_mean, x.mean((0, 2, 3)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(layer.running_var, x.var((2, 3), ddof=1).mean(0), rtol=1e-12)


def test_a_channel_that_never_counts_starts_anew():
    """Neither its old average nor a wrong value: there is nothing to estimate it from."""
    layer, batches = batch_norm(), [normal(n, 3, seed=n) for n in (4, 9)]
    mask = np.array([True, False, True])
    nn.recalibrate(lambda x: layer(x, mask=mask), batches, [layer])
    together = np.concatenate(batches)
    np.testing.assert_array_equal((layer.running_mean[1], layer.running_var[1]), (0, 1))
    np.testing.assert_allclose(layer.running_mean[mask], together.mean(0)[mask], rtol=1e-12)


def test_a_nan_stays_in_its_channel():
    layer, batches = batch_norm(), [normal(n, 3, seed=n) for n in (4, 9)]
    batches[0][1, 2] = np.nan
    nn.recalibrate(layer, batches, [layer])
    together = np.concatenate(batches)
    np.testing.assert_allclose(layer.running_mean, together.mean(0), rtol=1e-12)
    assert np.isnan(layer.running_var[2])


def test_skip_nonfinite():
    layer = batch_norm(skip_nonfinite=True)
    batches = [normal(n, 3, seed=n) for n in (4, 9, 5)]
    batches[1][0, 0] = np.inf
    nn.recalibrate(layer, batches, [layer])
    finite = np.concatenate(batches[::2])
    np.testing.assert_allclose(layer.running_mean, finite.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, finite.var(0, ddof=1), rtol=1e-12)


def test_skipped_batches_are_counted():
    layer = batch_norm(skip_nonfinite=True)
    batches = [normal(4, 3, seed=s) for s in range(3)]
    batches[1][0, 0] = np.inf
    nn.recalibrate(layer, batches, [layer])
    assert layer.num_batches_skipped == 1
    assert layer.num_batches_tracked == 2


def test_the_average_goes_on_by_channel():
    # Of three batches, one gives nothing to channel 1; a fourth goes on from there.
    layer = nn.BatchNorm1d(2, momentum=None, dtype=np.float64)
    masks = [np.ones((4, 2), bool) for _ in range(3)]
    masks[1][:, 1] = False
    batches = [(normal(4, 2, seed=s), mask) for s, mask in enumerate(masks)]
    nn.recalibrate(lambda batch: layer(batch[0], mask=batch[1]), batches, [layer])
    assert layer.num_batches_tracked == 3
    before, x = layer.running_mean.copy(), normal(4, 2, seed=9)
    layer(x)
    n = np.array([3, 2])
    np.testing.assert_allclose(layer.running_mean, (n * before + x.mean(0)) / (n + 1))


# -- several layers ------------------------------------------------------------------------------


class Chain:
    """One layer after the other, with something nonlinear between."""

    def __init__(self, *layers):
        self.layers = layers

    def __call__(self, x):
        for layer in self.layers:
            x = np.tanh(layer(x))
        return x


def test_a_layer_sees_what_the_one_before_makes_of_the_batch():
    first, second = batch_norm(), batch_norm()
    before = [layer.state_dict() for layer in (first, second)]
    batches = [normal(n, 3, seed=n, offset=n) for n in (4, 9, 2)]
    nn.recalibrate(Chain(first.eval(), second.eval()), batches, [first, second])
    np.testing.assert_allclose(first.running_mean, np.concatenate(batches).mean(0), rtol=1e-12)
    # In training mode: normalised with each batch's own statistics.
    weight, bias = before[0]["weight"], before[0]["bias"]
    between = np.concatenate(
        [np.tanh((b - b.mean(0)) / np.sqrt(b.var(0) + 1e-5) * weight + bias) for b in batches]
    )
    np.testing.assert_allclose(second.running_mean, between.mean(0), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(second.running_var, between.var(0, ddof=1), rtol=1e-11)
    for layer, state in zip((first, second), before, strict=True):
        for name in ("weight", "bias"):
            np.testing.assert_array_equal(layer.parameters()[name], state[name])


def test_only_the_given_layers():
    """One that is not given stays in evaluation, its averages as they are."""
    first, second = batch_norm().eval(), batch_norm().eval()
    before = running(first)
    batches = [normal(n, 3, seed=n) for n in (4, 9)]
    nn.recalibrate(Chain(first, second), batches, [second])
    assert_same(running(first), before)
    between = np.tanh(first(np.concatenate(batches)))
    np.testing.assert_allclose(second.running_mean, between.mean(0), rtol=1e-11)


def test_different_kinds_of_layers():
    makers = (
        nn.BatchNorm2d,
        nn.SwitchableNorm2d,
        lambda *args, **options: nn.InstanceNorm2d(*args, track_running_stats=True, **options),
    )
    layers, twins = ([fill(make(4, dtype=np.float64)) for make in makers] for _ in range(2))
    batches = [normal(n, 4, 3, 5, seed=n) for n in (2, 5)]
    nn.recalibrate(Chain(*layers), batches, layers)
    for layer, twin in zip(layers, twins, strict=True):
        # Of each channel, samples and pixels weigh the same: their mean is that of all of them.
        expected = np.concatenate(batches).mean((0, 2, 3))
        np.testing.assert_allclose(layer.running_mean, expected, rtol=1e-11, atol=1e-13)
        batches = [np.tanh(twin(batch)) for batch in batches]


def test_a_layer_called_twice_in_a_forward():
    layer, batches = batch_norm(), [normal(n, 3, seed=n) for n in (4, 9)]
    nn.recalibrate(Chain(layer, layer), batches, [layer])
    fresh = fill(nn.BatchNorm1d(3, dtype=np.float64))
    seen = [x for b in batches for x in (b, np.tanh(fresh(b)))]
    np.testing.assert_allclose(layer.running_mean, np.concatenate(seen).mean(0), rtol=1e-11)
    assert layer.num_batches_tracked == 4


def test_a_layer_given_twice():
    """A shared layer stands in a model's list of layers more than once."""
    layer, batches = batch_norm().eval(), [normal(n, 3, seed=n) for n in (4, 9)]
    nn.recalibrate(layer, batches, [layer, layer])
    np.testing.assert_allclose(layer.running_mean, np.concatenate(batches).mean(0), rtol=1e-12)
    assert not layer.training


def test_a_layer_whose_shape_comes_from_the_first_batch():
    layer, batches = nn.Norm(0, track_stats=True), [normal(n, 3, seed=n) for n in (4, 9)]
    nn.recalibrate(layer, batches, [layer])
    np.testing.assert_allclose(layer.running_mean, np.concatenate(batches).mean(0), rtol=1e-5)
    assert layer.weight.shape == layer.running_var.shape == (3,)


# -- arguments -----------------------------------------------------------------------------------


def test_generators():
    layer, batches = batch_norm(), [normal(n, 3, seed=n) for n in (4, 9)]
    nn.recalibrate(layer, (b for b in batches), (one for one in [layer]))
    np.testing.assert_allclose(layer.running_mean, np.concatenate(batches).mean(0), rtol=1e-12)


def test_a_batch_may_be_anything_that_forward_takes():
    layer, batches = batch_norm(), {"short": 4, "long": 9}
    nn.recalibrate(lambda name: layer(normal(batches[name], 3)), batches, [layer])
    together = np.concatenate([normal(n, 3) for n in (4, 9)])
    np.testing.assert_allclose(layer.running_mean, together.mean(0), rtol=1e-12)


# fmt: off
BAD = [
    ("no layers", lambda f, b, _: (f, b, []), ValueError, ["layers", "none"]),
    ("a layer without running statistics", lambda f, b, la: (f, b, [la, nn.LayerNorm(3)]),
     TypeError, ["layers", "LayerNorm"]),
    ("a BatchNorm that does not track",
     lambda f, b, la: (f, b, [nn.BatchNorm1d(3, track_running_stats=False)]),
     TypeError, ["layers", "BatchNorm1d"]),
    ("a SwitchableNorm without bn", lambda f, b, la: (f, b, [nn.SwitchableNorm1d(3, over=["ln"])]),
     TypeError, ["layers", "SwitchableNorm1d"]),
    ("what is no layer", lambda f, b, la: (f, b, [la, "bn"]), TypeError, ["layers", "bn"]),
    ("one layer alone", lambda f, b, la: (f, b, la), TypeError, ["layers"]),
    ("no batches", lambda f, b, la: (f, [], [la]), ValueError, ["batch"]),
    ("a generator of nothing", lambda f, b, la: (f, iter(()), [la]), ValueError, ["batch"]),
    ("what is no iterable", lambda f, b, la: (f, 5, [la]), TypeError, []),
    ("what is no function", lambda f, b, la: (None, b, [la]), TypeError, []),
    ("a layer that is never called", lambda f, b, la: (f, b, [la, nn.BatchNorm1d(7)]),
     ValueError, ["BatchNorm1d(7"]),
]
# fmt: on


@pytest.mark.parametrize(
    ("arguments", "error", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_arguments(arguments, error, words):
    layer = batch_norm().eval()
    before = running(layer)
    with pytest.raises(error) as caught:
        nn.recalibrate(*arguments(layer, [normal(4, 3), normal(5, 3)], layer))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_same(running(layer), before)
    assert not layer.training


# -- what is as before ---------------------------------------------------------------------------


def test_modes_are_put_back():
    layers = [batch_norm().train(mode) for mode in (True, False, True, False)]
    seen = []

    def forward(x):
        seen.append([layer.training for layer in layers])
        return Chain(*layers)(x)

    nn.recalibrate(forward, [normal(4, 3), normal(9, 3)], layers[1:])
    assert [layer.training for layer in layers] == [True, False, True, False]
    assert seen == [[True] * 4] * 2


def test_arrays_are_the_same_ones():
    """What holds on to a running statistic sees the new values."""
    layer = batch_norm()
    arrays = layer.running_mean, layer.running_var, layer.num_batches_tracked
    nn.recalibrate(layer, [normal(4, 3)], [layer])
    now = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert all(a is b for a, b in zip(arrays, now, strict=True))


def test_gradients_and_parameters_are_as_before():
    layer, x, dy = batch_norm(), normal(5, 3), normal(5, 3, seed=1)
    layer(x)
    layer.backward(dy)
    gradients = {name: g.copy() for name, g in layer.gradients().items()}
    parameters = {name: p.copy() for name, p in layer.parameters().items()}
    nn.recalibrate(layer, [normal(4, 3)], [layer])
    for now, before in ((layer.gradients(), gradients), (layer.parameters(), parameters)):
        assert now.keys() == before.keys()
        assert_same(now.values(), before.values())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_pending_backward_is_of_the_forward_before(training):
    layer, x, dy = batch_norm().train(training), normal(5, 3), normal(5, 3, seed=1)
    layer(x)
    expected = layer.backward(dy)
    layer.zero_grad()
    layer(x)
    before = layer.running_mean.copy()
    nn.recalibrate(layer, [normal(4, 3, seed=2)], [layer])
    assert np.any(layer.running_mean != before)
    np.testing.assert_array_equal(layer.backward(dy), expected)


def test_no_backward_where_there_was_none():
    layer = batch_norm()
    nn.recalibrate(layer, [normal(4, 3)], [layer])
    with pytest.raises(RuntimeError, match="backward"):
        layer.backward(normal(4, 3))


def test_the_layer_tracks_again():
    layer, x = batch_norm(), normal(6, 3)
    nn.recalibrate(layer, [x], [layer])
    expected = 0.9 * x.mean(0) + 0.1 * (x + 1).mean(0)
    layer(x + 1)
    np.testing.assert_allclose(layer.running_mean, expected, rtol=1e-12)
    assert layer.num_batches_tracked == 2


class FailingError(Exception):
    pass


@pytest.mark.parametrize("when", ["at once", "before the second layer", "late", "in the batches"])
def test_an_error_leaves_all_as_before(when):
    first, second = batch_norm().eval(), batch_norm()
    x, dy = normal(5, 3), normal(5, 3, seed=1)
    first(x)
    expected = first.backward(dy)
    first.zero_grad()
    first(x)
    before = [running(layer) for layer in (first, second)]
    calls = []

    def forward(batch):
        calls.append(batch)
        if when == "at once":
            raise FailingError
        y = first(batch)
        if when == "before the second layer":
            raise FailingError
        second(y)
        if when == "late" and len(calls) == 3:
            raise FailingError

    def batches():
        yield from (normal(n, 3, seed=n) for n in (4, 9, 2))
        raise FailingError

    with pytest.raises(FailingError):
        nn.recalibrate(forward, batches(), [first, second])
    for layer, state in zip((first, second), before, strict=True):
        assert_same(running(layer), state)
    assert (first.training, second.training) == (False, True)
    np.testing.assert_array_equal(first.backward(dy), expected)
    second(x)  # tracks as before
    assert second.num_batches_tracked == before[1][2] + 1


def test_an_interrupt_leaves_all_as_before():
    layer = batch_norm().eval()
    before = running(layer)

    def forward(x):
        layer(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nn.recalibrate(forward, [normal(4, 3)], [layer])
    assert_same(running(layer), before)
    assert not layer.training


def test_a_batch_that_a_layer_refuses():
    layer = batch_norm().eval()
    before = running(layer)
    with pytest.raises(ValueError, match="x:"):
        nn.recalibrate(layer, [normal(4, 3), normal(4, 2)], [layer])
    with pytest.raises(ValueError, match="value"):
        nn.recalibrate(layer, [normal(4, 3), normal(1, 3)], [layer])
    assert_same(running(layer), before)
    assert not layer.training


# -- the progress bar ----------------------------------------------------------------------------


def test_nothing_is_printed_for_short_runs(capfd):
    layer = batch_norm()
    nn.recalibrate(layer, [normal(4, 3)] * 3, [layer])
    assert capfd.readouterr() == ("", "")


def test_a_bar_for_long_runs(capfd, monkeypatch):
    tqdm = pytest.importorskip("tqdm.auto").tqdm

    class Impatient(tqdm):
        def __init__(self, *args, **options):
            assert options["delay"] > 1
            super().__init__(*args, **{**options, "delay": 1e-9, "mininterval": 0})

    monkeypatch.setattr("tqdm.auto.tqdm", Impatient)
    layer = batch_norm()
    nn.recalibrate(layer, [normal(4, 3)] * 3, [layer])
    out, err = capfd.readouterr()
    assert not out
    assert "recalibrate" in err
    assert "3/3" in err


def test_without_tqdm(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tqdm"] + ["tqdm"]:
        monkeypatch.setitem(sys.modules, name, None)
    layer, batches = batch_norm(), [normal(n, 3, seed=n) for n in (4, 9)]
    nn.recalibrate(layer, batches, [layer])
    np.testing.assert_allclose(layer.running_mean, np.concatenate(batches).mean(0), rtol=1e-12)
