"""SwitchableNorm as a Module: against the layer for arrays, its definition, and BatchNorm."""

import copy
import pickle

import numpy as np
import pytest
from cases import assert_close, normal

import numbanorm

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")

OVER = [("in", "ln", "bn"), ("bn", "ln"), ("gn", "bn", "in", "ln"), ("in",), ("bn",), ("gn", "ln")]
SHAPES = {"1d": (5, 4), "1d-length": (3, 4, 7), "2d": (3, 4, 5, 6), "3d": (2, 4, 3, 2, 5)}


def tensor(*shape, seed=0, dtype=torch.float64):
    return torch.tensor(normal(*shape, seed=seed)).to(dtype)


def pair(rank, dtype=torch.float64, **options):
    """Make a Module and the layer for arrays in the same random state."""
    name = f"SwitchableNorm{rank - 2 if rank > 2 else 1}d"
    module = getattr(ours, name)(4, dtype=dtype, **options)
    layer = getattr(numbanorm, name)(4, dtype=str(dtype).removeprefix("torch."), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if key == "running_var":
                value.uniform_(0.5, 2, generator=generator)
            elif key != "num_batches_tracked":
                value.normal_(generator=generator)
    layer.load_state_dict(module.state_dict())
    return module, layer


def compare(module, layer, x, dy):
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(dy)
    assert_close(y.detach(), layer(x.detach().numpy()), scale=10, what="y")
    assert_close(x.grad, layer.backward(dy.numpy()), scale=10, what="dx")
    for name, gradient in layer.gradients().items():
        assert_close(getattr(module, name).grad, gradient, scale=100, what=name)
    for name, value in module.state_dict().items():
        assert_close(value.to(x.dtype), layer.state_dict()[name].astype(float), scale=1, what=name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("over", OVER, ids="-".join)
@pytest.mark.parametrize("sample_variance", [False, True], ids=["", "sample"])
def test_arrays(over, shape, sample_variance):
    groups = {"num_groups": 2} if "gn" in over else {}
    module, layer = pair(len(shape), over=over, sample_variance=sample_variance, **groups)
    for step, training in enumerate([True, True, False]):
        module.train(training).zero_grad()
        layer.train(training).zero_grad()
        compare(module, layer, tensor(*shape, seed=step), tensor(*shape, seed=step + 9))


OPTIONS = {
    "momentum": {"momentum": 0.5, "eps": 0.1},
    "cumulative": {"momentum": None},
    "plain": {"affine": False},
    "untracked": {"track_running_stats": False},
    "scale only": {"bias": False},
    "zero_init": {"zero_init": True},
    "channels last": {"axis": -1},
    "axis 2": {"axis": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_options(options, dtype):
    module, layer = pair(4, dtype, **options)
    shape = (3, 4, 4, 4)
    for step, training in enumerate([True, True, False]):
        module.train(training).zero_grad()
        layer.train(training).zero_grad()
        x = tensor(*shape, seed=step, dtype=dtype)
        if step:
            x = x.contiguous(memory_format=torch.channels_last)
        compare(module, layer, x, tensor(*shape, seed=step + 9, dtype=dtype))


@pytest.mark.parametrize("over", OVER, ids="-".join)
@pytest.mark.parametrize("sample_variance", [False, True], ids=["", "sample"])
def test_the_definition(over, sample_variance):
    # What other devices and types use, second derivatives, and what has forward-mode ones.
    groups = {"num_groups": 2} if "gn" in over else {}
    module, layer = pair(4, over=over, sample_variance=sample_variance, **groups)
    for step, training in enumerate([True, True, False]):
        module.train(training).zero_grad()
        layer.train(training).zero_grad()
        with torch.autograd.forward_ad.dual_level():
            compare(module, layer, tensor(3, 4, 5, 6, seed=step), tensor(3, 4, 5, 6, seed=step + 9))


def test_16_bit_and_other_devices():
    x = torch.rand(3, 4, 5, 6)
    module = ours.SwitchableNorm2d(4)
    half = copy.deepcopy(module).bfloat16()
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.02, atol=0.02)
    torch.testing.assert_close(half.running_var.float(), module.running_var, rtol=0.02, atol=0.02)
    meta = ours.SwitchableNorm2d(4, device="meta")
    assert meta(x.to("meta")).shape == x.shape


def test_importance():
    module = ours.SwitchableNorm2d(4, over=("gn", "bn"), num_groups=2)
    with torch.no_grad():
        module.mean_weight.copy_(torch.tensor([0.0, np.log(3)]))
    importance = module.importance()
    assert importance["mean"] == pytest.approx({"gn": 0.25, "bn": 0.75})
    assert importance["var"] == {"gn": 0.5, "bn": 0.5}


def test_plot_importance(tmp_path):
    pytest.importorskip("matplotlib")
    model = torch.nn.Sequential(ours.SwitchableNorm2d(4), ours.SwitchableNorm1d(4))
    numbanorm.plot_importance(dict(model.named_modules(prefix="")) | {"": model[0]},
                              tmp_path / "importance.png")  # fmt: skip
    assert (tmp_path / "importance.png").stat().st_size > 1000


def test_one_value_per_channel_stays_finite():
    module = ours.SwitchableNorm1d(4)
    y = module(torch.rand(1, 4, requires_grad=True))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert y.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in module.buffers())


def test_empty_batch():
    module = ours.SwitchableNorm2d(4)
    assert module(torch.rand(0, 4, 5, 6)).shape == (0, 4, 5, 6)
    assert torch.equal(module.running_mean, torch.zeros(4))


@pytest.mark.parametrize(
    ("cls", "shape", "logits"),
    [("SwitchableNorm1d", (6, 4), 2), ("SwitchableNorm2d", (3, 4, 5, 6), 3),
     ("SwitchableNorm2d", (3, 4, 5, 6), 2)],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_from_official(cls, shape, logits, training):
    column = (1, 4, *[1] * (len(shape) - 2)) if len(shape) > 2 else (1, 4)
    running = (1, 4, 1) if len(shape) > 2 else (1, 4)
    state = {
        "weight": tensor(*column, seed=1).float(),
        "bias": tensor(*column, seed=2).float(),
        "mean_weight": tensor(logits, seed=3).float(),
        "var_weight": tensor(logits, seed=4).float(),
    }
    if logits == 3 or cls.endswith("1d"):
        state |= {"running_mean": tensor(*running, seed=5).float(),
                  "running_var": tensor(*running, seed=6).float().exp()}  # fmt: skip
    module = getattr(ours, cls).from_official(state).train(training)
    layer = getattr(numbanorm, cls).from_official(state).train(training)
    assert isinstance(module, getattr(ours, cls))
    compare(module, layer, tensor(*shape).float(), tensor(*shape, seed=1).float())


ERRORS = {
    "rank": (lambda: ours.SwitchableNorm2d(4)(torch.rand(3, 4, 5)), ValueError, "4 axes"),
    "channels": (
        lambda: ours.SwitchableNorm2d(4)(torch.rand(3, 5, 4, 4)),
        ValueError,
        "4 channels",
    ),
    "over": (lambda: ours.SwitchableNorm2d(4, over=("xn",)), ValueError, "over"),
    "groups": (lambda: ours.SwitchableNorm2d(4, over=("gn",), num_groups=3), ValueError, "divisor"),
    "no groups": (lambda: ours.SwitchableNorm2d(4, over=("gn",)), ValueError, "num_groups"),
    "eps": (lambda: ours.SwitchableNorm2d(4, eps=-1.0), ValueError, "eps"),
    "momentum": (lambda: ours.SwitchableNorm2d(4, momentum=2.0), ValueError, "momentum"),
    "features": (lambda: ours.SwitchableNorm2d(0), ValueError, "num_features"),
    "axis": (lambda: ours.SwitchableNorm2d(4, axis=0), ValueError, "axis"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_copies_and_repr():
    module = ours.SwitchableNorm2d(4, over=("gn", "bn"), num_groups=2)
    module(torch.rand(3, 4, 5, 6))
    x = torch.rand(3, 4, 5, 6)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again.eval()(x), module.eval()(x))
    assert repr(module) == (
        "numbanorm.SwitchableNorm2d(4, eps=1e-05, momentum=0.1, affine=True, "
        "track_running_stats=True, over=('gn', 'bn'), num_groups=2)"
    )
    with torch.no_grad():
        module.weight.fill_(3)
    module.reset_parameters()
    assert torch.equal(module.weight, torch.ones(4))
    assert int(module.num_batches_tracked) == 0


# -- convert_switchable --------------------------------------------------------------------------


@pytest.mark.parametrize("library", [torch.nn, ours], ids=["torch.nn", "numbanorm.torch"])
def test_convert_switchable(library, capfd):
    shared = library.BatchNorm1d(3)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), library.BatchNorm2d(4), library.GroupNorm(2, 4),
        torch.nn.Flatten(), torch.nn.Linear(16, 3), shared, torch.nn.Sequential(shared),
        library.BatchNorm3d(4, affine=False), library.BatchNorm3d(4, track_running_stats=False),
    )  # fmt: skip
    model[:7](torch.rand(5, 3, 4, 4))
    kept = {name: id(value) for name, value in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    model[1].eval()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append("hook"))
    assert ours.convert_switchable(model) is model
    assert capfd.readouterr() == ("", "")

    assert [type(m).__name__ for m in model] == [
        "Conv2d", "SwitchableNorm2d", "GroupNorm", "Flatten", "Linear", "SwitchableNorm1d",
        "Sequential", "SwitchableNorm3d", "SwitchableNorm3d",
    ]  # fmt: skip
    assert model[6][0] is model[5]
    assert [model[1].training, model[5].training] == [False, True]
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value)
    parameters = dict(model.named_parameters())
    assert {name: id(parameters[name]) for name in kept} == kept
    assert set(parameters) - set(kept) == {
        f"{k}.{name}" for k in (1, 5, 7, 8) for name in ("mean_weight", "var_weight")
    }
    for converted, fresh in (
        (model[1], ours.SwitchableNorm2d(4)),
        (model[5], ours.SwitchableNorm1d(3)),
        (model[7], ours.SwitchableNorm3d(4, affine=False)),
        (model[8], ours.SwitchableNorm3d(4, track_running_stats=False)),
    ):
        assert repr(converted) == repr(fresh)
        fresh.load_state_dict(converted.state_dict(), strict=True)
        x = torch.rand(3, converted.num_features, 4, 4, 4)[(..., *[0] * (5 - min(fresh._ranks)))]
        assert torch.equal(converted.eval()(x), fresh.eval()(x))
    assert calls == ["hook"]
    pickle.loads(pickle.dumps(model[5]))


def test_convert_switchable_over():
    layer = torch.nn.BatchNorm2d(4).double()
    assert ours.convert_switchable(layer, over=("gn", "in"), num_groups=2) is layer
    assert list(layer.state_dict()) == ["weight", "bias", "mean_weight", "var_weight"]
    assert layer.mean_weight.dtype == torch.float64
    layer(torch.rand(3, 4, 5, 6).double())
    only = ours.convert_switchable(torch.nn.BatchNorm2d(4).eval(), over=iter(["bn"]))
    x = torch.rand(3, 4, 5, 6)
    assert_close(only(x).detach(), torch.nn.BatchNorm2d(4).eval()(x).detach(), scale=1)


def test_convert_switchable_changes_nothing_where_it_fails():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="divisor"):
        ours.convert_switchable(model, over=("gn",), num_groups=2)
    assert [type(layer) for layer in model] == [torch.nn.BatchNorm2d] * 2
    lazy = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="run the model once"):
        ours.convert_switchable(lazy)
    assert type(lazy[0]) is torch.nn.BatchNorm2d
