"""The numbers in the README and the pages: those that scripts have printed, kept beside them.

`examples/make_gallery.py` and `asv_benchmarks/compare.py --json` write what is read here.
"""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "examples" / "gallery"
COMPARED = ROOT / "asv_benchmarks" / "compare-amd-epyc-zen4.json"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")
CELL = re.compile(rf"{NUMBER.pattern}(?: \+- {NUMBER.pattern})?")
# Points of accuracy: two images of 450, which rounding may put on the other side.
AS_GOOD = 0.5
README, WHICH = "README.md", "docs/which_norm.md"
BOTH = README, WHICH


def words(text):
    """Return a text with single spaces in place of line breaks."""
    return " ".join(text.split())


@cache
def page(name):
    return words((ROOT / name).read_text(encoding="utf-8"))


@cache
def printed(name):
    """Return what an example has printed."""
    return (GALLERY / f"{name}.txt").read_text(encoding="utf-8")


def row(name, label, part=0):
    """Return the cells of the line with a label, in one of the tables, as pages write them."""
    text = printed(name).split("\n\n")[part]
    (rest,) = re.findall(rf"^{re.escape(label)} {{2,}}(\S.*)$", text, re.M)
    return [cell.replace("+-", "±").replace("e-0", "e-") for cell in CELL.findall(rest)]


def column(name, header, label, part=0):
    """Return the cells of a line by the numbers in the header of its table."""
    names = [float(cell) for cell in row(name, header, part)]
    return dict(zip(names, row(name, label, part), strict=False))


def value(cell):
    return float(cell.partition(" ")[0])


def values(cells):
    return {key: value(cell) for key, cell in cells.items()}


