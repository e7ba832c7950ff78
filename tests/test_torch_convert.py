"""Whole models: what convert takes and leaves, and the way back."""

import copy
import pickle
import warnings

import pytest

import numbanorm

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")
nn = torch.nn
NAMES = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d",
    "InstanceNorm3d", "LayerNorm", "GroupNorm", "RMSNorm", "SyncBatchNorm",
]  # fmt: skip


# -- The way back --------------------------------------------------------------------------------


def everything(layer):
    """Return all that a layer has in itself, and its class."""
    return type(layer), {key: copy.copy(value) for key, value in vars(layer).items()}


@pytest.mark.parametrize("name", NAMES)
def test_revert_leaves_nothing_behind(name):
    layer = getattr(nn, name)(*{"GroupNorm": [2, 6]}.get(name, [6])).eval()
    layer.register_forward_hook(lambda *_: None)
    before = everything(layer)
    assert ours.revert(ours.convert(layer)) is layer
    assert everything(layer) == before
    assert pickle.loads(pickle.dumps(type(layer))) is getattr(nn, name)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_revert_after_use():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    before = [everything(layer) for layer in model]
    x = torch.rand(2, 3, 8, 8)
    ours.convert(model)(x).sum().backward()
    ours.revert(model)
    assert [(cls, list(has)) for cls, has in before] == [
        (type(layer), list(vars(layer))) for layer in model
    ]
    torch.jit.script(model)


def test_revert_of_lazy_layers():
    lazy, used = nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d()
    before = list(vars(lazy))
    assert list(vars(ours.revert(ours.convert(lazy)))) == before
    ours.convert(used)(torch.rand(2, 3, 4, 4))
    lazy(torch.rand(2, 3, 4, 4))
    assert type(used) is ours.BatchNorm2d
    ours.revert(used)
    assert (type(used), list(vars(used))) == (nn.BatchNorm2d, list(vars(lazy)))


def test_revert_leaves_what_convert_did_not_make():
    class Own(ours.BatchNorm2d):
        """A subclass of ours."""

    model = nn.Sequential(Own(4), ours.SwitchableNorm2d(4), nn.Linear(2, 2), ours.LayerNorm(4))
    ours.revert(model)
    assert [type(layer) for layer in model] == [
        Own, ours.SwitchableNorm2d, nn.Linear, nn.LayerNorm,
    ]  # fmt: skip


@pytest.mark.parametrize("change", [ours.convert, ours.revert, ours.convert_switchable])
def test_a_module_is_needed(change):
    with pytest.raises(TypeError, match=r"module: a torch\.nn\.Module is needed, got list"):
        change([nn.BatchNorm2d(4)])


# -- Classes of others -----------------------------------------------------------------------------


class Nothing(nn.BatchNorm2d):
    """A subclass that adds nothing to forward."""

    def __init__(self, n):
        super().__init__(n, eps=1e-3)
        self.note = "kept"


class Relaxed(nn.BatchNorm2d):
    """A subclass whose forward is PyTorch's, but calls something else."""

    def _check_input_dim(self, x):
        raise ValueError("never")


class Own(nn.BatchNorm2d):
    """A subclass with a forward of its own, which happens to be the same."""

    def forward(self, x):
        return super().forward(x)


class MyRMSNorm(nn.Module):
    """As people write it, with names of their own."""

    def __init__(self, n, eps=1e-6):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(n) + 0.5)
        self.epsilon = eps

    def forward(self, hidden):
        return (
            hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.scale
        )


class MyLayerNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.normalized_shape = n
        self.beta = nn.Parameter(torch.rand(n))
        self.gamma = nn.Parameter(torch.rand(n))

    def forward(self, x):
        return nn.functional.layer_norm(x, self.gamma.shape, self.gamma, self.beta, 1e-3)


class OnePlusRMSNorm(MyRMSNorm):
    def forward(self, hidden):
        return super().forward(hidden) / self.scale * (1 + self.scale)


def llama(forward):
    """Return a class by the name of one of Hugging Face's."""

    def init(self, n):
        nn.Module.__init__(self)
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(n)), 1e-6

    return type("LlamaRMSNorm", (nn.Module,), {"__init__": init, "forward": forward})


LlamaRMSNorm = llama(
    lambda self, x: (
        self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
    )
)
Gemma = llama(lambda self, x: (1 + self.weight) * nn.functional.rms_norm(x, x.shape[-1:]))
RMS = {MyRMSNorm: lambda old: ours.RMSNorm(old.scale.shape, eps=old.epsilon)}


