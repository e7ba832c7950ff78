"""The examples: their layers against oracles, and what the scripts print and draw."""

import contextlib
import importlib
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from reference import central_difference
from scipy.signal import correlate2d
from scipy.special import softmax

import numbanorm

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    """Import an example as it imports its neighbours: by its name, from its folder."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


@pytest.fixture(scope="module")
def nn(example):
    return example("nn")


@pytest.fixture
def rng():
    return np.random.default_rng(1)


LAYERS = {
    "Linear": (lambda nn, kw: nn.Linear(3, 4, **kw), (5, 3)),
    "Conv2d": (lambda nn, kw: nn.Conv2d(2, 3, **kw), (2, 2, 4, 5)),
    "Conv2d-stride-even": (lambda nn, kw: nn.Conv2d(2, 3, stride=2, **kw), (2, 2, 4, 6)),
    "Conv2d-stride-odd": (lambda nn, kw: nn.Conv2d(2, 3, stride=2, **kw), (2, 2, 5, 3)),
    "Conv2d-kernel-1": (lambda nn, kw: nn.Conv2d(2, 3, 1, **kw), (2, 2, 3, 3)),
    "Conv2d-kernel-over-image": (lambda nn, kw: nn.Conv2d(1, 2, 5, **kw), (1, 1, 3, 2)),
    "Conv2d-no-bias": (lambda nn, kw: nn.Conv2d(2, 3, bias=False, **kw), (2, 2, 3, 3)),
    "ReLU": (lambda nn, kw: nn.ReLU(), (3, 4)),
    "Flatten": (lambda nn, kw: nn.Flatten(), (3, 2, 2)),
    # The protocol is one: the package's layers stand between the example's.
    "Sequential": (
        lambda nn, kw: nn.Sequential(
            nn.Conv2d(1, 2, **kw),
            numbanorm.SwitchableNorm2d(2, dtype=np.float64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * 3 * 3, 2, **kw),
        ),
        (3, 1, 3, 3),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_central_differences(nn, rng, name):
    make, shape = LAYERS[name]
    layer = make(nn, {"rng": rng, "dtype": np.float64})
    for parameter in layer.parameters().values():
        parameter += rng.normal(size=parameter.shape)  # biases away from their 0
    x = rng.normal(size=shape)
    dy = rng.normal(size=layer(x).shape)

    def loss():
        return np.sum(layer(x) * dy)

    loss()
    gradients = {"x": layer.backward(dy)} | layer.gradients()
    values = {"x": x} | layer.parameters()
    assert gradients.keys() == values.keys()
    for key, value in values.items():
        expected = central_difference(loss, value)
        np.testing.assert_allclose(gradients[key], expected, rtol=1e-6, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_the_sum_of_correlations(nn, rng, stride):
    layer = nn.Conv2d(2, 3, stride=stride, rng=rng, dtype=np.float64)
    weight, bias = layer.parameters()["weight"], layer.parameters()["bias"]
    bias += rng.normal(size=3)
    x = rng.normal(size=(2, 2, 5, 4))
    expected = [
        [
            sum(correlate2d(x[n, i], weight[o, i], mode="same") for i in range(2)) + bias[o]
            for o in range(3)
        ]
        for n in range(2)
    ]
    np.testing.assert_allclose(layer(x), np.array(expected)[:, :, ::stride, ::stride], rtol=1e-12)


def test_layers_stay_in_float32(nn, rng):
    layers = nn.Conv2d(1, 2, rng=rng), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2, rng=rng)
    model = nn.Sequential(*layers)
    y = model(rng.normal(size=(2, 1, 3, 3)).astype(np.float32))
    _, dlogits = nn.cross_entropy(y, np.array([0, 1]))
    assert {y.dtype, dlogits.dtype, model.backward(dlogits).dtype} == {np.dtype(np.float32)}


def test_gradients_accumulate_until_zero_grad(nn, rng):
    layers = nn.Conv2d(1, 2, rng=rng), numbanorm.BatchNorm2d(2), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(18, 2, rng=rng))
    x = rng.normal(size=(2, 1, 3, 3)).astype(np.float32)
    dy = rng.normal(size=(2, 2)).astype(np.float32)
    model(x)
    model.backward(dy)
    once = {name: gradient.copy() for name, gradient in model.gradients().items()}
    assert list(once) == [f"{layer}.{name}" for layer in (0, 1, 3) for name in ("weight", "bias")]
    model(x)
    model.backward(dy)
    for name, gradient in model.gradients().items():
        np.testing.assert_allclose(gradient, 2 * once[name], rtol=1e-6, err_msg=name)
    model.zero_grad()
    assert not any(gradient.any() for gradient in model.gradients().values())


def test_mode_reaches_every_layer(nn, rng):
    norm = numbanorm.BatchNorm2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, rng=rng), nn.Sequential(norm))
    assert model.eval() is model
    assert not (model.training or norm.training)
    assert model.train() is model
    assert model.training and norm.training


def test_cross_entropy(nn, rng):
    logits, labels = rng.normal(size=(4, 3)), np.array([0, 2, 1, 1])
    loss, dlogits = nn.cross_entropy(logits, labels)
    assert loss == pytest.approx(-np.log(softmax(logits, axis=1)[range(4), labels]).mean())
    expected = central_difference(lambda: nn.cross_entropy(logits, labels)[0], logits)
    np.testing.assert_allclose(dlogits, expected, atol=1e-9)
    loss, dlogits = nn.cross_entropy(np.array([[1000.0, 0.0]]), np.array([1]))
    assert loss == 1000
    np.testing.assert_array_equal(dlogits, [[1, -1]])


def test_sgd_keeps_its_momentum(nn):
    layer = nn.Layer(weight=np.array([1.0]))
    optimiser = nn.SGD(layer, learning_rate=0.5, momentum=0.25)
    layer.gradients()["weight"][:] = 2
    optimiser.step()
    np.testing.assert_allclose(layer.parameters()["weight"], 1 - 0.5 * 2)
    optimiser.step()
    np.testing.assert_allclose(layer.parameters()["weight"], 0 - 0.5 * (0.25 * 2 + 2))


def test_quickstart_prints_the_worked_numbers(example, capsys):
    example("quickstart").main()
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    for expected in (
        "[[-1.2247 -1.2247 -1.2247] [ 0.0000 0.0000 0.0000] [ 1.2247 1.2247 1.2247]]",
        "[[[-1.2865 -0.9649 -0.6433] [-1.2865 -0.9649 -0.6433]] "
        "[[ 0.6433 0.9649 1.2865] [ 0.6433 0.9649 1.2865]]]",
        "[[-0.7071 0.0000 1.4142 -1.4142 0.7071]]",
        "mean 0.0000 variance 1.0000 (divided by n), 1.2500 (divided by n - 1)",
        "LayerNorm((10,), eps=1e-05, elementwise_affine=True) (20, 5, 10) -> (20, 5, 10), "
        "20 parameters",
        "LayerNorm((5, 10, 10), eps=1e-05, elementwise_affine=True) "
        "(20, 5, 10, 10) -> (20, 5, 10, 10), 1000 parameters",
        "BatchNorm2d(5, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True) "
        "(20, 5, 10, 10) -> (20, 5, 10, 10), 10 parameters",
        "InstanceNorm2d(100, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False) "
        "(20, 100, 35, 45) -> (20, 100, 35, 45), 0 parameters",
        "InstanceNorm2d(100, eps=1e-05, momentum=0.1, affine=True, track_running_stats=False) "
        "(20, 100, 35, 45) -> (20, 100, 35, 45), 200 parameters",
    ):
        assert expected in out
    differences = [float(number) for number in re.findall(r"largest difference (\S+)", out)]
    assert len(differences) == 2
    assert max(differences) < 2e-6


@pytest.fixture(scope="module")
def training(example, tmp_path_factory):
    """Every norm trained for two epochs: the script's module, runs, output and figure."""
    script = example("train_digits")
    path = tmp_path_factory.mktemp("figures") / "all.png"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runs = script.main(["--epochs", "2", "--output", str(path)])
    return SimpleNamespace(script=script, runs=runs, out=out.getvalue(), path=path)