def sentences():
    """Yield pages, and what stands there, with its numbers as they are kept."""
    # Batches
    norms = ("none", "batch", "layer", "instance", "group", "switchable")
    found = {norm: column("batch_size", "batch size", norm) for norm in norms}
    batch, layer, group = (found[norm] for norm in ("batch", "layer", "group"))
    yield BOTH, f"At batches of 16 it reached {batch[16]} % test accuracy, `LayerNorm` {layer[16]}."
    yield BOTH, f"They reached {layer[2]} and {group[2]} %, `BatchNorm` {batch[2]}."
    means = {norm: values(cells) for norm, cells in found.items()}
    best = {size: max(norms, key=lambda n, s=size: means[n][s]) for size in batch}
    assert {best[size] for size in best if size >= 8} == {"batch"}
    assert "switchable" not in best.values()
    behind = max(means[best[size]][size] - means["switchable"][size] for size in best)
    share = column("batch_size", "batch size", "bn in mean")
    text = (
        f"In `batch_size.py` it was never the best, and at most {behind:.1f} points behind it. Its "
        f"share of batch statistics in the mean grew from {share[2]} at batches of 2 to "
        f"{share[16]} at 16."
    )
    yield WHICH, text
    worst = [min(norms, key=lambda n, s=size: means[n][s]) for size in sorted(batch)]
    assert worst == ["instance"] * 5 + ["none"] * 2
    yield WHICH, "On the digits it was the worst up to batches of 32."

    # Learning rates and initial weights
    kinds = ("ReLU, BatchNorm", "ReLU", "sigmoid, BatchNorm", "sigmoid")
    rates = {kind: values(column("learning_rate", "learning rate", kind)) for kind in kinds}
    scales = {k: values(column("learning_rate", "initial weights x", k, 1)) for k in kinds}
    bore = [max(r for r, a in rates[kind].items() if a > 90) for kind in kinds[:2]]
    yield BOTH, "With ReLU it bore a learning rate of {:g}, without it {:g}.".format(*bore)
    norm, none = (max(rates[kind].values()) for kind in kinds[2:])
    text = (
        f"Sigmoid networks reached {norm:.0f} %, without it {none:.0f} % "
        f"({scales['sigmoid'][10]:.0f} % from ten times the initial weights)."
    )
    yield WHICH, text

    # SwitchableNorm
    wins, ties, losses = (
        sum(map(int, row("switchable", verdict, 1))) for verdict in ("wins", "ties", "loses")
    )
    total = wins + ties + losses
    won = f"{wins}, tied in {ties} and lost {losses}."
    yield README, f"Of {total} comparisons with single norms in three tasks it won {won}"
    yield WHICH, f"Of {total} comparisons in three tasks it won {won}"
    won = f"wins {wins}, ties in {ties} and loses {losses}."
    yield "examples/switchable.py", f"Of {total} comparisons SwitchableNorm {won}"
    text = (
        f"it won {wins} comparisons of {total}, tied in {ties} (the 95 % interval of the "
        f"difference over five seeds has 0 in it) and lost {losses}."
    )
    yield WHICH, text
    of = ("batch", "layer", "instance", "group", "switchable")
    score = {
        (task, size): dict(zip(of, map(value, row("switchable", f"{task}, {size}")), strict=True))
        for task in ("digits", "words", "pixels")
        for size in (2, 8, 64)
    }
    digits, spelled, pixels = score["digits", 64], score["words", 64], score["pixels", 8]
    text = (
        f"It lost to BatchNorm at batches of 64 (digits {digits['switchable']} and "
        f"{digits['batch']} %, words {spelled['switchable']} and {spelled['batch']}) and to "
        f"InstanceNorm where pixels of photographs were to be told apart ({pixels['switchable']} "
        f"and {pixels['instance']} % at batches of 8)"
    )
    yield WHICH, text

    # Padding
    lines = ("sorted by length", "in random order", "all padded to the longest")
    errors = [row("masked_sequences", line, 1) for line in lines]
    without, with_mask = (max((e[i] for e in errors), key=float) for i in (3, 6))
    text = (
        f"Without a mask BatchNorm's outputs were wrong by up to {without}, with it by {with_mask}."
    )
    yield BOTH, text

    text = f"wrong by up to {without}, with a mask by {with_mask}."
    yield "docs/masks.md", text

    # Style
    styles = ("less contrast", "darker", "evening", "blue", "gamma of 2")
    shares = {s: list(map(value, row("style", s))) for s in styles}
    assert {share[3] for share in shares.values()} == {100}
    assert {shares[s][2] for s in ("less contrast", "darker", "gamma of 2")} == {100}
    most = max(max(share[:2]) for share in shares.values())
    text = (
        "with InstanceNorm all of them, with LayerNorm all where only the contrast was changed, "
        f"without a norm or with BatchNorm in evaluation at most {most} %."
    )
    yield WHICH, text

    # Depth
    torch, he = (
        {n: column("depth", "layers", f"{g}, {n}") for n in ("none", "batch", "layer")}
        for g in ("PyTorch's", "He's")
    )
    text = (
        f"networks of ten layers reached {torch['batch'][10]} % with BatchNorm, "
        f"{torch['layer'][10]} with LayerNorm, and without a norm {torch['none'][10]}, which is "
        f"chance. From He's weights they trained without a norm as well: {he['none'][10]}, with "
        f"BatchNorm {he['batch'][10]}."
    )
    yield WHICH, text
    assert all(value(c[20]) < value(c[10]) for g in (torch, he) for c in g.values())
    yield WHICH, "Twenty layers were worse than ten with every norm."

    # Before or after
    ahead = {}
    for kind in "batch", "layer":
        for activation in "ReLU", "sigmoid":
            cell = row("before_after", f"{kind}, {activation}")[-1]
            ahead[kind, activation] = cell.removeprefix("-")
            difference, half = map(float, cell.split(" ± "))
            assert (difference < -half) if activation == "sigmoid" else abs(difference) <= half
    text = (
        f"With sigmoid, after was better: by {ahead['batch', 'sigmoid']} points with BatchNorm, "
        f"by {ahead['layer', 'sigmoid']} with LayerNorm."
    )
    yield WHICH, text

    # A single sample
    batches = "accuracy, in batches of"
    training, evaluation = (
        column("single_sample", batches, f"batch, {mode}") for mode in ("training", "evaluation")
    )
    low, high = map(float, row("single_sample", "batch, training")[-2:])
    text = (
        f"was right about {value(training[1]):.0f} % of single images, in evaluation about "
        f"{value(evaluation[1]):.0f} %; in training mode, what else was in a batch of eight moved "
        f"one image's probability of its class between {low:.2f} and {high:.3f}."
    )
    yield WHICH, text
    assert row("single_sample", "layer, training") == row("single_sample", "layer, evaluation")

    # Recurrent networks
    bits = {norm: column("rnn", "bits per letter", norm) for norm in ("none", "batch", "layer")}
    least = {norm: min(cells.values(), key=value) for norm, cells in bits.items()}
    length = re.search(r"words of (\d+) to (\d+) letters", printed("rnn"))
    text = (
        f"Of the next letter of words of {length[1]} to {length[2]} letters, LayerNorm left "
        f"{least['layer']} bits to know, no norm {least['none']}, BatchNorm {least['batch']} "
        "(95 % intervals)."
    )
    yield WHICH, text
    largest = max(bits["layer"])
    at = {norm: value(cells[largest]) for norm, cells in bits.items()}
    assert min(at, key=at.get) == "layer"
    text = (
        f"At a learning rate of {largest:g} LayerNorm was the best: {at['layer']}, without a "
        f"norm {at['none']}."
    )
    yield WHICH, text

    # Regularisation
    cells = {}
    for setting in "100 as they are", "100 shifted", "300 as they are", "300 shifted":
        for norm in "none", "batch", "layer":
            _, test, difference = row("regularisation", f"{setting}, {norm}")
            cells[setting, norm] = f"{value(test)}", difference
            if norm == "layer":
                difference, half = map(float, difference.split(" ± "))
                assert difference <= half
    few, few_shifted, more, more_shifted = (
        cells[setting, "batch"]
        for setting in ("100 as they are", "100 shifted", "300 as they are", "300 shifted")
    )
    text = (
        f"were right about {more[0]} % of others with BatchNorm and "
        f"{cells['300 as they are', 'none'][0]} % without a norm, {more[1]} points more; with "
        f"digits that were shifted as they were learned, {more_shifted[1]} points. With 100 digits "
        f"it was {few[1]} and, shifted, {few_shifted[1]} points."
    )
    yield WHICH, text


