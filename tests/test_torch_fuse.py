"""fuse(): norm, addition and activation as one layer each, with the numbers of before."""

import copy

import pytest

torch = pytest.importorskip("torch")
nt = pytest.importorskip("numbanorm.torch")
nn, functional = torch.nn, torch.nn.functional


class Block(nn.Module):
    def __init__(self, n, m, add="iadd", activation="function"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m)
        self.conv2, self.bn2 = nn.Conv2d(m, m, 3, padding=1, bias=False), nn.BatchNorm2d(m)
        self.relu = nn.ReLU(inplace=True)
        self.add = add
        self.short = nn.Identity()
        if n != m:
            self.short = nn.Sequential(nn.Conv2d(n, m, 1, bias=False), nn.BatchNorm2d(m))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        short = self.short(x)
        if self.add == "iadd":
            y += short
        elif self.add == "torch":
            y = torch.add(short, y, alpha=1)
        elif self.add == "alpha":
            y = torch.add(y, short, alpha=2)
        else:
            y = short + y
        return functional.relu(y)


class Net(nn.Module):
    def __init__(self, add="iadd"):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
        self.unused = nn.Linear(3, 2)
        self.blocks = nn.ModuleList([Block(4, 4, add), Block(4, 6, add)])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def run(model, x, dy):
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients, dict(model.named_buffers())


def assert_alike(model, fused, x):
    """Compare a step in training, and an evaluation."""
    assert list(model.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in fused.named_parameters()]
    dy = torch.randn_like(model(x))
    fused(x)
    for one, other in zip(run(model, x, dy), run(fused, x, dy), strict=True):
        torch.testing.assert_close(one, other)
    model.eval(), fused.eval()
    torch.testing.assert_close(model(x), fused(x))
    model.train(), fused.train()


def activations(model):
    return [m.activation for m in model.modules() if hasattr(m, "_activation")]


def calls(fused):
    return [str(n.target) for n in fused.graph.nodes if n.op in ("call_function", "call_method")]


@pytest.mark.parametrize("add", ["iadd", "torch", "plain", "alpha"])
def test_residual_network(add):
    torch.manual_seed(0)
    model = Net(add).double()
    fused = nt.fuse(copy.deepcopy(model))
    x = torch.randn(3, 2, 7, 6, dtype=torch.float64)
    assert_alike(model, fused, x)
    assert isinstance(fused, torch.fx.GraphModule)
    relus = 2 if add == "alpha" else 4
    assert activations(fused).count("relu") == relus
    assert activations(fused).count("silu") == 1
    added = [n.target for n in fused.graph.nodes if "residual" in n.kwargs]
    assert added == ([] if add == "alpha" else ["blocks.0.bn2", "blocks.1.bn2"])
    assert len(calls(fused)) == (5 if add == "alpha" else 1)
    table = nt.summary(fused)
    assert "relu" in table
    assert "numbanorm runs 6 of 6" in table
    with pytest.raises(ValueError, match=r"has activation='(relu|silu)'"):
        nt.revert(fused)
    again = copy.deepcopy(fused)
    torch.testing.assert_close(again.eval()(x), fused.eval()(x))


def test_neighbours_in_a_sequential():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.BatchNorm1d(6), nn.LeakyReLU(0.3),
        nn.GroupNorm(2, 6), nn.Dropout(0.0), nn.ReLU(), nn.LayerNorm(6), nn.Softplus(),
    )  # fmt: skip
    fused = nt.fuse(copy.deepcopy(model))
    assert type(fused) is nn.Sequential
    assert activations(fused) == ["gelu", ("leaky_relu", 0.3), None, None]
    assert [type(m) for m in fused][2::2][:2] == [nn.Identity] * 2
    assert_alike(model, fused, torch.randn(5, 4))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return functional.dropout(functional.relu(self.norm(x)), 0.9, self.training)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), nn.Sequential(nn.LayerNorm(8), nn.ReLU())

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return functional.relu(self.norm(self.inner(x)))


def test_what_has_no_graph_stays_a_module():
    model = nn.Sequential(Dropping(), Branching(), nn.Linear(8, 2))
    fused = nt.fuse(copy.deepcopy(model))
    x = torch.randn(50, 8)
    model.eval(), fused.eval()
    torch.testing.assert_close(model(x), fused(x))
    fused.train()
    assert (fused[0](x) == 0).float().mean() > 0.8
    # The norm of each stays as it is; a Sequential within is fused.
    assert activations(fused) == [None, None, "relu"]


def test_what_is_read_elsewhere_is_left():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x):
            y = self.a(x)
            z = functional.relu(self.b(functional.relu(y) + y))
            return functional.relu(self.c(z)) + functional.tanh(self.c(x))

    model = Two()
    fused = nt.fuse(copy.deepcopy(model))
    assert activations(fused) == [None, "relu", None]
    assert_alike(model, fused, torch.randn(3, 4))


def test_hooks_and_shared_layers_are_left():
    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm, nn.ReLU(), norm, nn.Tanh(), nn.LayerNorm(4), nn.ReLU())
    seen = []
    model[4].register_forward_hook(lambda m, args, y: seen.append(y))
    fused = nt.fuse(copy.deepcopy(model))
    assert activations(fused) == [None, None]
    assert_alike(model, fused, torch.randn(3, 4))


class Activated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return functional.silu(self.norm(x))


def test_what_is_in_several_places_is_left():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.alone = Activated(), Activated()
            self.again = self.first

        def forward(self, x):
            if x.sum() > 1e9:  # no graph of the whole
                return x
            return self.alone(self.again(self.first(x)))

    model = Twice()
    fused = nt.fuse(copy.deepcopy(model))
    assert activations(fused) == [None, "silu"]
    assert_alike(model, fused, torch.randn(3, 8))


def test_residual_that_is_broadcast():
    class Plus(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.shift = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return functional.relu(self.norm(x) + self.shift(x[:1]))

    model = Plus()
    fused = nt.fuse(copy.deepcopy(model))
    assert_alike(model, fused, torch.randn(3, 4))
    assert activations(fused) == ["relu"]


def test_formats_autocast_and_compile():
    torch.manual_seed(0)
    model = Net()
    fused = nt.fuse(copy.deepcopy(model))
    x = torch.randn(3, 2, 7, 6).contiguous(memory_format=torch.channels_last)
    assert_alike(model, fused, x)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = model(x), fused(x)
    torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)
    compiled = torch.compile(copy.deepcopy(fused), backend="aot_eager")
    dy = torch.randn(3, 3)
    for one, other in zip(run(fused, x, dy), run(compiled, x, dy), strict=True):
        if isinstance(other, dict):
            other = {name.removeprefix("_orig_mod."): t for name, t in other.items()}
            other = {n: t for n, t in other.items() if n in one and "tracked" not in n}
            one = {n: one[n] for n in other}
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