def test_every_network_learns(training):
    assert list(training.runs) == list(training.script.NORMS)
    for norm, run in training.runs.items():
        assert run.losses.shape == (2, 1347 // 32)
        first, last = run.losses.mean(axis=1)
        assert last < 0.6 * first, norm
        assert run.accuracy > 0.8, norm  # chance is 0.1


def test_stopwatch_runs_in_forward_and_backward(example, nn, monkeypatch):
    script = example("train_digits")
    monkeypatch.setattr(script, "perf_counter", iter([1, 4, 10, 15]).__next__)
    layer = script.Timed(nn.ReLU())
    x = np.array([-1.0, 2.0])
    np.testing.assert_array_equal(layer(x), [0, 2])
    assert layer.seconds == 3
    np.testing.assert_array_equal(layer.backward(x), [0, 2])
    assert layer.seconds == 3 + 5
    assert layer.training  # all else is the layer's


def test_only_norm_layers_are_timed(training):
    for norm, run in training.runs.items():
        assert (run.seconds_in_norm > 0) == (norm != "none")
        assert run.seconds_in_norm < run.seconds


def test_importance_starts_even_and_moves(training):
    for norm, run in training.runs.items():
        assert len(run.importance) == (run.losses.size if norm == "switchable" else 0)
    history = training.runs["switchable"].importance
    weights = np.array(
        [[[list(w.values()) for w in layer.values()] for layer in step] for step in history]
    )
    assert weights.shape == (len(history), 3, 2, 3)  # steps, layers, mean and var, in ln bn
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights[0], 1 / 3, atol=0.02)
    assert (np.abs(weights[-1] - 1 / 3).max(axis=-1) > 0.01).all()