@pytest.fixture(scope="module")
def quoted():
    found = {}
    for pages, sentence in sentences():
        for name in [pages] if isinstance(pages, str) else pages:
            found.setdefault(name, []).append(sentence)
    return found


@pytest.mark.parametrize("name", [*BOTH, "docs/masks.md", "examples/switchable.py"])
def test_a_page_says_what_is_kept(quoted, name):
    for sentence in quoted[name]:
        assert sentence in page(name)


@pytest.mark.parametrize(("name", "start", "end"), [
    (README, "## Which norm?", "## Limits"), (WHICH, "# Which norm?", "## What each one does"),
    ("docs/gallery.md", "# Gallery", "## Without a figure"),
])  # fmt: skip
def test_no_other_number_is_there(quoted, name, start, end):
    text = page(name)
    text = text[text.index(start) : text.index(end)]
    for sentence in quoted.get(name, ()):
        text = text.replace(sentence, "")
    # What is no result.
    text = text.replace("95 % interval", "")
    assert re.findall(r"[\d.]*\.\d+|\d+ %|± \d+|\d+ points", text) == []


@pytest.fixture(scope="module")
def example():
    """Import an example as it imports its neighbours: by its name, from its folder."""
    for needed in "matplotlib", "sklearn", "tqdm":
        pytest.importorskip(needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module


@pytest.fixture
def run(example, tmp_path, capsys):
    """Run an example; return what it prints, without the line about its figure."""

    def run(name, arguments=""):
        example(name).main([*arguments.split(), "--output", str(tmp_path / "figure.png")])
        return capsys.readouterr().out.partition("Figure: ")[0]

    return run


# Rounding differs between kinds of CPU: errors are as small there, and of 600 squares one or two
# may have another neighbour.
@pytest.mark.parametrize(("name", "atol"), [
    ("layernorm_distributions", 0.011), ("custom_axes", 0.011), ("masked_sequences", 2e-6),
    ("style", 0.5),
])  # fmt: skip
def test_what_does_not_train_prints_what_is_kept(run, name, atol):
    found, kept = run(name), printed(name)
    assert words(NUMBER.sub("#", found)) == words(NUMBER.sub("#", kept))
    numbers = (np.array(NUMBER.findall(text), float) for text in (found, kept))
    np.testing.assert_allclose(*numbers, atol=atol)


def test_a_column_of_batch_size_is_what_is_kept(run):
    found = run("batch_size", "--sizes 128 --processes 1").splitlines()[1:]
    kept = printed("batch_size").splitlines()[1:]
    for line, whole in zip(found, kept, strict=True):
        assert line[:18].strip() == whole[:18].strip()
        cells = [CELL.findall(text)[-1].partition(" +- ") for text in (line, whole)]
        (mean, plus, _), (expected, kept_plus, _) = cells
        assert plus == kept_plus
        assert float(mean) == pytest.approx(float(expected), abs=AS_GOOD if plus else 0.011)


def test_cells_of_learning_rate_are_what_is_kept(run):
    found = run("learning_rate", "--rates 0.3 3 --scales 1").split("\n\n")[0].splitlines()[1:]
    for line in found:
        name = line[:20].strip()
        kept = column("learning_rate", "learning rate", name)
        cells = list(map(float, NUMBER.findall(line[20:])))[:2]
        assert cells == pytest.approx([value(kept[0.3]), value(kept[3])], abs=AS_GOOD), name


def cell_of_depth(script):
    images, test_images, *labels = script.digits(0)
    data = images.reshape(-1, 64), test_images.reshape(-1, 64), *labels
    gain = script.GAINS["PyTorch's"]
    found = [
        [script.train(data, 10, "none", gain, r, 4, s) for s in range(3)] for r in script.RATES
    ]
    return 100 * np.array(found).mean(axis=1).max(), column("depth", "layers", "PyTorch's, none")[
        10
    ]


def cell_of_before_after(script):
    data = script.digits(0)
    found = [
        [script.train(data, "batch", "sigmoid", "after", rate, 3, seed) for seed in range(5)]
        for rate in script.RATES
    ]
    return 100 * np.array(found).mean(axis=1).max(), row("before_after", "batch, sigmoid")[1]


def cell_of_regularisation(script):
    settings = [(100, "as they are", "batch", seed) for seed in range(5)]
    (found,) = script.train_all(script.train, settings, 1, epochs=20)
    return 100 * found[:, 1].mean(), row("regularisation", "100 as they are, batch")[1]


def cell_of_switchable(script):
    settings = [("digits", 64, "switchable", seed) for seed in range(5)]
    scores, _ = script.train_all(script.train, settings, 1, steps=60)
    return 100 * scores.mean(), row("switchable", "digits, 64")[-1]


def cell_of_rnn(script):
    found = np.random.default_rng(0).permutation(script.words())
    if not printed("rnn").startswith(f"{len(found)} words"):
        pytest.skip("the words are those of Python's reference, which differ between its versions")
    data = script.train_test_split(*script.encode(found), test_size=0.25, random_state=0)
    bits = [script.train(data, "none", 0.3, 3, seed)[0] for seed in range(5)]
    return np.mean(bits), column("rnn", "bits per letter", "none")[0.3]


@pytest.mark.parametrize("name", ["depth", "before_after", "regularisation", "switchable", "rnn"])
def test_a_cell_is_what_is_kept(example, name):
    found, kept = globals()[f"cell_of_{name}"](example(name))
    # With kernels of OpenBLAS that round otherwise, each of them printed the same.
    assert found == pytest.approx(value(kept), abs=0.005 if name == "rnn" else AS_GOOD)


def test_speeds_are_those_that_were_kept():
    spec = importlib.util.spec_from_file_location("report", COMPARED.parent / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    kept = json.loads(COMPARED.read_text(encoding="utf-8"))
    lines = report.markdown(kept["rows"]).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    (_, *cells), slower = cells, [line for line in lines if line.startswith("- ")]
    assert len(cells) == 7 and len(slower) == 2
    for name, n in ((README, 4), ("docs/performance.md", 7)):
        for label, cell in cells[:n]:
            assert re.search(rf"\| {re.escape(label)} \| [^|]+ \| {re.escape(cell)} \|", page(name))
    assert all(words(line) in page("docs/performance.md") for line in slower)
    assert kept["date"] in page("docs/performance.md")
