"""PyTorch's private names: without any one of them results are the same, after one warning."""

import ast
import sys
import warnings
from pathlib import Path

import pytest
from cases import normal

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")
from numbanorm.torch import memory, private  # noqa: E402

FOLDER = Path(ours.__file__).parent
# PyTorch's own: forward-mode derivatives still load parts of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
names = pytest.mark.parametrize("name", private.NAMES)


@pytest.fixture(autouse=True)
def restored():
    """All names are found again after a test."""
    yield
    private.look_up()
    memory.outputs.clear()


def without(name):
    """Return a search that does not find this name."""
    return lambda other: None if other == name else private._find(other)


def tensor(*shape, seed):
    return torch.tensor(normal(*shape, seed=seed)).float()


def network():
    torch.manual_seed(0)
    nn = torch.nn
    # Large enough for outputs in memory of earlier ones.
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8), nn.Sigmoid(),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.LayerNorm(62),
        nn.Sigmoid(), nn.RMSNorm(62),
    )  # fmt: skip
    return ours.convert(model).append(ours.SwitchableNorm2d(8))


def training():
    """Return y, dx and gradients of three steps, and running statistics and what hangs on them."""
    model, found = network(), []
    for step in range(3):
        x = tensor(10, 3, 64, 64, seed=step).requires_grad_()
        y = model(x)
        kept = []
        y.register_hook(kept.append)  # a gradient that somebody has stays as it is
        (y * tensor(10, 8, 62, 62, seed=step + 9)).sum().backward()
        found += [y, x.grad, *kept, *(p.grad.clone() for p in model.parameters())]
    running = [b.double() for b in model.buffers()]
    with torch.no_grad():
        running += [model.eval()(x), model(x)]
    running += torch.autograd.grad(model(x).sum(), x)
    return [t.detach() for t in found], [t.detach() for t in running]


def transforms():
    """Return what goes through wrappers of tensors."""
    layer, x = ours.LayerNorm(6), tensor(3, 4, 6, seed=0).requires_grad_()
    y = layer(x)
    dys = torch.stack([torch.ones_like(y), y.detach()])
    return [
        torch.func.vmap(layer)(x),
        torch.func.grad(lambda x: (layer(x) ** 3).sum())(x),
        *torch.autograd.grad(y, x, dys, is_grads_batched=True),
        torch.func.jvp(ours.SwitchableNorm1d(4).eval(), (x,), (x**2,))[1],
    ]


@pytest.fixture(scope="module")
def expected():
    return *training(), transforms()


def check_same(found, expected, rounding=0.0):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)


def check_all(name, found, expected):
    # From the operator PyTorch moves running statistics on, in their own type.
    by_the_operator = name in (private.TRANSFORMS, private.BATCHED, private.MODES)
    # Transforms that are not told of are PyTorch's own.
    by_pytorch = 1e-5 if name in (private.TRANSFORMS, private.INTERPRETERS) else 0.0
    for k, rounding in enumerate((0.0, 2e-6 if by_the_operator else 0.0, by_pytorch)):
        check_same(found[k], expected[k], rounding)


@names
def test_results_are_the_same_without_a_name(name, expected):
    with pytest.warns(RuntimeWarning) as caught:
        private.look_up(without(name))
        found = *training(), transforms()
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(messages) == 1
    for needed in name, "is missing", torch.__version__, private.NAMES[name]:
        assert needed in messages[0]
    check_all(name, found, expected)


def raise_type_error(*_):
    raise TypeError("takes no arguments")


OTHERWISE = {
    "a storage has always one owner": (private.STORAGE_COUNT, lambda _: 1),
    "storages are not counted": (private.STORAGE_COUNT, raise_type_error),
    "a tensor has always one owner": (private.TENSOR_COUNT, lambda _: 1),
    "tensors are not counted": (private.TENSOR_COUNT, raise_type_error),
    "transforms are not told of": (private.TRANSFORMS, raise_type_error),
    "everything is batched": (private.BATCHED, lambda _: True),
    "interpreters are not told of": (private.INTERPRETERS, raise_type_error),
    "modes are not counted": (private.MODES, lambda: None),
    "the level is no number": (private.FORWARD_LEVEL, object()),
}


@pytest.mark.parametrize(("name", "value"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_name_that_behaves_otherwise_is_not_used(name, value, expected):
    with pytest.warns(RuntimeWarning, match=f"{name} behaves otherwise") as caught:
        private.look_up(lambda other: value if other == name else private._find(other))
        found = *training(), transforms()
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    check_all(name, found, expected)


@pytest.mark.parametrize("grad", [True, False])
def test_what_does_not_tell_of_a_wrapper_makes_an_error(grad):
    wrong = {private.TRANSFORMS: lambda: False, private.BATCHED: lambda _: False}
    private.look_up(lambda name: wrong.get(name) or private._find(name))
    layer, x = ours.LayerNorm(6), tensor(3, 4, 6, seed=0).requires_grad_()
    y = layer(x)
    with torch.set_grad_enabled(grad):
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.vmap(layer)(x)
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)


def test_a_short_cut_that_fails_is_not_taken(expected, monkeypatch):
    private.look_up()
    monkeypatch.setattr(private, "_takes_short_cut", lambda: False)
    with pytest.warns(RuntimeWarning, match="apply behaves otherwise"):
        found, _ = training()
    check_same(found, expected[0])


def test_nothing_is_warned_of_where_all_is_found():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private.look_up()
        training()


def test_outputs_have_fresh_memory_where_owners_cannot_be_counted():
    layer, x = ours.BatchNorm2d(4), tensor(8, 4, 128, 96, seed=0)
    with pytest.warns(RuntimeWarning, match="fresh memory"):
        private.look_up(without(private.STORAGE_COUNT))
    layer(x)
    assert not memory.outputs._kept
    private.look_up()
    layer(x)
    assert memory.outputs._kept


def private_names(path):
    """Yield the names with an underscore that a file takes from PyTorch's modules or tensors."""
    own = {"self", "cls", "ctx"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            owner = node.value
            is_own = isinstance(owner, ast.Name) and owner.id in own
            if not is_own and not node.attr.startswith("__"):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_one_file_has_private_names(path):
    # What is Python's, numbanorm's own or of a named tuple.
    known = {"_replace", "_make", "_fields", "_of", "_rest", "_switch", "_elsewhere", "_tensors"}
    known |= {"_plan", "_examples", "_then", "_any_residual"}
    # What every Module has.
    known |= {"_modules", "_parameters", "_buffers"}
    if path.stem != "private":
        assert set(private_names(path)) <= known
        assert "torch._C" not in path.read_text(encoding="utf-8")


def test_files_are_short():
    assert all(len(p.read_text().splitlines()) < 400 for p in FOLDER.glob("*.py"))
    assert sys.modules["numbanorm.torch"] is ours
