"""The examples of masks and of folding: what they measure, print and draw."""

import importlib
from pathlib import Path

import numpy as np
import pytest

import numbanorm

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    """Import an example as it imports its neighbours: by its name, from its folder."""
    for name in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


@pytest.fixture(scope="module")
def masked_sequences(example):
    return example("masked_sequences")


@pytest.fixture(scope="module")
def fold_batchnorm(example):
    return example("fold_batchnorm")


def assert_is_png(path):
    import matplotlib.image

    assert min(matplotlib.image.imread(path).shape[:2]) > 300


# -- masked_sequences ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked(masked_sequences, tmp_path_factory):
    """Run it once, on batches of 40 sentences."""
    path = tmp_path_factory.mktemp("masked") / "figure.png"
    return masked_sequences.main(["--batch-size", "40", "--output", str(path)]), path


def test_sentences_differ_in_length(masked_sequences):
    found = masked_sequences.sentences()
    lengths = [sentence.shape[1] for sentence in found]
    assert len(found) > 100
    assert min(lengths) == 3
    assert max(lengths) > 5 * np.median(lengths)
    counts = np.concatenate(found, axis=1)
    assert counts.dtype == np.float32
    assert np.all(counts == counts.round())
    assert np.all((counts.min(1) == 0) & (counts.std(1) > 0))


def test_padding(masked_sequences):
    short, long = np.ones((10, 3), np.float32), np.ones((10, 5), np.float32)
    x, mask = masked_sequences.pad([short, long], 6)
    np.testing.assert_array_equal(mask[:, 0].sum(1), [3, 5])
    np.testing.assert_array_equal(x, np.broadcast_to(mask, x.shape))
    assert masked_sequences.real_words(x, mask).shape == (8, 10)


def test_a_mask_gives_the_truth_whatever_the_padding(masked):
    measured, _ = masked
    assert len(measured) == 3
    for shares, _, with_mask in measured.values():
        # How many batches there are is scikit-learn's to say, whose texts they are made of.
        assert len(shares) == len(with_mask) >= 3
        for found, words in with_mask:
            assert found.mean < 1e-14
            assert found.std < 1e-14
            assert found.output < 2e-6
            np.testing.assert_allclose(words.mean(0), 0, atol=1e-5)


def test_padding_dilutes_statistics_without_a_mask(masked):
    measured, _ = masked
    shares = np.concatenate([shares for shares, *_ in measured.values()])
    errors = np.array([found for _, without, _ in measured.values() for found, _ in without])
    assert np.ptp(shares) > 0.4
    assert np.all(errors[shares > 0.05] > 0.01)
    for column in errors.T:  # more padding, greater errors
        assert np.corrcoef(shares, column)[0, 1] > 0.8
    _, sorted_by_length, _ = measured["sorted by length"]
    _, all_padded, _ = measured["all padded to the longest"]
    assert sum(e.output for e, _ in all_padded) > 2 * sum(e.output for e, _ in sorted_by_length)


def test_the_errors_are_those_of_numpy(masked_sequences):
    """Zeros for padding: the mean shrinks by the share of real words."""
    batch = masked_sequences.sentences()[:8]
    words = np.concatenate(batch, axis=1).astype(np.float64)
    share, results = masked_sequences.errors(batch, 60, unit=1.0)
    assert share == 1 - words.shape[1] / (8 * 60)
    np.testing.assert_allclose(results[0][0].mean, share * words.mean(1).max(), rtol=1e-6)


def test_what_masked_sequences_prints_and_draws(masked_sequences, tmp_path, capsys):
    path = tmp_path / "figure.png"
    masked_sequences.main(["--batch-size", "1000", "--seed", "3", "--output", str(path)])
    out = capsys.readouterr().out
    for name in ("sorted by length", "in random order", "all padded to the longest"):
        assert name in out
    assert "the outputs of the real words are the same" in out
    assert str(path) in out
    assert_is_png(path)


