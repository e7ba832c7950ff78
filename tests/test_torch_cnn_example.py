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


@pytest.mark.parametrize("autocast", [False, True])
def test_training(example, tmp_path, capsys, one_thread, autocast):
    path = tmp_path / "figure.png"
    small = ["--epochs", "2", "--batch-size", "256", "--width", "4", "--size", "8"]
    small += ["--autocast"] if autocast else []
    trainers = example.main([*small, "--output", str(path)])
    assert path.stat().st_size > 10_000
    before, after = (np.array(trainers[name].losses) for name in example.COLOURS)
    assert len(before) == 12
    np.testing.assert_allclose(after, before, rtol=3e-2 if autocast else 1e-3)
    assert after[-1] < after[0]
    kinds = {name: {type(m) for m in t.model.modules()} for name, t in trainers.items()}
    assert ours.BatchNorm2d in kinds["numbanorm.torch"] - kinds["torch.nn"]
    fused = trainers["numbanorm.torch"].model
    assert {m.activation for m in fused.modules() if hasattr(m, "activation")} == {"relu", None}
    assert trainers["torch.nn"].autocast._enabled == autocast
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[2:4]] == list(example.COLOURS)
    for epoch, line in enumerate(lines[6:8]):
        losses = [v[6 * epoch :][:6].mean() for v in (before, after)]
        np.testing.assert_allclose([float(v) for v in line], [epoch + 1, *losses], atol=5e-5)


def test_benchmark(example, capsys, monkeypatch, one_thread):
    network = example.plain_network
    monkeypatch.setattr(example, "plain_network", lambda **kind: network((4, 8), **kind))
    results = example.main(["--benchmark", "--steps", "5", "--threads", "1"])
    assert results["losses, BatchNorm"] < 1e-4
    assert results["losses, SwitchableNorm"] < 1e-4
    assert results["losses, norm, add, ReLU in float32"] < 1e-4
    assert results["losses, norm, add, ReLU in bfloat16"] < 3e-2
    printed = capsys.readouterr().out.splitlines()
    rows = [line for line in printed if line.startswith(("BatchNorm,", "Switchable", "norm, add"))]
    assert len(rows) == 13 and len(results) == 12


def test_convolutions_alone(example):
    model = example.convolutions_alone(example.plain_network((4, 8), residual=True))
    kinds = {type(m) for m in model.modules()}
    assert torch.nn.Conv2d in kinds
    assert not {torch.nn.BatchNorm2d, torch.nn.ReLU, example.Residual} & kinds
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 10)


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