def is_ours(layer):
    return type(layer).__module__.startswith("numbanorm")


def same_steps(layer, reference, *xs):
    for training in (True, False):
        for x in xs:
            results = []
            for each in (layer.train(training), reference.train(training)):
                each.zero_grad()
                z = x.clone().requires_grad_()
                y = each(z)
                y.backward(torch.ones_like(y) + x)
                results.append([y, z.grad, *(p.grad for p in each.parameters()), *each.buffers()])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "classes", "x"),
    [
        (lambda: Nothing(3), None, torch.rand(2, 3, 4, 4)),
        (lambda: LlamaRMSNorm(5), None, torch.rand(4, 5)),
        (lambda: MyRMSNorm(5), RMS, torch.rand(2, 3, 5)),
        (
            lambda: MyLayerNorm(5),
            {MyLayerNorm: lambda old: shared_layer_norm(old)},
            torch.rand(2, 3, 5),
        ),
        (
            lambda: Own(3),
            {Own: lambda old: ours.BatchNorm2d(3, old.eps, old.momentum)},
            torch.rand(2, 3, 4, 4),
        ),
        (
            lambda: MyRMSNorm(5),
            {MyRMSNorm: lambda old: ours.Norm(-1, shape=5, center=False, bias=False, eps=1e-6)},
            torch.rand(2, 3, 5),
        ),
    ],
    ids=["nothing", "copied", "classes", "shared", "own", "generic"],
)
def test_a_class_that_agrees_is_taken(make, classes, x):
    layer = make().double()
    reference, cls = copy.deepcopy(layer), type(layer)
    hooks, random = [], torch.get_rng_state()
    layer.register_forward_hook(lambda *_: hooks.append("called"))
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    parameters, has = [id(p) for p in layer.parameters()], list(vars(layer))
    ours.convert(layer, classes=classes)
    assert (hooks, list(vars(layer))) == ([], has)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())
    assert is_ours(layer) and isinstance(layer, cls)
    assert repr(layer).startswith(f"numbanorm.{reference!r}"[:-1])
    assert [id(p) for p in layer.parameters()] == parameters
    same_steps(layer, reference, x.double(), x.double() * 1e-3)
    assert hooks
    layer._forward_hooks.clear()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert type(again) is type(layer)
        assert torch.equal(again(x.double()), layer(x.double()))
    # What is set later is seen.
    with torch.no_grad():
        for each in (layer, reference):
            next(each.parameters()).fill_(3)
    same_steps(layer, reference, x.double())
    with torch.device("meta"):
        y = copy.deepcopy(layer).to("meta")(x.to("meta").double())
    assert (y.shape, y.is_meta) == (x.shape, True)
    ours.revert(layer)
    assert (type(layer), list(vars(layer))) == (cls, has)


def test_the_trial_does_not_depend_on_the_defaults():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.no_grad():
            layers = [ours.convert(cls(4).to_empty(device="cpu")) for cls in (LlamaRMSNorm, Gemma)]
    finally:
        torch.set_default_dtype(before)
    assert [is_ours(layer) for layer in layers] == [True, False]


def shared_layer_norm(old):
    layer = ours.LayerNorm(5, eps=1e-3)
    layer.weight, layer.bias = old.gamma, old.beta
    return layer


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_compile():
    torch._dynamo.reset()
    model = nn.Sequential(MyRMSNorm(5), LlamaRMSNorm(5), MyLayerNorm(5), nn.LayerNorm(5))
    ours.convert(model, classes={**RMS, MyLayerNorm: shared_layer_norm})
    assert all(map(is_ours, model))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    same_steps(compiled, model, torch.rand(3, 5))


def test_torch_fx_and_trace():
    model = ours.convert(nn.Sequential(MyRMSNorm(5), LlamaRMSNorm(5)), classes=RMS)
    x = torch.rand(3, 5)
    nodes = torch.fx.symbolic_trace(model).graph.nodes
    assert [n.target for n in nodes if n.op == "call_module"] == ["0", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (x,))
    assert "numbanorm::" not in str(traced.graph) + str(traced.inlined_graph)
    torch.testing.assert_close(traced(2 * x), model(2 * x))


def test_arguments_have_the_names_of_before():
    layer, x = MyRMSNorm(5), torch.rand(2, 5)
    y = layer(hidden=x)
    ours.convert(layer, classes=RMS)
    torch.testing.assert_close(layer(hidden=x), y)
    mask = torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(layer(x, mask=mask), y)


