"""Activation, residual and floats of 16 bits in PyTorch's layers, beside PyTorch's own steps."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import numbanorm.torch as nt  # noqa: E402

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    ("leaky_relu", 0.2): nn.LeakyReLU(0.2),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    None: nn.Identity(),
}
LAYERS = {
    "BatchNorm2d": (lambda **k: nn.BatchNorm2d(6, **k), (4, 6, 5, 3)),
    "BatchNorm1d": (lambda **k: nn.BatchNorm1d(6, **k), (9, 6)),
    "InstanceNorm2d": (lambda **k: nn.InstanceNorm2d(6, affine=True, **k), (4, 6, 5, 3)),
    "GroupNorm": (lambda **k: nn.GroupNorm(2, 6, **k), (4, 6, 5, 3)),
    "LayerNorm": (lambda **k: nn.LayerNorm(7, **k), (5, 7)),
    "RMSNorm": (lambda **k: nn.RMSNorm(7, **k), (5, 7)),
}
HALVES = torch.bfloat16, torch.float16


def pair(name, dtype=torch.float64, activation=None):
    """Return PyTorch's layer, ours with the same parameters, and an x."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    theirs = make(dtype=dtype)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.5)
    ours = nt.convert(copy.deepcopy(theirs))
    ours.activation = activation
    return theirs, ours, torch.randn(shape, dtype=dtype)


def gradients(y, dy, *tensors):
    return torch.autograd.grad(y, tensors, dy)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_steps_of_pytorch(name, activation, has_residual):
    theirs, ours, x = pair(name, activation=activation)
    x.requires_grad_()
    r = torch.randn_like(x, requires_grad=True)
    inputs = [x, *([r] if has_residual else [])]
    expected = theirs(x)
    expected = ACTIVATIONS[activation](expected + r if has_residual else expected)
    y = ours(x, residual=r) if has_residual else ours(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(x)
    results = gradients(y, dy, *inputs, *ours.parameters())
    others = gradients(expected, dy, *inputs, *theirs.parameters())
    for result, other in zip(results, others, strict=True):
        torch.testing.assert_close(result, other)
    assert f"activation={activation!r}" in repr(ours) or activation is None
    for ours_, theirs_ in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours_, theirs_)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm"])
def test_second_derivatives_and_compile(name, activation):
    _, ours, x = pair(name, activation=activation)
    x = x[:2, ..., :2, :2].contiguous() if x.dim() == 4 else x[:2]
    r = torch.randn_like(x)
    parameters = list(ours.parameters())

    def call(x, r):
        return ours(x, residual=r)

    for t in (x, r):
        t.requires_grad_()
    assert torch.autograd.gradgradcheck(call, (x, r), atol=1e-4)
    dy = torch.randn_like(x)
    expected = gradients(call(x, r), dy, x, r, *parameters)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled(x, r), dy, x, r, *parameters), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["SwitchableNorm2d", "Norm", "LayerNorm2d", "SyncBatchNorm"])
def test_own_layers(name):
    make = {
        "SwitchableNorm2d": lambda **k: nt.SwitchableNorm2d(6, **k),
        "Norm": lambda **k: nt.Norm((0, 2), shape=(6, 3), feature_axes=(1, 3), **k),
        "LayerNorm2d": lambda **k: nt.LayerNorm2d(6, **k),
        "SyncBatchNorm": lambda **k: nt.SyncBatchNorm(6, **k),
    }[name]
    plain, fused = make(dtype=torch.float64), make(dtype=torch.float64, activation="silu")
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(x, requires_grad=True)
    dy = torch.randn_like(x)
    expected = nn.functional.silu(plain(x) + r)
    y = fused(x, residual=r)
    torch.testing.assert_close(y, expected)
    results = gradients(y, dy, x, r, *fused.parameters())
    others = gradients(expected, dy, x, r, *plain.parameters())
    for result, other in zip(results, others, strict=True):
        torch.testing.assert_close(result, other)
    assert "activation='silu'" in repr(fused)
    assert "activation" not in repr(plain)