def test_one_sentence_a_batch(masked_sequences, tmp_path):
    """Without padding there is nothing to mask."""
    measured = masked_sequences.main(["--batch-size", "1", "--output", str(tmp_path / "a.png")])
    shares, without, with_mask = measured["in random order"]
    assert np.all(shares == 0)
    for (a, words), (b, same) in zip(without, with_mask, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        np.testing.assert_allclose(words, same, atol=1e-6)


def test_seeds_of_masked_sequences(masked_sequences):
    found = masked_sequences.sentences()

    def shares(seed):
        measured = masked_sequences.measure(found, 40, np.random.default_rng(seed))
        return measured["in random order"][0]

    np.testing.assert_array_equal(shares(0), shares(0))
    assert np.any(shares(0) != shares(1))


# -- fold_batchnorm ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded(fold_batchnorm, tmp_path_factory):
    """Run it once: two epochs, few timed calls."""
    path = tmp_path_factory.mktemp("fold") / "figure.png"
    arguments = ["--epochs", "2", "--rounds", "3", "--output", str(path)]
    return *fold_batchnorm.main(arguments), path


def test_equal_outputs(folded):
    comparisons, before, after, path = folded
    assert before.shape == after.shape == (450, 10)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    np.testing.assert_array_equal(after.argmax(1), before.argmax(1))
    names = [one.name for one in comparisons]
    assert len(names) == 4
    assert [name.split()[0] for name in names] == ["Conv2d", "Conv2d", "Linear", "the"]
    for one in comparisons:
        assert 0 < one.difference < 1e-4
        assert one.before > 0
        assert one.after > 0
    assert_is_png(path)


def test_the_network_has_learned(fold_batchnorm, folded):
    _, before, _, _ = folded
    labels = fold_batchnorm.digits(0)[3]
    assert np.mean(before.argmax(1) == labels) > 0.9


def test_no_norm_is_left(fold_batchnorm):
    model = fold_batchnorm.network(np.random.default_rng(0))
    without = fold_batchnorm.without_norms(model)
    kinds = [type(layer).__name__ for layer in without.layers]
    assert kinds == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Flatten", "Linear", "ReLU", "Linear"]
    assert sum(isinstance(layer, numbanorm.BatchNorm) for layer in model.layers) == 3


def test_running_statistics_are_of_all_images(fold_batchnorm, capsys):
    images, _, labels, _ = fold_batchnorm.digits(0)
    model = fold_batchnorm.network(np.random.default_rng(0))
    fold_batchnorm.train(model, images[:100], labels[:100], 1, np.random.default_rng(0))
    first = model.layers[1]
    seen = model.layers[0](images[:100])
    np.testing.assert_allclose(first.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first.running_var, seen.var((0, 2, 3), ddof=1), rtol=1e-3)


def test_median_times(fold_batchnorm, monkeypatch):
    """One call of each in turn; the median of the differences of the clock."""
    clock, calls = [0.0], []

    def taking(name, *seconds):
        durations = iter((0, *seconds))

        def function(x):
            calls.append(name)
            clock[0] += next(durations)
            return x

        return function

    monkeypatch.setattr(fold_batchnorm, "perf_counter", lambda: clock[0])
    pair = taking("a", 3.0, 1.0, 2.0), taking("b", 0.25, 5.0, 0.5)
    got = fold_batchnorm.compare("name", *pair, np.ones(3), 3)
    assert calls == ["a", "b"] * 4
    assert got == ("name", 0.0, 2000.0, 500.0)


def test_what_fold_batchnorm_prints(fold_batchnorm, folded, capsys):
    text = fold_batchnorm.table(folded[0])
    lines = text.splitlines()
    assert len(lines) == 6
    for line, one in zip(lines[2:], folded[0], strict=True):
        assert line.startswith(one.name)
        assert f"{one.before:.3f}" in line
        assert f"{1 - one.after / one.before:.0%}" in line


@pytest.mark.parametrize("name", ["masked_sequences", "fold_batchnorm"])
def test_bad_arguments(example, name, capsys):
    option = {"masked_sequences": "--batch-size", "fold_batchnorm": "--epochs"}[name]
    with pytest.raises(SystemExit):
        example(name).main([option, "0"])
    assert "at least 1" in capsys.readouterr().err
