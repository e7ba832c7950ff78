"""Masks in the layers for PyTorch, and the generic Norm, against the reference."""

import copy

import numpy as np
import pytest
from cases import CASES, assert_close, by_id, masks, normal

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")

OPTIONS = {
    "BatchNorm": ["num_features", "eps", "momentum", "affine", "track_running_stats"],
    "InstanceNorm": ["num_features", "eps", "momentum", "affine", "track_running_stats"],
    "SwitchableNorm": [
        "num_features", "eps", "momentum", "affine", "track_running_stats", "over", "num_groups",
        "axis", "bias",
    ],
    "LayerNorm": ["normalized_shape", "eps", "elementwise_affine", "bias"],
    "RMSNorm": ["normalized_shape", "eps", "elementwise_affine"],
    "GroupNorm": ["num_groups", "num_channels", "eps", "affine"],
    "Norm": [
        "axes", "affine", "track_stats", "feature_axes", "shape", "groups", "group_axis", "center",
        "bias", "eps", "momentum",
    ],
}  # fmt: skip


class Twin:
    """A layer for PyTorch in the words of one for NumPy, and with its state."""

    def __init__(self, layer):
        name = type(layer).__name__
        options = {key: getattr(layer, key) for key in OPTIONS[name.rstrip("123d") or name]}
        if "bias" in options:
            options["bias"] = layer._has_bias
        if name == "Norm":
            arrays = layer.weight, layer.running_mean
            options["shape"] = next((a.shape for a in arrays if a is not None), None)
        self.module = getattr(ours, name)(**options, dtype=getattr(torch, layer.dtype.name))
        state = {key: torch.tensor(value) for key, value in layer.state_dict().items()}
        if name.startswith("InstanceNorm") and layer.track_running_stats:
            state.setdefault("num_batches_tracked", torch.tensor(0))
        self.module.load_state_dict(state)
        self.train(layer.training)

    def __getattr__(self, name):
        value = getattr(self.module, name, None)
        return value.detach().numpy() if isinstance(value, torch.Tensor) else value

    def train(self, mode=True):
        self.module.train(mode)
        return self

    def zero_grad(self):
        self.module.zero_grad()

    def parameters(self):
        return dict(self.module.named_parameters())

    def gradients(self):
        named = self.module.named_parameters()
        return {name: p.grad.numpy() for name, p in named if p.grad is not None}

    def __call__(self, x, mask=None):
        self.x = torch.tensor(x, requires_grad=True)
        mask = None if mask is None else torch.from_numpy(np.array(mask))
        self.y = self.module(self.x, mask=mask)
        return self.y.detach().numpy()

    def backward(self, dy):
        self.y.backward(torch.tensor(dy))
        return self.x.grad.numpy()


def has_twin(case):
    layer = case.make()
    name = type(layer).__name__
    if name == "Norm" and layer.track_stats:
        return layer.groups == 1 and (0 in layer.axes or layer.feature_axes is not None)
    if name.startswith("InstanceNorm") and layer.momentum is None:
        return False  # to PyTorch None means that nothing moves
    is_torchs = not hasattr(layer, "axis") or (layer.axis == 1 and layer._has_bias)
    return hasattr(ours, name) and (name.startswith("Switchable") or is_torchs)


twins = [case for case in CASES if has_twin(case)]
cases = pytest.mark.parametrize("case", twins, ids=[case.id for case in twins])


def test_most_cases_have_a_twin():
    assert len(twins) > 50
    assert {type(case.make()).__name__ for case in twins} >= {"Norm", "SwitchableNorm2d"}


@cases
@masks("full", "without the batch axis", "padded lengths", "all False")
def test_definition(case, make_mask):
    mask, dtype = make_mask(case.shape), np.float64
    x, dy = case.input(dtype), normal(*case.shape, seed=1, dtype=dtype)
    for training in (True, False):
        twin = Twin(case.layer(dtype).train(training))
        case.check(twin, x, dy, mask)