def test_residual_of_another_type_or_shape():
    _, ours, x = pair("BatchNorm2d", torch.float32, "relu")
    theirs = copy.deepcopy(ours)
    r = torch.randn_like(x, dtype=torch.float64)
    y = ours(x, residual=r)
    theirs.activation = None
    torch.testing.assert_close(y, (theirs(x) + r).relu())
    assert y.dtype == torch.float64
    with pytest.raises(ValueError, match="residual: the shape of x"):
        ours(x, residual=x[:1])


def test_unbatched_instances_and_channels_last():
    theirs, ours, x = pair("InstanceNorm2d", activation="relu")
    r = torch.randn_like(x)
    torch.testing.assert_close(ours(x[0], residual=r[0]), (theirs(x[0]) + r[0]).relu())
    last, other = (t.contiguous(memory_format=torch.channels_last) for t in (x, r))
    y = ours(last, residual=other)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, (theirs(x) + r).relu())
    torch.testing.assert_close(ours(last, residual=r), y)


def test_wrong_activation():
    with pytest.raises(ValueError, match="activation: "):
        nt.BatchNorm2d(3, activation="swish")
    layer = nt.GroupNorm(1, 3, activation="relu")
    with pytest.raises(ValueError, match="activation: "):
        layer.activation = "swish"
    assert layer.activation == "relu"


# -- 16 bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("weights", ["same", "float32"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [*LAYERS, "SwitchableNorm2d"])
def test_halves(name, dtype, weights, mode):
    """The float32 layer's results for what is stored, rounded once."""
    if name == "SwitchableNorm2d":
        torch.manual_seed(0)
        ours, x = nt.SwitchableNorm2d(6), torch.randn(4, 6, 5, 3)
    else:
        _, ours, x = pair(name, torch.float32)
    if weights == "same":
        ours = ours.to(dtype)
    wide = copy.deepcopy(ours).float()
    x = x.to(dtype)
    ours.train(mode == "train")
    wide.train(mode == "train")
    xs = x.clone().requires_grad_(), x.float().requires_grad_()
    y, expected = ours(xs[0]), wide(xs[1])
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)
    dy = torch.randn_like(x)
    results = gradients(y, dy, xs[0], *ours.parameters())
    others = gradients(expected, dy.float(), xs[1], *wide.parameters())
    for result, other, own in zip(results, others, (x, *ours.parameters()), strict=True):
        assert result.dtype == own.dtype
        torch.testing.assert_close(result, other.to(own.dtype), rtol=0, atol=0)
    for result, other in zip(ours.buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(result, other.to(result.dtype), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", LAYERS)
def test_mixed_types_are_pytorchs_to_refuse(name):
    theirs, ours, x = pair(name, torch.float64)
    for dtype in HALVES:
        try:
            expected = theirs(x.to(dtype))
        except RuntimeError as error:
            with pytest.raises(RuntimeError) as found:
                ours(x.to(dtype))
            assert str(found.value) == str(error)
        else:
            torch.testing.assert_close(ours(x.to(dtype)), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_trains(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                          nn.Linear(64, 8), nn.LayerNorm(8))  # fmt: skip
    ours = nt.convert(copy.deepcopy(model))
    x, losses = torch.randn(16, 1, 6, 6), []
    for net in (model, ours):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for _ in range(5):
            with torch.autocast("cpu", dtype):
                loss = net(x).float().pow(2).mean() + net(x).float()[:, 0].mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert all(np.isfinite(losses))


def test_fused_halves():
    torch.manual_seed(0)
    layer = nt.BatchNorm2d(6, activation="gelu")
    wide = copy.deepcopy(layer)
    x, r, dy = (torch.randn(4, 6, 5, 3).bfloat16() for _ in range(3))
    xs = [t.clone().requires_grad_() for t in (x, r)]
    wides = [t.float().requires_grad_() for t in (x, r)]
    y, expected = layer(xs[0], residual=xs[1]), wide(wides[0], residual=wides[1])
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0, atol=0)
    results = gradients(y, dy, *xs)
    others = gradients(expected, dy.float(), *wides)
    for result, other in zip(results, others, strict=True):
        torch.testing.assert_close(result, other.bfloat16(), rtol=0, atol=0)