def replaced():
    layer = nn.LayerNorm(4)
    layer.forward = lambda x: x
    return layer


def parametrized():
    layer = nn.LayerNorm(4)
    return torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())


LEFT = {
    "own forward": (lambda: Own(4), None, "its forward is its own; classes= may map it"),
    "own check": (lambda: Relaxed(4), None, "its forward is its own; classes= may map it"),
    "unknown": (lambda: MyRMSNorm(4), None, "its forward is its own; classes= may map it"),
    "name alone": (lambda: Gemma(4), None, "its output is not numbanorm's"),
    "mapped": (
        lambda: OnePlusRMSNorm(4),
        {OnePlusRMSNorm: lambda old: ours.RMSNorm(4)},
        "its forward is its own",
    ),
    "meta": (lambda: LlamaRMSNorm(4).to("meta"), None, "it is on the meta device"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), None, "it is lazy"),
    "replaced": (replaced, None, "its forward was replaced"),
    "parametrized": (parametrized, None, "it is parametrized"),
}


@pytest.mark.parametrize(("make", "classes", "reason"), LEFT.values(), ids=LEFT)
def test_others_are_left_and_it_is_said_why(make, classes, reason):
    model = nn.Sequential(nn.Linear(4, 4), make())
    cls = type(model[1])
    ours.convert(model, classes=classes)
    assert type(model[1]) is cls
    lines = ours.summary(model).splitlines()
    assert reason in lines[1] and lines[1].startswith("1 ")
    assert lines[-1] == "numbanorm runs 0 of 1 norm layers"


def test_summary():
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.ModuleDict({"a": nn.LayerNorm(4)}), nn.ReLU(), nn.GroupNorm(2, 4)
    )
    assert ours.summary(model).splitlines()[-1] == "numbanorm runs 0 of 3 norm layers"
    assert ours.summary(model).count("convert() would take it") == 3
    ours.convert(model)[1].to(torch.float8_e5m2)
    model[3].to("meta")
    table = [line.split(maxsplit=3) for line in ours.summary(model).splitlines()]
    assert table[0] == ["layer", "class", "numbanorm", "activation  why not"]
    assert table[1] == ["0", "numbanorm.torch.BatchNorm2d", "yes"]
    assert table[2][2:] == ["no", "its tensors are float8_e5m2 on cpu"]
    assert table[3][2:] == ["no", "its tensors are float32 on meta"]
    assert ours.summary(ours.RMSNorm(3)).splitlines()[1].startswith("(itself)  ")
    assert ours.summary(nn.ReLU()).splitlines()[-1] == "numbanorm runs 0 of 0 norm layers"


def test_wrong_use():
    with pytest.raises(TypeError, match=r"module: a torch\.nn\.Module is needed, got list"):
        ours.summary([nn.BatchNorm2d(4)])
    with pytest.raises(TypeError, match="classes: a mapping is needed, got list"):
        ours.convert(nn.ReLU(), classes=[MyRMSNorm])
    with pytest.raises(TypeError, match="classes: classes of modules, and functions"):
        ours.convert(nn.ReLU(), classes={"MyRMSNorm": ours.RMSNorm})
    with pytest.raises(
        TypeError, match=r"classes: a layer of numbanorm\.torch is needed for MyRMS"
    ):
        ours.convert(MyRMSNorm(4), classes={MyRMSNorm: lambda old: nn.RMSNorm(4)})
    with pytest.raises(ValueError, match=r"module: a BatchNorm layer .* got only LayerNorm, Own"):
        ours.convert_switchable(nn.Sequential(nn.LayerNorm(4), Own(4)))
    with pytest.raises(ValueError, match=r"module: a BatchNorm layer .* got no norm layer"):
        ours.convert_switchable(nn.ReLU())
    model = nn.Sequential(nn.BatchNorm2d(4))
    assert ours.convert_switchable(ours.convert_switchable(model)) is model
    layer = nn.BatchNorm2d(4)
    with pytest.raises(TypeError, match=r"numbanorm\.torch\.convert.* first, got BatchNorm2d"):
        numbanorm.recalibrate(layer, [torch.rand(2, 4, 3, 3)], [layer])
    with pytest.raises(TypeError, match=r"layers: .* got Sequential"):
        numbanorm.recalibrate(model, [torch.rand(2, 4, 3, 3)], nn.Sequential(model))
