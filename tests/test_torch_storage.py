"""Memory of what passes through a layer stays PyTorch's own: it may be resized, and freed."""

import pytest
from cases import normal

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")

LAYERS = {
    "BatchNorm2d": lambda m: m.BatchNorm2d(4),
    "InstanceNorm2d": lambda m: m.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "GroupNorm": lambda m: m.GroupNorm(2, 4),
    "LayerNorm": lambda m: m.LayerNorm([5, 6]),
    "RMSNorm": lambda m: m.RMSNorm(6),
    "SwitchableNorm2d": lambda m: m.SwitchableNorm2d(4),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def tensor(*shape, seed=0):
    return torch.tensor(normal(*shape, seed=seed)).float()


def by_grad(layer, x, dy):
    """Return y and all gradients by the operators, which torch.func calls."""
    parameters = dict(layer.named_parameters())

    def loss(x, parameters):
        y = torch.func.functional_call(layer, parameters, (x,))
        return (y * dy).sum(), y

    gradients, y = torch.func.grad(loss, (0, 1), has_aux=True)(x, parameters)
    return y, gradients[0], *gradients[1].values()


def by_backward(layer, x, dy):
    y = layer(x.requires_grad_())
    y.backward(dy)
    return y, x.grad, *(p.grad for p in layer.parameters())


def by_compile(layer, x, dy):
    torch._dynamo.reset()
    y = torch.compile(layer, backend="aot_eager")(x.requires_grad_())
    y.backward(dy)
    return y, x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.parametrize("run", [by_backward, by_grad, by_compile])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@layers
def test_all_memory_stays_resizable(make, run):
    layer, x, dy = make(ours), tensor(3, 4, 5, 6), tensor(3, 4, 5, 6, seed=1)
    if run is by_grad:
        layer.eval()  # PyTorch tracks nothing inside torch.func.grad
    seen = run(layer, x, dy)
    for t in (x, dy, *seen, *layer.parameters(), *layer.buffers()):
        assert t.untyped_storage().resizable()
        assert t.untyped_storage().nbytes() == t.nbytes
    with torch.no_grad():
        layer.eval()(x)
    x.detach_().resize_(30, 4, 5, 6)


@layers
def test_a_buffer_is_used_again(make):
    layer, reference, buffer = make(ours), make(ours), torch.empty(0)
    for n in (2, 5, 3):
        x = torch.mul(tensor(n, 4, 5, 6), 2, out=buffer.resize_(0))
        assert x is buffer
        assert torch.equal(layer(x), reference(x.clone()))


@layers
def test_memory_is_freed_and_comes_back(make):
    # As FSDP does with weights, and offloading with x, between forward and backward.
    layer, x = make(ours), tensor(3, 4, 5, 6).requires_grad_()
    dy = tensor(3, 4, 5, 6, seed=1)
    expected = torch.autograd.grad(layer(x), x, dy)[0]
    y, tensors = layer(x), [x, *layer.parameters()]
    copies = [t.detach().clone() for t in tensors]
    for t in tensors:
        t.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"), torch.no_grad():
        layer(x)
    with pytest.raises(RuntimeError, match="freed"):
        torch.autograd.grad(y, x, dy, retain_graph=True)
    with torch.no_grad():
        for t, copy in zip(tensors, copies, strict=True):
            t.untyped_storage().resize_(copy.nbytes)
            t.data.copy_(copy)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected)


@pytest.mark.parametrize("n_bytes", [0, 1 << 10, 1 << 24])
def test_an_output_that_was_resized_does_not_give_its_memory(n_bytes):
    layer, x = ours.BatchNorm2d(4), tensor(8, 4, 128, 96)
    y = layer(x).detach()
    expected = y.clone()
    y.untyped_storage().resize_(n_bytes)
    del y
    for _ in range(2):
        y = layer(x).detach()
        assert torch.equal(y, expected)
        assert y.untyped_storage().nbytes() == y.nbytes
        y.untyped_storage().resize_(0)
        y.untyped_storage().resize_(n_bytes)
        del y