def through_the_operator(mask):
    """Return what lets a twin call the operators, as under torch.compile, and notes which."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "numbanorm":
                called.append(op.__name__)
            return op(*args, **(kwargs or {}))

    def forward(twin, x, mask=mask):
        with Watch():
            return twin(x, mask)

    def backward(twin, dy):
        with Watch():
            return twin.backward(dy)

    return forward, backward, called


@cases
def test_operator(case):
    x, dy = case.input(), normal(*case.shape, seed=1)
    mask = normal(*case.shape, seed=2) < 0.5
    for training in (True, False):
        twin = Twin(case.layer().train(training))
        forward, backward, called = through_the_operator(mask)
        case.check(twin, x, dy, mask, forward, backward)
        assert called == ["normalize.default", "normalize_backward.default"]


@cases
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of kernels that are Python
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("way", ["eager", "operator", "definition"])
def test_what_is_masked_out_reaches_nothing(case, bad, way, monkeypatch):
    x, dy = case.input(), normal(*case.shape, seed=1)
    mask = normal(*case.shape, seed=2) < 0.5
    if way == "definition":
        monkeypatch.setattr("numbanorm.torch.base.can_take", lambda *_: False)
    results = []
    for filler in (0.0, bad):
        twin = Twin(case.layer())
        forward, backward, _ = through_the_operator(mask)
        if way != "operator":
            forward, backward = Twin.__call__, Twin.backward
        y, dx = forward(twin, np.where(mask, x, filler), mask), backward(twin, dy * mask)
        state = {name: t.numpy() for name, t in twin.module.state_dict().items()}
        results.append({"y": y[mask], "dx": dx, **twin.gradients(), **state})
    for (name, found), expected in zip(results[1].items(), results[0].values(), strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=name)


@cases
def test_fallback(case, monkeypatch):
    # Where numbanorm is not asked, PyTorch's own operators do it.
    monkeypatch.setattr("numbanorm.torch.base.direct_call", None)
    monkeypatch.setattr("numbanorm.torch.base.operator", None)
    monkeypatch.setattr("numbanorm.torch.base.can_take", lambda *_: False)
    x, dy = case.input(), normal(*case.shape, seed=1)
    for mask in (normal(*case.shape, seed=2) < 0.5, normal(*case.shape[1:], seed=3) < 0.5):
        for training in (True, False):
            case.check(Twin(case.layer().train(training)), x, dy, mask)


FEW = [
    "BatchNorm2d", "InstanceNorm2d-tracking", "GroupNorm", "LayerNorm-2axes", "RMSNorm",
    "Norm-scattered", "Norm-groups", "SwitchableNorm2d-all", "SwitchableNorm2d-last",
]  # fmt: skip
few = pytest.mark.parametrize("case", [by_id[name] for name in FEW], ids=FEW)


def step(module, call, x, dy, mask):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = call(x, mask=mask)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@few
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compile(case, training):
    torch._dynamo.reset()
    module = Twin(case.layer(np.float32).train(training)).module
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x, dy = (torch.tensor(normal(*case.shape, seed=s, dtype=np.float32)) for s in (0, 1))
    mask = torch.tensor(normal(*case.shape[1:], seed=2) < 0.5)
    found = step(compiled, compiled, x, dy, mask)
    for a, b in zip(found, step(module, module, x, dy, mask), strict=True):
        assert_close(a.double(), b.double(), scale=10, dtype=np.float32)


@few
def test_second_derivatives_and_vmap(case):
    module = Twin(case.layer()).module
    mask = torch.tensor(normal(*case.shape, seed=2) < 0.5)
    parameters = tuple(p.detach().requires_grad_() for p in module.parameters())
    names = [name for name, _ in module.named_parameters()]

    def call(x, *values):
        state = dict(zip(names, values, strict=True))
        state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, state, (x,), {"mask": mask})

    x = torch.tensor(case.input(), requires_grad=True)
    v = torch.tensor(normal(*case.shape, seed=3))

    def gradient(x, *values):
        return torch.autograd.grad(call(x, *values), (x, *values), v, create_graph=True)

    # In one random direction of all inputs and all gradients.
    direction = [torch.randn(t.shape, dtype=t.dtype) for t in (x, *parameters)]

    def along(t):
        return gradient(*(a + t * d for a, d in zip((x, *parameters), direction, strict=True)))

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(g.shape, dtype=g.dtype) for g in along(t)]

    def total(t):
        return sum((g * w).sum() for g, w in zip(along(t), weights, strict=True))

    (exact,) = torch.autograd.grad(total(t), t)
    h = 1e-5
    estimate = (total(t + h) - total(t - h)) / (2 * h)
    torch.testing.assert_close(exact, estimate.detach(), rtol=1e-6, atol=1e-6)


@few
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(case, dtype):
    module = Twin(case.layer(np.float32)).module.eval()
    reference = copy.deepcopy(module)
    x = torch.tensor(case.input(np.float32)).to(dtype)
    mask = torch.tensor(normal(*case.shape, seed=2) < 0.5)
    y = module.to(dtype)(x, mask=mask)
    assert y.dtype is dtype
    expected = reference.to(dtype).float()(x.float(), mask=mask)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


@few
def test_wrong_masks(case):
    module = Twin(case.layer()).module
    x = torch.tensor(case.input())
    with pytest.raises(TypeError, match=r"mask: a tensor of bool.*got torch\.float64"):
        module(x, mask=x)
    with pytest.raises(TypeError, match=r"mask: a tensor of bool.*got list"):
        module(x, mask=[True])
    with pytest.raises(ValueError, match="mask: a shape that broadcasts to x"):
        module(x, mask=torch.ones(7, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: a tensor on cpu"):
        module(x, mask=torch.ones(case.shape, dtype=torch.bool, device="meta"))


def test_changing_a_mask_before_backward_is_noticed():
    mask = torch.ones(3, 6, dtype=torch.bool)
    y = ours.LayerNorm(6)(torch.rand(3, 6, requires_grad=True), mask=mask)
    mask[0] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_recalibrate_with_masks():
    import numbanorm

    layer = ours.BatchNorm2d(4).double()
    xs = [torch.tensor(normal(n, 4, 5, 6, seed=n)) for n in (3, 1, 4)]
    masks = [torch.tensor(normal(n, 1, 5, 6, seed=9) < 0.5) for n in (3, 1, 4)]
    numbanorm.recalibrate(
        lambda batch: layer(batch[0], mask=batch[1]), zip(xs, masks, strict=True), [layer]
    )
    for c in range(4):
        values = torch.cat([x[:, c][m[:, 0]] for x, m in zip(xs, masks, strict=True)])
        assert_close(layer.running_mean[c], values.mean(), scale=1)
        assert_close(layer.running_var[c], values.var(), scale=1)
