"""The example with a residual network in PyTorch: what it trains, prints and draws."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from cases import assert_close

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")


@pytest.fixture(scope="module")
def example():
    for name in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples")
        yield importlib.import_module("torch_cnn")


@pytest.fixture
def one_thread():
    # On a busy machine threads wait for each other for longer than they work.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training(example, tmp_path, capsys, one_thread):
    path = tmp_path / "figure.png"
    small = ["--epochs", "2", "--batch-size", "256", "--width", "4", "--size", "8"]
    trainers = example.main([*small, "--output", str(path)])
    assert path.stat().st_size > 10_000
    before, after = (np.array(trainers[name].losses) for name in example.COLOURS)
    assert len(before) == 12
    np.testing.assert_allclose(after, before, rtol=1e-3)
    assert after[-1] < after[0]
    kinds = {name: {type(m) for m in t.model.modules()} for name, t in trainers.items()}
    assert ours.BatchNorm2d in kinds["numbanorm.torch"] - kinds["torch.nn"]
    assert not any(issubclass(kind, torch.nn.BatchNorm2d) for kind in kinds["without"])
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()[2:4]]
    assert [row[0] for row in rows] == list(example.COLOURS)
    assert all(len(row) == 6 and row[-1].endswith("%") for row in rows)


def test_benchmark(example, capsys, monkeypatch, one_thread):
    small = example.plain_network((4, 8))
    monkeypatch.setattr(example, "plain_network", lambda: small)
    results = example.main(["--benchmark", "--steps", "5", "--threads", "1"])
    assert results["losses, BatchNorm"] < 1e-4
    assert results["losses, SwitchableNorm"] < 1e-4
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith(("BatchNorm,", "SwitchableNorm,"))]
    assert len(rows) == 7 and len(results) == 6


@pytest.mark.parametrize("name", ["PlainSwitchableNorm2d", "AuthorsSwitchableNorm2d"])
def test_plain_switchable_norm(example, name):
    plain, module = getattr(example, name)(4).double(), ours.SwitchableNorm2d(4).double()
    x = torch.rand(3, 4, 5, 6).double()
    assert_close(plain(x).detach(), module(x).detach(), scale=10)


def test_residual_network(example):
    # Halved twice, and the skip connection follows.
    y = example.residual_network(4)[:6](torch.rand(2, 1, 16, 16))
    assert y.shape == (2, 16, 4, 4)


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--threads", "x"]])
def test_wrong_arguments(example, wrong, capsys):
    with pytest.raises(SystemExit):
        example.main(wrong)
    assert wrong[0] in capsys.readouterr().err
