"""Tensors and states of layers of every kind: what PyTorch's layers take, converted ones take."""

import copy

import pytest
from cases import normal
from children import run

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")

nn = torch.nn
SHAPE = 3, 4, 5, 6
LAYERS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d-evaluation": lambda: nn.BatchNorm2d(4).eval(),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm": lambda: nn.LayerNorm([5, 6]),
    "RMSNorm": lambda: nn.RMSNorm(6),
}
TRACKING = ["BatchNorm2d", "BatchNorm2d-evaluation", "InstanceNorm2d"]
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
tracking = pytest.mark.parametrize("name", TRACKING)


def tensor(*shape, seed=0):
    return torch.tensor(normal(*shape, seed=seed))


def both(make):
    """Return a layer of PyTorch with parameters and statistics, and the same, converted."""
    layer, generator = make().double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            if t.is_floating_point():
                t.uniform_(0.5, 2, generator=generator)
    return layer, ours.convert(copy.deepcopy(layer))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def same(theirs, mine, x, dy=None):
    """Compare y, all gradients and all buffers of two layers."""
    results = []
    for layer in (theirs, mine):
        leaf = x.detach().clone().requires_grad_()
        with torch.no_grad():
            plain = layer(x)
        layer.zero_grad()
        y = layer(leaf)
        y.backward(tensor(*y.shape, seed=7) if dy is None else dy)
        buffers = [b for b in layer.buffers() if b is not None]
        results.append(
            [plain, y.detach(), leaf.grad, *(p.grad for p in layer.parameters()), *buffers]
        )
    for expected, found in zip(*results, strict=True):
        close(found, expected)


# -- Negative and conjugate bits -----------------------------------------------------------------


def negative(t):
    """Return a tensor of the same values whose memory has them with the other sign."""
    z = torch.complex(torch.zeros_like(t), -t)
    t = z.conj().imag
    assert t.is_neg()
    return t


@layers
def test_a_negative_bit(make):
    theirs, mine = both(make)
    x, dy = tensor(*SHAPE), tensor(*SHAPE, seed=1)
    close(mine(negative(x)), theirs(x))
    y, expected = (layer(x.clone().requires_grad_()) for layer in (mine, theirs))
    for result, gradient in ((y, negative(dy)), (expected, dy)):
        result.backward(gradient)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        close(p.grad, q.grad)
    same(theirs, mine, negative(x), negative(dy))
    parameters = dict(theirs.named_parameters())
    bits = {name: negative(p.detach()) for name, p in parameters.items()}
    call = torch.func.functional_call
    close(call(mine, bits, (x,)), call(theirs, parameters, (x,)))


@layers
def test_gradients_over_a_negative_bit_are_not_written_into_it(make):
    _, layer = both(make)
    x, dy = tensor(*SHAPE).requires_grad_(), tensor(*SHAPE, seed=1)

    class Negate(torch.autograd.Function):
        """Return a gradient with the bit that nobody else has."""

        forward = staticmethod(lambda ctx, y: y.clone())
        backward = staticmethod(lambda ctx, dy: negative(dy))

    (dx,) = torch.autograd.grad(Negate.apply(layer(x)), x, dy)
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    close(dx, expected)


def test_real_parts_of_conjugates():
    z = torch.complex(tensor(3, 4), tensor(3, 4, seed=1)).conj()
    theirs, mine = (m.LayerNorm(4).double() for m in (nn, ours))
    for part in (z.real, z.imag, torch.view_as_real(z.resolve_conj()).flatten(1)[:, :4]):
        close(mine(part), theirs(part))


# -- Kinds of tensors ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    parts = [tensor(n, 4, seed=n) for n in (2, 3)]
    theirs, mine = (m.LayerNorm(4).double() for m in (nn, ours))
    nested = torch.nested.nested_tensor(parts, layout=layout)
    for found, expected in zip(mine(nested).unbind(), theirs(nested).unbind(), strict=True):
        close(found, expected)


class Image(torch.Tensor):
    """A tensor that knows where it comes from, as those of torchvision and fastai."""

    source = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        source = next((a.source for a in args if isinstance(a, cls)), None)
        if isinstance(result, cls):
            result.source = source
        return result