def test_closing_table(training):
    out = training.out
    for title in "accuracy", "loss", "seconds per epoch", "in normalisation", "compilation":
        assert title in out
    for norm, run in training.runs.items():
        row = re.search(rf"^{norm} +(.+)$", out, re.MULTILINE)[1].split()
        expected = run.accuracy, run.losses[-1].mean(), run.seconds, run.seconds_in_norm
        np.testing.assert_allclose([float(cell) for cell in row], expected, atol=5.01e-4)
    assert str(training.path) in out


def read_png(path):
    image = importlib.import_module("matplotlib.image").imread(path)
    assert image.std() > 0.01  # something is drawn
    return image


def test_figure_of_all_norms(training):
    height, width, _ = read_png(training.path).shape
    assert width > 2 * height  # the losses, and beside them the importance weights


def test_figure_of_one_norm_and_few_samples(example, tmp_path, capsys):
    path = tmp_path / "batch.png"
    options = ["--norm", "batch", "--epochs", "1", "--batch-size", "9999", "--seed", "3"]
    runs = example("train_digits").main([*options, "--output", str(path)])
    assert list(runs) == ["batch"]
    assert runs["batch"].losses.shape == (1, 1)  # no more in a batch than there is
    height, width, _ = read_png(path).shape
    assert width < 2 * height
    captured = capsys.readouterr()
    assert str(path) in captured.out
    assert "batch: 100%" in captured.err  # the progress bar


def test_a_whole_step_inside_njit(example, capsys):
    runs = example("train_njit").main(["--epochs", "3"])
    out = capsys.readouterr().out
    assert float(re.search(r"first epoch (\S+)", out)[1]) < 1e-5
    for way, (_, losses, accuracy, _) in runs.items():
        assert losses.shape == (3, 1347 // 32)
        assert losses[2].mean() < 0.3 * losses[0].mean()
        assert accuracy > 0.93
        assert re.search(rf"^{way} +{losses[2].mean():.4f} +{accuracy:.3f} ", out, re.MULTILINE)


def test_a_whole_step_descends_along_the_gradient(example, rng):
    script = example("train_njit")
    x, targets = rng.normal(size=(6, 64)), np.eye(10)[rng.integers(10, size=6)]
    parameters, *running = script.initial(5, rng)
    parameters = tuple(p + 0.1 * rng.normal(size=p.shape) for p in parameters)  # float64

    def loss():
        copies = [p.copy() for p in (*parameters, *running)]
        return script.step(x, targets, tuple(copies[:5]), *copies[5:], 0.0)

    expected = [central_difference(loss, p) for p in parameters]
    for way, (step, _) in script.WAYS.items():
        stepped = tuple(p.copy() for p in parameters)
        step(x, targets, stepped, *(r.copy() for r in running), 1.0)
        for new, old, gradient in zip(stepped, parameters, expected, strict=True):
            np.testing.assert_allclose(old - new, gradient, rtol=1e-5, atol=1e-7, err_msg=way)


@pytest.mark.parametrize("option", [["--epochs", "0"], ["--batch-size", "-1"], ["--norm", "fog"]])
def test_wrong_options_are_named(example, capsys, option):
    with pytest.raises(SystemExit):
        example("train_digits").main(option)
    assert option[0] in capsys.readouterr().err


def test_shifted_moves_by_one_pixel_at_most(example, rng):
    image = np.zeros((200, 1, 5, 5), np.float32)
    image[:, 0, 2, 2] = 1
    moved = example("train_digits").shifted(image, rng)
    assert moved.shape == image.shape
    assert moved.dtype == np.float32
    places = {(row, column) for _, _, row, column in np.argwhere(moved)}
    assert places == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}
