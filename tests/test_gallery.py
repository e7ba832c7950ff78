"""The gallery: each script at a small size, its numbers and its figure."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from reference import central_difference

import numbanorm

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    """Import an example as it imports its neighbours: by its name, from its folder."""
    for needed in "matplotlib", "sklearn", "tqdm":
        pytest.importorskip(needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


@pytest.fixture
def run(example, tmp_path, capsys):
    """Run a script; return its module, what its main returns, and the lines of its table."""

    def run(name, arguments=""):
        script, figure = example(name), tmp_path / "figure.png"
        result = script.main([*arguments.split(), "--output", str(figure)])
        check_figure(figure)
        printed = capsys.readouterr().out
        assert str(figure) in printed
        return script, result, printed

    return run


def check_figure(path):
    from PIL import Image

    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"), np.float64)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 400
    # Drawn on: neither blank nor a mere frame.
    assert (pixels.min(axis=2) < 250).mean() > 0.02


def row(printed, name):
    """Return the numbers of the line that starts with a name."""
    (line,) = (line for line in printed.splitlines() if line.startswith(name))
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-\d+)?", line[len(name) :])]


def test_layernorm_distributions(run):
    _, (before, after), printed = run("layernorm_distributions")
    assert before.shape == after.shape == (100, 50)
    np.testing.assert_allclose(after.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(after.var(axis=1), 1, atol=1e-3)
    assert before.var(axis=1).max() > 10 * before.var(axis=1).min()
    # LayerNorm does not normalise a feature over the samples.
    assert np.ptp(after.var(axis=0)) > 1
    assert row(printed, "variance of a sample") == pytest.approx(
        [before.var(axis=1).min(), before.var(axis=1).max(), 1, 1], abs=0.006
    )


def test_learning_rate(run):
    arguments = "--rates 0.1 3 --scales 0.1 1 --epochs 2 --seeds 1"
    script, (over_rates, over_scales), printed = run("learning_rate", arguments)
    assert list(script.NETWORKS) == ["sigmoid", "sigmoid, BatchNorm", "ReLU", "ReLU, BatchNorm"]
    assert over_rates.shape == over_scales.shape == (4, 2, 2)
    sigmoid, sigmoid_norm, relu, relu_norm = 100 * over_rates[:, 1]
    assert sigmoid.max() < 30 < 80 < sigmoid_norm.min()
    assert relu[0] > 70  # a small learning rate suits both
    assert relu[1] < 30 < 80 < relu_norm.min()
    # Initial weights of a tenth.
    assert over_scales[2, 1, 0] < 0.3 < 0.8 < over_scales[3, 1, 0]
    # The second setting of the second panel is the first of the first.
    np.testing.assert_array_equal(over_rates[:, :, 0], over_scales[:, :, 1])
    *test, best, training = row(printed.partition("initial")[0], "ReLU, BatchNorm")
    np.testing.assert_allclose(test, relu_norm, atol=0.051)
    assert best == max(test)
    assert training == pytest.approx(100 * over_rates[3, 0, test.index(best)], abs=0.051)


def test_batch_size(run):
    arguments = "--sizes 64 4 --epochs 1 --seeds 1 --rate 0.3 --processes 1"
    script, (accuracies, weights), printed = run("batch_size", arguments)
    norms = list(script.NORMS)
    assert accuracies.shape == (len(norms), 2, 1)
    assert weights.shape == (2, 1, 2, 3)  # sizes, seeds, mean and variance, statistics
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    small, large = weights.mean(axis=(1, 2))[:, script.OVER.index("bn")]
    assert large > small + 0.02
    batch = accuracies[norms.index("batch")]
    assert batch.min() > 0.75
    assert (accuracies[:, 0] > 0.6).all()
    found = row(printed, "batch  ")
    expected = [[100 * a.mean(), 100 * script.error(a)] for a in batch]
    np.testing.assert_allclose(found, np.ravel(expected), atol=0.051)
    np.testing.assert_allclose(row(printed, "bn in mean"), weights[:, :, 0, 2].mean(1), atol=0.0051)


def test_batch_size_is_the_same_in_processes(example):
    script = example("batch_size")
    settings = [("batch", 128, 0), ("switchable", 128, 1)]
    alone, together = (
        script.train_all(script.train, settings, n, epochs=1, rate=0.1) for n in (1, 2)
    )
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isnan(alone[1][0]).all()


def test_standard_error(example):
    error = example("batch_size").error
    np.testing.assert_allclose(error(np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])), [3**-0.5, 0])
    assert error(np.array([5.0])) == 0


def test_covariate_shift(run):
    script, runs, printed = run("covariate_shift", "--epochs 3")
    assert list(runs) == ["none", "batch", "layer"]
    for norm, found in runs.items():
        assert found.mean.shape == found.std.shape == (63, 100)
        shift, growth = np.median(script.shift(found)), np.median(script.growth(found))
        numbers = [shift, growth, 100 * found.accuracies[0], 100 * found.accuracies[-1]]
        np.testing.assert_allclose(row(printed, norm), numbers, atol=0.051)
    shifts = {norm: np.median(script.shift(found)) for norm, found in runs.items()}
    assert shifts["batch"] < 0.1 < 1 < shifts["layer"] < shifts["none"]
    assert np.median(script.growth(runs["batch"])) < 1.1
    assert runs["batch"].accuracies[0] > runs["none"].accuracies[0] + 0.1


def test_watching_does_not_change_the_network(example):
    script = example("covariate_shift")
    images = script.digits(0)[0].reshape(-1, 64)[:50]
    rng = np.random.default_rng(0)
    model = script.network(script.ReLU, 1, numbanorm.BatchNorm1d, rng=rng, hidden=(8, 8))
    before = model.layers[1].state_dict()
    moments = script.input_of_last_activation(model, images)
    assert moments.mean.shape == (8,)
    np.testing.assert_allclose(moments.mean, 0, atol=1e-6)
    after = model.layers[1].state_dict()
    assert not before["running_mean"].any()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


def test_depth(run):
    _, accuracies, printed = run("depth", "--depths 2 10 --epochs 2 --seeds 1")
    assert accuracies.shape == (2, 3, 2, 1)  # initial weights, norms, depths, seeds
    he, torch = 100 * accuracies[..., 0]
    assert torch[0, 1] < 20 < 85 < torch[1, 1]  # ten layers, without a norm and with BatchNorm
    assert (torch[:, 0] > 70).all()  # two layers do without
    assert (he[:, 0] > 70).all()
    assert row(printed, "PyTorch's, batch")[::2] == pytest.approx(torch[1], abs=0.051)


def test_the_best_rate_is_that_of_the_mean(example):
    # Two networks, three rates, two seeds.
    accuracies = np.array([[[1, 9], [6, 6], [2, 2]], [[0, 0], [1, 1], [2, 4]]], float)
    np.testing.assert_array_equal(example("depth").best_rate(accuracies), [[6, 6], [2, 4]])


def test_depth_of_a_network(example):
    model = example("depth").network(5, "batch", 1, np.random.default_rng(0))
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 4 + ["Linear"]


def test_single_sample(run):
    script, results, printed = run("single_sample", "--epochs 2 --companies 20")
    training, evaluation = map(script.MODES.get, ("training", "evaluation"))
    assert (training, evaluation) == (True, False)
    shares, probabilities = results["batch"]
    # The company counts in training only; then the fewer, the worse.
    assert np.ptp(probabilities[0]) > 0.1
    np.testing.assert_allclose(np.ptp(probabilities[1]), 0, atol=1e-6)
    assert shares[0, 0] < shares[0, 1] < shares[0, 3] - 0.03
    assert shares[1, 0] > shares[0, 0] + 0.1
    shares, probabilities = results["layer"]
    np.testing.assert_allclose(np.ptp(probabilities), 0, atol=1e-6)
    for norm, (shares, _) in results.items():
        # Evaluation knows no batches; one logit may round to the other side.
        np.testing.assert_allclose(np.ptp(shares[1]), 0, atol=0.003)
        *cells, _, _ = row(printed, f"{norm}, training")
        np.testing.assert_allclose(cells, 100 * shares[0], atol=0.051)


def test_training_leaves_evaluation_alone(example):
    script = example("single_sample")
    images = script.digits(0)[0][:64]
    data = images, None, np.arange(64) % 10, None
    training, evaluation = script.trained("batch", data, 1, 0)
    before = evaluation(images)
    training(images * 3)
    np.testing.assert_array_equal(evaluation(images), before)


def test_before_after(run):
    script, accuracies, printed = run("before_after", "--epochs 1 --seeds 2")
    assert accuracies.shape == (2, 2, 2, 2)  # norms, activations, places, seeds
    assert accuracies[:, 0].min() > 0.8  # ReLU: both places train
    for k, kind in enumerate(script.KINDS):
        for a, activation in enumerate(script.ACTIVATIONS):
            before, after = 100 * accuracies[k, a]
            difference = before - after
            expected = before.mean(), after.mean(), difference.mean(), script.interval(difference)
            assert row(printed, f"{kind}, {activation}") == pytest.approx(expected, abs=0.051)


def test_the_norm_stands_before_or_after(example):
    network = example("before_after").network
    for place, pair in {
        "before": ["BatchNorm2d", "Sigmoid"],
        "after": ["Sigmoid", "BatchNorm2d"],
    }.items():
        model = network("batch", "sigmoid", place, np.random.default_rng(0))
        kinds = [type(layer).__name__ for layer in model.layers]
        assert kinds == ["Conv2d", *pair] * 3 + ["Flatten", "Linear"]


def test_confidence_interval(example):
    from scipy.stats import t

    values = np.array([[1.0, 2.0, 4.0, 7.0], [3.0, 3.0, 3.0, 3.0]])
    low, high = t.interval(0.95, 3, values[0].mean(), values[0].std(ddof=1) / 2)
    interval = example("before_after").interval
    np.testing.assert_allclose(interval(values), [(high - low) / 2, 0])


def test_rnn(run):
    script, found, printed = run("rnn", "--epochs 1 --seeds 2 --words 800")
    norms, rates, seeds, _ = found.shape
    assert (norms, rates, seeds) == (3, 3, 2)
    assert "800 words of 2 to 12 letters" in printed
    assert found[script.NORMS.index("layer")].min() < 4  # of log2(27) = 4.8
    best = script.best_rates(found)
    at_best = found[np.arange(3), best].mean(axis=1)
    none, batch, layer = at_best[:, 1]
    assert batch > max(none, layer) + 0.2  # the first letter
    for norm, rows, (_, first, *_, last) in zip(script.NORMS, found, at_best, strict=True):
        whole = rows[..., 0]
        expected = np.ravel(np.stack([whole.mean(1), script.interval(whole)], axis=1))
        got = row(printed, norm)
        np.testing.assert_allclose(got, [*expected, first, last], atol=5.1e-4)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_rnn_gradients_are_those_of_central_differences(example, norm):
    script = example("rnn")
    x, targets = script.encode(["a", "cab", "abba", "be"])
    model = script.RNN(norm, 5, rng=np.random.default_rng(0), dtype=np.float64)
    model.backward(script.loss(model, x, targets)[1])
    for name, parameter in model.parameters().items():
        numeric = central_difference(lambda: script.loss(model, x, targets)[0], parameter)
        np.testing.assert_allclose(model.gradients()[name], numeric, atol=1e-7)


def test_rnn_keeps_words_apart_and_padding_out(example):
    script = example("rnn")
    x, targets = script.encode(["cab", "be"])
    end, pad = script.END, -1
    np.testing.assert_array_equal(x, [[end, 2, 0, 1], [end, 1, 4, pad]])
    np.testing.assert_array_equal(targets, [[2, 0, 1, end], [1, 4, end, pad]])
    model = script.RNN("layer", 5, rng=np.random.default_rng(0))
    np.testing.assert_allclose(model(x)[1, :3], model(x[1:, :3])[0], atol=1e-5)
    # As if the network knew nothing: log2(27) bits of each letter.
    model.parameters()["outputs"][...] = 0
    np.testing.assert_allclose(script.bits(model, x, targets), np.log2(27), rtol=1e-6)


def test_style(run):
    script, shares, printed = run("style", "--seeds 2")
    kinds, styles, seeds = shares.shape
    assert (kinds, styles, seeds) == (len(script.KINDS), len(script.STYLES), 2)
    found = dict(zip(script.KINDS, shares.mean(axis=2), strict=True))
    places = {style: s for s, style in enumerate(script.STYLES)}
    # A scale and a shift of each channel.
    for style in "less contrast", "darker", "evening", "blue":
        assert found["instance"][places[style]] > 0.99
        assert max(found[kind][places[style]] for kind in ("none", "batch")) < 0.6
    assert found["layer"][places["less contrast"]] > 0.99
    assert found["layer"][places["blue"]] < 0.1
    assert (shares[:, places["original"]] == 1).all()
    for style, s in places.items():
        values = 100 * shares[:, s]
        expected = np.ravel(np.stack([values.mean(1), script.interval(values)], axis=1))
        np.testing.assert_allclose(row(printed, style), expected, atol=0.051)


def test_squares_are_parts_of_the_images(example):
    script = example("style")
    images = np.random.default_rng(0).random((2, 3, 70, 100))
    parts = script.squares(images)
    assert parts.shape == (2 * 2 * 3, 3, 32, 32)
    np.testing.assert_array_equal(parts[6 + 3 + 1], images[1, :, 32:64, 32:64])


def test_styles_keep_to_what_a_picture_has(example):
    x = np.random.default_rng(0).random((1, 3, 4, 4)).astype(np.float32)
    for change in example("style").STYLES.values():
        y = change(x)
        assert y.dtype == np.float32
        assert y.min() >= 0
        assert y.max() <= 1


def test_regularisation(run):
    script, accuracies, printed = run("regularisation", "--epochs 3 --seeds 2 --processes 1")
    sizes, ways, norms = map(list, (script.SIZES, script.AUGMENTED, script.NORMS))
    assert accuracies.shape == (len(sizes), len(ways), len(norms), 2, 2)
    training, test = accuracies[1, 0, norms.index("batch")].mean(axis=1)  # 300 as they are
    assert training > 0.9
    assert test > 0.8
    none, batch = 100 * accuracies[1, 1, :2, 1]
    training = 100 * accuracies[1, 1, 1, 0].mean()
    expected = [training] + [
        number for v in (batch, batch - none) for number in (v.mean(), script.interval(v))
    ]
    np.testing.assert_allclose(row(printed, "300 shifted, batch"), expected, atol=0.051)


def test_switchable(run):
    script, (scores, weights), printed = run(
        "switchable", "--sizes 8 --steps 15 --seeds 2 --processes 1"
    )
    tasks, norms = list(script.TASKS), list(script.NORMS)
    assert scores.shape == (3, 1, len(norms), 2)
    assert weights.shape == (3, 1, 2, 2, 4)  # tasks, sizes, seeds, layers, statistics
    np.testing.assert_allclose(np.nansum(weights, axis=-1), 1, rtol=1e-6)
    # GroupNorm's statistics in the pixels alone.
    np.testing.assert_array_equal(
        np.isnan(weights[..., 3]).any(axis=(1, 2, 3)), [True, True, False]
    )
    chance = np.array([1 / 10, 1 / 26, 0])
    assert (scores.mean(axis=(1, 2, 3)) > chance + 0.04).all()
    pixels = scores[tasks.index("pixels"), 0].mean(axis=1)
    assert pixels[norms.index("instance")] > pixels[norms.index("batch")]
    first, second, _ = printed.split("\n\n")
    found = 100 * scores[0, 0]
    expected = np.ravel(np.stack([found.mean(1), script.interval(found)], axis=1))
    np.testing.assert_allclose(row(first, "digits, 8"), expected, atol=0.051)
    expected = np.ravel(np.stack(script.against(found), axis=1))
    np.testing.assert_allclose(row(second, "digits, 8"), expected, atol=0.051)
    counts = [
        list(map(int, re.findall(r"\d+", re.search(f"^{k} .*", second, re.M)[0])))
        for k in ("wins", "ties", "loses")
    ]
    np.testing.assert_array_equal(np.sum(counts, axis=0), [3] * 4)


def test_verdicts(example):
    script = example("switchable")
    assert [script.verdict(*pair) for pair in ((2, 1), (-2, 1), (0.5, 1), (-1, 1))] == [
        "wins",
        "loses",
        "ties",
        "ties",
    ]
    mean, half = script.against(np.array([[1.0, 2.0, 3.0], [3.0, 5.0, 4.0]]))
    np.testing.assert_allclose(mean, [2])
    np.testing.assert_allclose(half, script.interval(np.array([[2.0, 3.0, 1.0]])))


def test_the_tasks_of_switchable(example):
    script = example("switchable")
    x, targets, mask = script.blanked([[2, 0, 1]])  # cab
    np.testing.assert_array_equal(targets[:, 0, :3], [[2, -1, -1], [-1, 0, -1], [-1, -1, 1]])
    assert (targets[:, 0, 3:] == -1).all()
    blank = len(script.LETTERS)
    np.testing.assert_array_equal(x[1, :, 0, :3].argmax(axis=0), [2, blank, 1])
    np.testing.assert_array_equal(x.sum(axis=1), mask[:, 0])
    images = np.zeros((5, 1, 8, 8), np.float32)
    images[:, :, 2:4, 3] = 1
    x, targets = script.on_photographs(images, np.random.default_rng(0))
    assert (targets.sum(axis=(1, 2)) == 2).all()


def test_custom_axes(run):
    script, (differences, outputs), printed = run("custom_axes", "--height 20")
    kinds = [name.partition("(")[0] for name in differences]
    assert set(kinds) == {"BatchNorm2d", "InstanceNorm2d", "GroupNorm", "LayerNorm", "RMSNorm"}
    assert set(differences.values()) == {0.0}
    assert printed.count("largest difference 0\n") == len(differences)
    x = script.photographs(20).astype(np.float64)
    assert x.min() >= 0
    assert x.max() <= 1
    for title, norm in script.unnamed().items():
        mean, var = x.mean(norm.axes, keepdims=True), x.var(norm.axes, keepdims=True)
        expected = (x - mean) / np.sqrt(var + 1e-5)
        np.testing.assert_allclose(outputs[title], expected, atol=2e-4)


def test_photographs_are_means_of_blocks(example):
    from sklearn.datasets import load_sample_image

    x = example("custom_axes").photographs(100)
    assert x.shape == (2, 3, 106, 160)
    block = load_sample_image("china.jpg")[4:8, 8:12].mean(axis=(0, 1)) / 255
    np.testing.assert_allclose(x[0, :, 1, 2], block, rtol=1e-6)


def test_dataset_statistics_in_pieces(run, monkeypatch):
    script = importlib.import_module("dataset_statistics")
    monkeypatch.setattr(script, "has_dask", lambda: False)
    # A last piece that is smaller than the others.
    _, (rows, exact), printed = run("dataset_statistics", "--images 70 --piece 16")
    np.testing.assert_allclose(rows["Moments.merge"], exact, rtol=1e-14)
    assert np.abs(rows["average of deviations"] - exact).max() > 0.01
    np.testing.assert_allclose(row(printed, "exact"), exact, atol=1e-6)
    assert "pip install" in printed
    assert "at most 2 MB" in printed  # 16 * 3 * 96 * 96 floats


def test_dataset_statistics_with_dask(run):
    pytest.importorskip("dask.array")
    _, (rows, exact), printed = run("dataset_statistics", "--images 64 --piece 6")
    assert "11 tasks read a piece each" in printed
    for scheduler in "threads", "processes":
        np.testing.assert_allclose(rows[f"Dask, {scheduler}"], exact, rtol=1e-14)


def test_exact_statistics_are_those_of_numpy(example, tmp_path):
    script = example("dataset_statistics")
    path = tmp_path / "images.npy"
    script.write(path, 10, seed=1)
    data = np.load(path, mmap_mode="r")
    assert data.shape == (10, 3, 96, 96)
    counts = script.histograms(script.OnDisk(path), 4)
    assert counts.sum() == data.size
    exact = [script.exact_std(channel) for channel in counts]
    np.testing.assert_allclose(exact, (data / 255).std(axis=(0, 2, 3)), rtol=1e-12)
    total = numbanorm.Moments.merge(script.in_pieces(data, 3))
    np.testing.assert_allclose(script.std(total), exact, rtol=1e-14)


def test_make_gallery(example, tmp_path, capfd):
    script = example("make_gallery")
    script.main(["layernorm_distributions", "--output", str(tmp_path)])
    figure, table = sorted(tmp_path.iterdir())
    assert (figure.name, table.name) == (
        "layernorm_distributions.png",
        "layernorm_distributions.txt",
    )
    check_figure(figure)
    assert figure.stat().st_size < 60_000
    # What the example prints is seen and kept, but for where its figure was.
    printed = capfd.readouterr().out
    assert table.read_text() in printed
    assert "variance of a sample" in table.read_text()
    assert "Figure" in printed and "Figure" not in table.read_text()


def test_make_gallery_refuses_what_is_no_example(example, capsys):
    with pytest.raises(SystemExit):
        example("make_gallery").main(["nonsense"])
    assert "no such example: nonsense" in capsys.readouterr().err


def test_the_gallery_is_there_and_small(example):
    script = example("make_gallery")
    for name in script.EXAMPLES:
        assert (EXAMPLES / f"{name}.py").is_file()
        figure = EXAMPLES / "gallery" / f"{name}.png"
        check_figure(figure)
        assert figure.stat().st_size < 60_000
        assert figure.with_suffix(".txt").read_text(encoding="utf-8")


def test_a_method_has_the_colour_of_its_statistics(example):
    figures = example("figures")
    statistics = {"batch": "bn", "layer": "ln", "instance": "in", "group": "gn"}
    for norm, statistic in statistics.items():
        assert figures.COLOURS[norm] == numbanorm.plot.COLOURS[statistic]
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)
    # The example with a palette of its own has the same.
    theirs = example("train_digits").COLOURS
    assert {n: c.lower() for n, c in theirs.items()} == {
        n: c.lower() for n, c in figures.COLOURS.items()
    }