@layers
def test_a_subclass_keeps_what_it_knows(make):
    theirs, mine = both(make)
    x = tensor(*SHAPE).as_subclass(Image)
    x.source = "a camera"
    y, expected = mine(x), theirs(x)
    assert (type(y), y.source) == (Image, "a camera")
    close(y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    # A weight may be one as well.
    name = next((n for n, _ in mine.named_parameters()), None)
    weight = getattr(theirs, name).detach().as_subclass(Image)
    weight.source = "a file"
    call = torch.func.functional_call
    y, expected = (call(layer, {name: weight}, (tensor(*SHAPE),)) for layer in (mine, theirs))
    assert type(y) is type(expected) is Image
    close(y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_a_subclass_in_switchable_norm():
    x = tensor(*SHAPE).as_subclass(Image)
    x.source = "a camera"
    layer = ours.SwitchableNorm2d(4).double()
    y = layer(x)
    assert type(y) is Image
    close(y.as_subclass(torch.Tensor), copy.deepcopy(layer)(tensor(*SHAPE)))


def test_distributed_tensors():
    run(distributed_tensors)


def distributed_tensors():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for make in (lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4)):
        found = []
        for layer in both(make):
            for name, p in list(layer.named_parameters()):
                layer.register_parameter(
                    name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()]))
                )
            x = distribute_tensor(tensor(3, 4), mesh, [Shard(0)]).requires_grad_()
            y = layer(x)
            assert type(y) is DTensor
            y.sum().backward()
            found.append([y.full_tensor(), x.grad.full_tensor()])
        for expected, value in zip(*found, strict=True):
            close(value, expected)
    dist.destroy_process_group()


@layers
def test_fake_tensors(make):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        layer = ours.convert(make())
        y = layer(mode.from_tensor(torch.rand(SHAPE)))
        assert y.shape == SHAPE
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert ours.convert(make())(torch.rand(SHAPE)).shape == SHAPE


# -- States of layers ----------------------------------------------------------------------------

EPS = {"tensor": torch.tensor(0.25), "float64": torch.tensor(0.25).double(), "integer": 1}


@pytest.mark.parametrize("eps", EPS.values(), ids=EPS)
@layers
def test_eps_may_be_a_tensor(make, eps):
    theirs, mine = both(make)
    theirs.eps = mine.eps = eps
    same(theirs, mine, tensor(*SHAPE))


@pytest.mark.parametrize("momentum", [0.3, None])
@tracking
def test_without_a_counter(name, momentum):
    theirs, mine = both(LAYERS[name])
    for layer in (theirs, mine):
        layer.num_batches_tracked, layer.momentum = None, momentum
    same(theirs, mine, tensor(*SHAPE))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@tracking
def test_a_counter_of_another_type(name, dtype):
    theirs, mine = both(LAYERS[name])
    for layer in (theirs, mine):
        layer.num_batches_tracked = torch.tensor(3, dtype=dtype)
    same(theirs, mine, tensor(*SHAPE))


@pytest.mark.parametrize("missing", ["running_mean", "running_var", "both", "not tracked"])
@tracking
def test_without_running_statistics(name, missing):
    layers, messages = both(LAYERS[name]), []
    for layer in layers:
        if missing == "not tracked":
            layer.track_running_stats = False
        for buffer in ("running_mean", "running_var"):
            if missing in (buffer, "both"):
                setattr(layer, buffer, None)
        try:
            layer(tensor(*SHAPE))
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    if messages:
        assert len(messages) == 2 and messages[0] == messages[1]
    else:
        same(*layers, tensor(*SHAPE))


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("size", [3, 5])
def test_parameters_of_another_size(name, size):
    messages = []
    for layer in both(LAYERS["BatchNorm2d"]):
        like = getattr(layer, name)
        value = (
            nn.Parameter(like.new_ones(size)) if name in ("weight", "bias") else like.new_ones(size)
        )
        setattr(layer, name, value)
        with pytest.raises(RuntimeError) as error:
            layer(tensor(*SHAPE))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "name", ["BatchNorm2d", "BatchNorm2d-evaluation", "GroupNorm", "LayerNorm"]
)
def test_few_samples(name, n):
    theirs, mine = both(LAYERS[name])
    same(theirs, mine, tensor(n, *SHAPE[1:]))
