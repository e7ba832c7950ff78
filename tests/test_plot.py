"""The figure of what a model's SwitchableNorm layers have learned."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import numbanorm as nn

matplotlib = pytest.importorskip("matplotlib")
Figure = pytest.importorskip("matplotlib.figure").Figure


def learned(make=nn.SwitchableNorm2d, seed=0, **options):
    """Make a layer whose logits have moved."""
    layer = make(8, **options)
    rng = np.random.default_rng(seed)
    for logits in (layer.mean_weight, layer.var_weight):
        logits[...] = rng.normal(size=logits.shape)
    return layer


MODELS = {
    "a list": [learned(seed=s) for s in range(3)],
    "a dict": {"stem": learned(), "layer1.0.bn1": learned(seed=1), "head": learned(seed=2)},
    "one layer": [learned()],
    "different statistics": {
        "all": learned(over=("gn", "bn", "ln", "in"), num_groups=2),
        "1d": learned(nn.SwitchableNorm1d, seed=1),
        "in": learned(over=["in"], seed=2),
        "default": learned(seed=3),
        "any rank": learned(nn.SwitchableNorm, over=("bn", "gn"), num_groups=4, seed=4),
    },
    "many": {f"backbone.layer{i // 5}.{i % 5}.norm": learned(seed=i) for i in range(40)},
}
models = pytest.mark.parametrize("layers", MODELS.values(), ids=MODELS.keys())


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are saved."""
    saved, savefig = [], Figure.savefig

    def collect(figure, *args, **options):
        saved.append(figure)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", collect)
    return saved


@models
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files(layers, suffix, tmp_path):
    path = tmp_path / f"importance.{suffix}"
    assert nn.plot_importance(layers, path) is None
    content = path.read_bytes()
    if suffix == "svg":
        assert ElementTree.fromstring(content).tag.endswith("svg")
    elif suffix == "pdf":
        assert content.startswith(b"%PDF-")
        assert content.rstrip().endswith(b"%%EOF")
    else:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 500
        assert np.ptp(image[..., :3]) > 0.5  # there is something on it


def test_paths_and_iterables(tmp_path):
    nn.plot_importance((layer for layer in MODELS["a list"]), str(tmp_path / "a.png"))
    nn.plot_importance(tuple(MODELS["a list"]), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@models
def test_bars_are_the_importances(layers, figures, tmp_path):
    nn.plot_importance(layers, tmp_path / "importance.png")
    panels = figures[0].axes
    values = list(layers.values() if isinstance(layers, dict) else layers)
    used = [k for k in ("in", "ln", "bn", "gn") if any(k in layer.over for layer in values)]
    assert len(panels) == 2
    for panel, kind in zip(panels, ("mean", "var"), strict=True):
        assert kind in panel.get_ylabel()
        bars = {c.get_label().lower(): list(c) for c in panel.containers}
        assert list(bars) == used
        for i, layer in enumerate(values):
            importance = layer.importance()[kind]
            top = 0.0
            for name in used:
                bar = bars[name][i]
                assert bar.get_height() == pytest.approx(importance.get(name, 0.0))
                assert bar.get_y() == pytest.approx(top)  # one on top of the other
                assert bar.get_x() + bar.get_width() / 2 == pytest.approx(i)
                top += bar.get_height()
            assert top == pytest.approx(1)
        assert panel.get_ylim() == (0, 1)
        colours = [bars[name][0].get_facecolor() for name in used]
        assert len(set(colours)) == len(used)


@models
def test_names(layers, figures, tmp_path):
    nn.plot_importance(layers, tmp_path / "importance.png")
    expected = layers if isinstance(layers, dict) else range(1, len(layers) + 1)
    ticks = figures[0].axes[1].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == [str(name) for name in expected]
    (legend,) = figures[0].legends
    values = layers.values() if isinstance(layers, dict) else layers
    used = {name.upper() for layer in values for name in layer.over}
    assert {text.get_text() for text in legend.get_texts()} == used


@models
def test_nothing_is_cut_off_or_in_the_way(layers, figures, tmp_path):
    nn.plot_importance(layers, tmp_path / "importance.png")
    figure = figures[0]
    renderer = figure.canvas.get_renderer()
    width, height = figure.bbox.size
    panels = figure.axes
    texts = [panel.yaxis.label for panel in panels]
    texts += [panels[1].xaxis.label, *panels[1].get_xticklabels(), *figure.legends]
    for text in texts:
        box = text.get_window_extent(renderer)
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
    labels = [panel.yaxis.label.get_window_extent(renderer) for panel in panels]
    assert not labels[0].overlaps(labels[1])
    # The bars are what is looked at.
    assert sum(panel.get_window_extent(renderer).height for panel in panels) > height / 3
    upright = [t for t in panels[1].get_xticklabels() if t.get_rotation() == 0]
    boxes = [text.get_window_extent(renderer) for text in upright]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_long_names_leave_room_for_the_bars(figures, tmp_path):
    names = [f"features.denseblock4.denselayer{i}.norm2" for i in range(3)]
    layers = {name: learned(seed=i) for i, name in enumerate(names)}
    test_nothing_is_cut_off_or_in_the_way(layers, figures, tmp_path)


def test_layers_are_left_alone(tmp_path):
    layer = learned()
    layer(np.random.default_rng(0).normal(size=(2, 8, 3, 3)))
    before = layer.state_dict()
    nn.plot_importance([layer], tmp_path / "importance.png")
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    layer.backward(np.ones((2, 8, 3, 3)))


def test_no_figure_stays_open(tmp_path):
    """Nothing of pyplot is touched: no display is needed, no global state changed."""
    code = (
        "import sys, numbanorm as nn; nn.plot_importance([nn.SwitchableNorm2d(4)], sys.argv[1]); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    path = tmp_path / "importance.png"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, path],
        capture_output=True, text=True, check=False, cwd=Path(nn.__file__).parents[1],
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("False", "", 0)


# fmt: off
BAD = [
    ("no layers", [], ValueError, ["layers", "none"]),
    ("an empty dict", {}, ValueError, ["layers", "none"]),
    ("another kind of layer", [learned(), nn.BatchNorm2d(3)], TypeError, ["layers", "BatchNorm2d"]),
    ("another kind of layer with a name", {"stem": nn.LayerNorm(3)},
     TypeError, ["layers", "LayerNorm", "stem"]),
    ("what is no layer", ["bn1"], TypeError, ["layers", "str"]),
    ("one layer alone", learned(), TypeError, ["layers"]),
]
# fmt: on


@pytest.mark.parametrize(
    ("layers", "error", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_arguments(layers, error, words, tmp_path):
    with pytest.raises(error) as caught:
        nn.plot_importance(layers, tmp_path / "importance.png")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="nonsense"):
        nn.plot_importance([learned()], tmp_path / "importance.nonsense")


def test_without_matplotlib(monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'numbanorm\[plot\]'"):
        nn.plot_importance([learned()], tmp_path / "importance.png")
