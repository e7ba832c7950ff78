"""A layer remembers how its last x was normalised: whatever has changed since is seen."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

import numbanorm.torch as ours  # noqa: E402
from numbanorm.tuning import use  # noqa: E402

LAYERS = {
    "BatchNorm2d": (torch.nn.BatchNorm2d, (4,)),
    "InstanceNorm2d": (torch.nn.InstanceNorm2d, (4, 1e-5, 0.1, True, True)),
    "LayerNorm": (torch.nn.LayerNorm, (4,)),
    "GroupNorm": (torch.nn.GroupNorm, (2, 4)),
    "RMSNorm": (torch.nn.RMSNorm, (4,)),
}


@pytest.fixture(params=LAYERS)
def pair(request):
    """Return a layer of PyTorch's and the same converted, both with a first forward behind them."""
    torch.manual_seed(0)
    kind, args = LAYERS[request.param]
    theirs = kind(*args)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.rand(p.shape) + 0.5)
    layer = ours.convert(copy.deepcopy(theirs))
    for _ in range(2):
        check((theirs, layer))
    return theirs, layer


def data(dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(3, 4, 4, 4)).to(dtype)


def check(pair, x=None, tolerance=1e-5):
    """Compare both passes and running statistics of both layers."""
    x = data() if x is None else x
    dy = torch.randn(x.shape).to(x.dtype)
    found = []
    for layer in pair:
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        found.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
        found[-1] += [b.clone() for b in layer.buffers()]
        layer.zero_grad()
    for one, other in zip(*found, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def remembers(layer):
    return layer._memo is not None


def test_it_is_remembered(pair):
    assert remembers(pair[1])


def both(pair, change):
    for layer in pair:
        change(layer)
    check(pair)
    check(pair)


def test_a_setting(pair):
    def change(layer):
        layer.eps = 0.5

    both(pair, change)


def test_the_mode(pair):
    for mode in (False, True, False):
        both(pair, lambda layer, mode=mode: layer.train(mode))


def test_momentum(pair):
    def change(layer):
        if hasattr(layer, "momentum"):
            layer.momentum = 0.5

    both(pair, change)


@torch.no_grad()
def set_values(layer):
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(2).add_(0.25)


def test_values_of_parameters_and_buffers(pair):
    both(pair, set_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_16_bits(pair, dtype):
    for layer in pair:
        layer.to(dtype)
    for mode in (True, False):
        for layer in pair:
            layer.train(mode)
        for _ in range(3):
            check(pair, data(dtype), tolerance=0.1)
            with torch.no_grad():
                for layer in pair:
                    for parameter in layer.parameters():
                        parameter.neg_()
                    for name, buffer in layer.named_buffers():
                        if name == "running_mean":
                            buffer.add_(1)


def test_a_parameter_where_there_was_none():
    theirs = torch.nn.LayerNorm(4, bias=False)
    pair = theirs, ours.convert(copy.deepcopy(theirs))
    check(pair)
    assert remembers(pair[1])
    bias = torch.rand(4)
    both(pair, lambda layer: layer.register_parameter("bias", torch.nn.Parameter(bias.clone())))


def test_another_tuning(pair):
    x = data()
    with use(parallel_from=0) as in_force:
        check(pair, x)
        assert pair[1]._memo.call.plan.recipe.layout.tuning is in_force


def test_a_new_parameter(pair):
    weight = torch.rand(4)

    def change(layer):
        layer.weight = torch.nn.Parameter(weight.clone())

    both(pair, change)


def test_other_memory_of_a_parameter(pair):
    weight = torch.rand(4)

    def change(layer):
        layer.weight.data = weight.clone()

    both(pair, change)


def test_a_parameter_whose_elements_are_apart_in_the_same_memory(pair):
    def change(layer):
        layer.weight.data = storage[::2]

    storage = torch.arange(8.0) + 1
    for layer in pair:
        layer.weight.data = storage[:4]
    check(pair)
    assert remembers(pair[1])
    both(pair, change)


def test_a_parameter_set_behind_the_layer_s_back(pair):
    weight = torch.rand(4)

    def change(layer):
        layer._parameters["weight"] = torch.nn.Parameter(weight.clone())

    both(pair, change)


def test_running_statistics_set_behind_the_layer_s_back(pair):
    def change(layer):
        if layer._buffers.get("running_mean") is not None:
            layer._buffers["running_mean"] = torch.full((4,), 3.0)

    both(pair, change)
    both(pair, lambda layer: layer.eval())


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_another_type(pair):
    for layer in pair:
        layer.double()
    check(pair, data(torch.float64))
    found = []
    for layer in pair:
        try:
            found.append(layer(data()).dtype)
        except (RuntimeError, ValueError, TypeError) as error:
            found.append(type(error))
    assert found[0] is found[1]


def test_a_parameter_that_is_negative_of_its_memory(pair):
    minus = torch._neg_view(torch.rand(4) + 1)

    def change(layer):
        layer.weight.data = minus

    both(pair, change)


def test_an_x_that_is_negative_of_its_memory(pair):
    check(pair, torch._neg_view(data()))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: torch.cat((x, x), 1)[:, ::2],
        lambda x: x[:2],
        lambda x: x[..., :0],
    ],
    ids=["last", "transposed", "apart", "smaller", "empty"],
)
def test_another_x(pair, other):
    for change in (other, lambda x: x, other):
        x = data()
        try:
            y = pair[0](change(x))
        except (RuntimeError, ValueError):
            with pytest.raises((RuntimeError, ValueError)):
                pair[1](change(x))
            continue
        torch.testing.assert_close(pair[1](change(x)), y, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode(pair):
    x, tangent = data(), data()
    found = [torch.func.jvp(layer.eval(), (x,), (tangent,))[1] for layer in pair]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_parameters_of_a_functional_call(pair):
    state = {name: torch.rand(t.shape) + 1 for name, t in pair[0].named_parameters()}
    x = data()
    found = [torch.func.functional_call(layer.eval(), state, (x,)) for layer in pair]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    both(pair, lambda layer: None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_has_operators_of_pytorch_s(pair):
    traced = torch.jit.trace(pair[1].eval(), data())
    assert not any("numbanorm" in node.kind() for node in traced.inlined_graph.nodes())


def test_a_subclass_of_tensor(pair):
    class Other(torch.Tensor):
        pass

    x = data().as_subclass(Other)
    assert type(pair[1](x)) is type(pair[0](x))


def test_copies_and_pickles_remember_nothing(pair):
    for made in (copy.deepcopy(pair[1]), pickle.loads(pickle.dumps(pair[1]))):
        assert not remembers(made)
        check((pair[0], made))
        pair[0].load_state_dict(pair[1].state_dict())
    shallow = copy.copy(pair[1])
    shallow.eps = 0.5
    x = data()
    assert not torch.equal(shallow.eval()(x), pair[1].eval()(x))


def test_nothing_is_left_in_a_reverted_layer(pair):
    kind = type(pair[0])
    layer = ours.revert(pair[1])
    assert type(layer) is kind and vars(layer).keys() == vars(pair[0]).keys()


def test_hooks(pair):
    seen, layer = [], pair[1]
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    check(pair)
    assert seen == [(3, 4, 4, 4)]


def test_activation(pair):
    layer = pair[1]
    x = data()
    plain = layer.eval()(x)
    layer.activation = "relu"
    torch.testing.assert_close(layer(x), plain.clamp(min=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x), plain.clamp(min=0), rtol=1e-6, atol=1e-6)
