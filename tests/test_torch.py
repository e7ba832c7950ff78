"""Layers for PyTorch against PyTorch's own, and as parts of models."""

import copy
import io
import pickle
import tracemalloc

import numpy as np
import pytest
from cases import assert_close, normal

import numbanorm

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")
theirs = torch.nn
NAMES = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d",
    "InstanceNorm3d", "LayerNorm", "GroupNorm", "RMSNorm", "SyncBatchNorm",
]  # fmt: skip


def case(name, *args, shapes, **options):
    label = ",".join([*map(str, args), *(f"{k}={v}" for k, v in options.items())])
    return [
        pytest.param(
            lambda m, **k: getattr(m, name)(*args, **options, **k),
            shape,
            id=f"{name}({label})-{'x'.join(map(str, shape))}".replace(" ", ""),
        )
        for shape in shapes
    ]


CASES = [
    *case("BatchNorm1d", 5, shapes=[(7, 5), (4, 5, 9), (2, 5, 1), (1, 5, 3)]),
    *case("BatchNorm1d", 5, affine=False, shapes=[(7, 5)]),
    *case("BatchNorm2d", 4, shapes=[(3, 4, 5, 6), (1, 4, 7, 7), (8, 4, 96, 32)]),
    *case("BatchNorm2d", 4, 0.1, 0.7, shapes=[(3, 4, 5, 6)]),
    *case("BatchNorm2d", 4, momentum=None, shapes=[(3, 4, 5, 6)]),
    *case("BatchNorm2d", 4, momentum=1.0, shapes=[(3, 4, 5, 6)]),
    *case("BatchNorm2d", 4, affine=False, shapes=[(3, 4, 5, 6), (1, 4, 5, 6)]),
    *case("BatchNorm2d", 4, track_running_stats=False, shapes=[(3, 4, 5, 6)]),
    *case("BatchNorm2d", 4, affine=False, track_running_stats=False, shapes=[(3, 4, 5, 6)]),
    *case("BatchNorm3d", 3, shapes=[(2, 3, 2, 4, 3)]),
    *case("SyncBatchNorm", 3, shapes=[(4, 3), (2, 3, 4), (2, 3, 4, 5)]),
    *case("InstanceNorm1d", 3, shapes=[(4, 3, 9), (3, 9)]),
    *case("InstanceNorm2d", 4, shapes=[(3, 4, 5, 6), (4, 5, 6)]),
    *case("InstanceNorm2d", 4, affine=True, shapes=[(3, 4, 5, 6), (4, 5, 6)]),
    *case("InstanceNorm2d", 4, track_running_stats=True, shapes=[(3, 4, 5, 6), (4, 5, 6)]),
    *case("InstanceNorm2d", 4, 0.1, 0.5, True, True, shapes=[(3, 4, 5, 6), (4, 5, 6)]),
    *case("InstanceNorm2d", 4, momentum=None, track_running_stats=True, shapes=[(3, 4, 5, 6)]),
    *case("InstanceNorm3d", 3, affine=True, shapes=[(2, 3, 2, 4, 3), (3, 2, 4, 3)]),
    *case("LayerNorm", 10, shapes=[(6, 10), (2, 3, 10), (10,), (2, 10, 3, 10)]),
    *case("LayerNorm", [4, 5], shapes=[(3, 4, 5), (2, 3, 4, 5)]),
    *case("LayerNorm", 10, bias=False, shapes=[(6, 10)]),
    *case("LayerNorm", 10, 0.1, False, shapes=[(6, 10)]),
    *case("GroupNorm", 2, 6, shapes=[(3, 6, 4, 5), (5, 6), (5, 6, 7)]),
    *case("GroupNorm", 1, 6, shapes=[(3, 6, 4, 5)]),
    *case("GroupNorm", 6, 6, shapes=[(3, 6, 4, 5)]),
    *case("GroupNorm", 3, 6, 1e-3, False, shapes=[(3, 6, 4, 5)]),
    *case("RMSNorm", 10, shapes=[(6, 10), (2, 3, 10)]),
    *case("RMSNorm", (4, 5), eps=0.01, shapes=[(3, 4, 5)]),
    *case("RMSNorm", 10, elementwise_affine=False, shapes=[(6, 10)]),
]
cases = pytest.mark.parametrize(("make", "shape"), CASES)
DTYPES = [torch.float32, torch.float64]


def both(make, dtype=torch.float64):
    """Make a layer of ours and of theirs in the same random state."""
    layer, reference = make(ours, dtype=dtype), make(theirs, dtype=dtype)
    return layer, share_random_state(layer, reference)


def share_random_state(layer, reference):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in reference.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif not name.endswith("num_batches_tracked"):
                value.normal_(generator=generator)
    layer.load_state_dict(reference.state_dict(), strict=True)
    return reference


def tensor(*shape, seed=0, dtype=torch.float64):
    return torch.tensor(normal(*shape, seed=seed)).to(dtype)


def compare(layer, reference, x, dy, scale=10):
    """Run both forward and backward; y, dx, parameters' gradients and buffers have to agree."""
    found, expected = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    y, expected_y = layer(found), reference(expected)
    y.backward(dy)
    expected_y.backward(dy)
    assert_close(y.detach(), expected_y.detach(), scale=scale, what="y")
    assert_close(found.grad, expected.grad, scale=scale, what="dx")
    for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
        if p.grad is None and q.grad is None:
            continue
        assert_close(p.grad, q.grad, scale=100, what=name)
    for (name, p), q in zip(layer.named_buffers(), reference.buffers(), strict=True):
        assert_close(p.to(x.dtype), q.to(x.dtype), scale=scale, what=name)
    return y, expected_y


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_and_evaluation(make, shape, dtype):
    layer, reference = both(make, dtype)
    for step, training in enumerate([True, True, True, False]):
        layer.train(training).zero_grad()
        reference.train(training).zero_grad()
        x, dy = (tensor(*shape, seed=2 * step + i, dtype=dtype) for i in (0, 1))
        compare(layer, reference, x, dy)


@cases
def test_is_a_layer_of_pytorch(make, shape):
    layer, reference = both(make)
    if isinstance(reference, theirs.SyncBatchNorm):
        # DistributedDataParallel refuses one on the CPU.
        assert not isinstance(layer, theirs.SyncBatchNorm)
        assert isinstance(layer, theirs.modules.batchnorm._BatchNorm)
    else:
        assert isinstance(layer, type(reference))
    assert repr(layer) == f"numbanorm.{reference!r}"
    assert list(layer.state_dict()) == list(reference.state_dict())
    layer(tensor(*shape))
    reference.load_state_dict(layer.state_dict(), strict=True)
    for name, value in reference.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name])


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_name_alone_are_new(name):
    mine, base = getattr(ours, name), getattr(theirs, name)
    changed = {key for key in dir(base) if getattr(mine, key) is not getattr(base, key)}
    changed = {key for key in changed if not key.startswith("__")}
    # A class method is made anew when it is looked up.
    assert changed - {"convert_sync_batchnorm"} == {"forward", "_get_name", "extra_repr"}


# -- Memory --------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2][..., : x.shape[3]],
    "every-other-sample": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch-last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1].expand(x.shape),
    "with-offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
LAYERS_2D = {
    "BatchNorm2d": lambda m: m.BatchNorm2d(4),
    "InstanceNorm2d": lambda m: m.InstanceNorm2d(4, affine=True),
    "GroupNorm": lambda m: m.GroupNorm(2, 4),
    "LayerNorm": lambda m: m.LayerNorm([5, 6]),
    "RMSNorm": lambda m: m.RMSNorm(6),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("make", LAYERS_2D.values(), ids=LAYERS_2D)
def test_layouts(make, layout):
    layer = make(ours).double()
    reference = share_random_state(layer, make(theirs).double())
    x = layout(tensor(3, 4, 5, 6))
    y, expected = compare(layer, reference, x, tensor(3, 4, 5, 6, seed=1))
    # dy in channels_last as well.
    dy = tensor(3, 4, 5, 6, seed=2).contiguous(memory_format=torch.channels_last)
    compare(layer, reference, x, dy)
    assert y.shape == expected.shape


@pytest.mark.parametrize("make", list(LAYERS_2D.values())[:3], ids=list(LAYERS_2D)[:3])
def test_channels_last_is_kept(make):
    x = tensor(3, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = make(ours).double()(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(tensor(3, 4, 5, 6))  # contiguous
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    x3 = tensor(2, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    y3 = ours.BatchNorm3d(4).double()(x3)
    assert y3.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "batch-last"])
def test_tensors_are_not_copied(layout):
    layer, x = ours.BatchNorm2d(4).double(), LAYOUTS[layout](tensor(16, 4, 30, 30))
    layer(x)
    # It sees what NumPy allocates, and not y itself, which is PyTorch's.
    tracemalloc.start()
    try:
        y = layer(x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 4
    assert y.stride() == x.stride()


def test_without_gradients_nothing_is_kept():
    layer, x = ours.BatchNorm2d(4), torch.rand(3, 4, 5, 6)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda t: t), torch.no_grad():
        y = layer(x)
    assert (y.grad_fn, packed) == (None, [])
    with torch.inference_mode():
        assert layer(x).grad_fn is None
    assert layer.requires_grad_(False)(x).grad_fn is None


def test_only_autograd_keeps_x():
    # In the graph x is one of the saved tensors, which autograd frees, offloads or recomputes.
    layer, x = ours.LayerNorm(6), torch.rand(3, 6, requires_grad=True)
    y = layer(x).sum()
    node = y.grad_fn.next_functions[0][0]
    y.backward()
    assert node.done[0].x is None
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_changing_x_before_backward_is_noticed():
    x = torch.rand(3, 4, 5, 6, requires_grad=True)
    z = x * 1
    y = ours.BatchNorm2d(4)(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    # As in PyTorch: weights and y may change, and backward goes on from what they were.
    layer = ours.BatchNorm2d(4).double()
    reference = share_random_state(layer, theirs.BatchNorm2d(4).double())
    x = tensor(3, 4, 5, 6).requires_grad_()
    y = layer(x)
    y.data.zero_()
    layer.eval()
    with torch.no_grad():
        layer.running_mean.add_(1)
    (dx,) = torch.autograd.grad(y, x, tensor(3, 4, 5, 6, seed=1))
    (expected,) = torch.autograd.grad(reference(x), x, tensor(3, 4, 5, 6, seed=1))
    assert_close(dx, expected, scale=10)


@pytest.mark.parametrize("name", ["BatchNorm2d", "SwitchableNorm2d"])
def test_autograd_is_told_that_running_statistics_move(name):
    layer = getattr(ours, name)(4)
    running = layer.running_mean, layer.running_var
    before = [t._version for t in running]
    layer(torch.rand(3, 4, 5, 6))
    assert all(t._version > version for t, version in zip(running, before, strict=True))


def test_retained_graph_and_partial_gradients():
    layer, x = ours.GroupNorm(2, 4).double(), tensor(3, 4, 5)
    y = layer(x.requires_grad_())
    dy = tensor(3, 4, 5, seed=1)
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    again = torch.autograd.grad(y, [layer.weight, x], dy)[1]
    assert torch.equal(first, again)
    # x is data: only the parameters have gradients.
    layer(x.detach()).backward(dy)
    assert x.grad is None and layer.weight.grad is not None


# -- What goes to PyTorch ------------------------------------------------------------------------


def test_autocast():
    model = theirs.Sequential(theirs.Conv2d(3, 4, 3), theirs.BatchNorm2d(4), theirs.ReLU())
    converted = ours.convert(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.rand(2, 3, 8, 8)
        assert torch.equal(converted(x), model(x))


@pytest.mark.parametrize("make", LAYERS_2D.values(), ids=LAYERS_2D)
def test_meta_tensors_go_to_pytorch(make):
    y = make(ours).to("meta")(torch.empty(3, 4, 5, 6, device="meta"))
    assert (y.shape, y.is_meta) == ((3, 4, 5, 6), True)


WRONG = {
    "one value per channel": (lambda m: m.BatchNorm1d(4), (1, 4)),
    "one value per channel, 2d": (lambda m: m.BatchNorm2d(4), (1, 4, 1, 1)),
    "one value per instance": (lambda m: m.InstanceNorm1d(4), (3, 4, 1)),
    "rank of BatchNorm": (lambda m: m.BatchNorm2d(4), (3, 4, 5)),
    "rank of InstanceNorm": (lambda m: m.InstanceNorm2d(4), (3, 4)),
    "channels of BatchNorm": (lambda m: m.BatchNorm2d(4), (3, 5, 2, 2)),
    "channels of InstanceNorm": (lambda m: m.InstanceNorm1d(4, affine=True), (3, 5, 2)),
    "channels of GroupNorm": (lambda m: m.GroupNorm(2, 4), (3, 6, 2)),
    "one value per group": (lambda m: m.GroupNorm(4, 4), (1, 4)),
    "sizes of LayerNorm": (lambda m: m.LayerNorm([4, 5]), (3, 5, 4)),
    "too few axes for LayerNorm": (lambda m: m.LayerNorm([4, 5]), (5,)),
    "sizes of RMSNorm": (lambda m: m.RMSNorm(4), (3, 5)),
}


@pytest.mark.parametrize(("make", "shape"), WRONG.values(), ids=WRONG)
def test_errors_are_those_of_pytorch(make, shape):
    x = torch.rand(shape)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        make(theirs)(x)
    with pytest.raises(type(expected.value)) as found:
        make(ours)(x)
    assert str(found.value) == str(expected.value)


EMPTY = [
    (lambda m: m.BatchNorm2d(4), (0, 4, 5, 5)),
    (lambda m: m.GroupNorm(2, 4), (0, 4, 5)),
    (lambda m: m.LayerNorm(5), (0, 5)),
    (lambda m: m.RMSNorm(5), (0, 5)),
    (lambda m: m.BatchNorm2d(4).eval(), (0, 4, 5, 5)),
]


@pytest.mark.parametrize(("make", "shape"), EMPTY)
def test_empty_tensors(make, shape):
    assert make(ours)(torch.rand(shape)).shape == make(theirs)(torch.rand(shape)).shape


def test_another_number_of_channels_without_parameters():
    # PyTorch only warns: nothing depends on the number.
    with pytest.warns(UserWarning, match="does not match num_features"):
        y = ours.InstanceNorm1d(4)(torch.rand(2, 3, 5))
    assert y.shape == (2, 3, 5)


def test_layers_follow_a_change_of_type_and_mode():
    layer = ours.BatchNorm2d(4).double()
    reference = share_random_state(layer, theirs.BatchNorm2d(4).double())
    layer.float(), reference.float()
    layer.track_running_stats = reference.track_running_stats = False
    compare(layer, reference, *(tensor(3, 4, 5, 6, seed=s, dtype=torch.float32) for s in (0, 1)))
    layer.track_running_stats = reference.track_running_stats = True
    layer.momentum = reference.momentum = 0.5
    compare(layer, reference, *(tensor(3, 4, 5, 6, seed=s, dtype=torch.float32) for s in (2, 3)))


def test_large_offsets():
    # PyTorch's own is off by 1e-3 in float32 here.
    x = tensor(4, 3, 16, 16) + 1e4
    expected = theirs.BatchNorm2d(3).double()(x.float().double())
    assert_close(ours.BatchNorm2d(3)(x.float()).detach(), expected.detach(), scale=10)


# -- Whole models --------------------------------------------------------------------------------


class Own(theirs.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return x


class Branches(theirs.Module):
    def __init__(self):
        super().__init__()
        self.stem = theirs.Sequential(theirs.Conv2d(3, 4, 3), theirs.BatchNorm2d(4))
        self.shared = theirs.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.branches = theirs.ModuleDict({"a": self.shared, "b": theirs.GroupNorm(2, 4)})
        self.own = Own(4)
        self.last = theirs.Sequential(theirs.LayerNorm(6), theirs.RMSNorm(6))

    def forward(self, x):
        x = self.stem(x)
        x = self.shared(x) + self.branches["a"](x) + self.branches["b"](x)
        return self.last(self.own(x))


def test_convert(capfd):
    model = Branches().double()
    share_random_state(Branches().double(), model)
    reference = copy.deepcopy(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    calls = []
    model.stem[1].register_forward_hook(lambda *_: calls.append("hook"))
    model.stem[1].eval()
    assert ours.convert(model) is model
    assert capfd.readouterr() == ("", "")

    classes = [type(layer) for layer in model.modules() if type(layer).__module__ == ours.__name__]
    assert classes == [
        ours.BatchNorm2d, ours.InstanceNorm2d, ours.GroupNorm, ours.LayerNorm, ours.RMSNorm,
    ]  # fmt: skip
    assert type(model.own) is Own
    assert model.branches["a"] is model.shared
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert [model.stem[1].training, model.shared.training] == [False, True]

    model.train()
    compare(model, reference, *(tensor(2, 3, 8, 8, seed=0), tensor(2, 4, 6, 6, seed=1)), scale=100)
    assert calls == ["hook"]
    before = model.stem[1].weight.detach().clone()
    optimiser.step()
    assert not torch.equal(before, model.stem[1].weight)
    ours.convert(model)  # once more does no harm
    assert type(model.stem[1]) is ours.BatchNorm2d


@pytest.mark.parametrize("name", NAMES)
def test_convert_a_single_layer(name):
    args = {"LayerNorm": [6], "GroupNorm": [2, 6], "RMSNorm": [6]}.get(name, [6])
    layer = getattr(theirs, name)(*args)
    assert ours.convert(layer) is layer
    assert type(layer) is getattr(ours, name)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lazy_layers(when):
    model = theirs.Sequential(
        theirs.LazyConv2d(4, 3), theirs.LazyBatchNorm2d(), theirs.LazyInstanceNorm2d(affine=True)
    )
    x = torch.rand(2, 3, 8, 8)
    if when == "before":
        ours.convert(model)
    model(x)
    if when == "after":
        ours.convert(model)
    assert [type(layer) for layer in model[1:]] == [ours.BatchNorm2d, ours.InstanceNorm2d]
    assert model[1].weight.shape == (4,)
    assert model(x).shape == (2, 4, 6, 6)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(saved(m), weights_only=False),
}


def saved(what):
    buffer = io.BytesIO()
    torch.save(what, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies(make_copy):
    model = ours.convert(Branches())
    model(torch.rand(2, 3, 8, 8))
    again = make_copy(model)
    assert type(again.stem[1]) is ours.BatchNorm2d
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(x), model(x))
    assert again.stem[1].weight is not model.stem[1].weight


def test_state_dicts_go_both_ways():
    converted, plain = ours.convert(Branches()), Branches()
    converted(torch.rand(2, 3, 8, 8))
    plain.load_state_dict(torch.load(saved(converted.state_dict())), strict=True)
    ours.convert(Branches()).load_state_dict(plain.state_dict(), strict=True)
    x = torch.rand(2, 3, 8, 8)
    assert_close(converted.eval()(x).detach(), plain.eval()(x).detach(), scale=10)


def test_fuse_with_convolution():
    conv, norm = theirs.Conv2d(3, 4, 3).eval(), ours.BatchNorm2d(4)
    norm(torch.rand(5, 4, 6, 6))
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm.eval())
    x = torch.rand(2, 3, 8, 8)
    assert_close(fused(x).detach(), norm(conv(x)).detach(), scale=10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = ours.convert(Branches()).double()
    reference = copy.deepcopy(model)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

    x = tensor(2, 3, 8, 8)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    checkpointed(found).pow(2).sum().backward()
    reference(expected).pow(2).sum().backward()
    assert torch.equal(found.grad, expected.grad)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.grad is q.grad or torch.equal(p.grad, q.grad)


def test_saved_tensors_may_be_moved():
    layer, x = ours.BatchNorm2d(4).double(), tensor(3, 4, 5, 6)
    reference = share_random_state(layer, theirs.BatchNorm2d(4).double())
    with torch.autograd.graph.save_on_cpu():
        compare(layer, reference, x, tensor(3, 4, 5, 6, seed=1))


def test_weight_decay_filters_still_find_norms():
    norms = (theirs.modules.batchnorm._BatchNorm, theirs.LayerNorm, theirs.GroupNorm)
    model = ours.convert(Branches())
    assert sum(isinstance(layer, norms) for layer in model.modules()) == 4


# -- recalibrate ---------------------------------------------------------------------------------


TRACKING = {
    "BatchNorm2d": lambda: ours.BatchNorm2d(4),
    "cumulative": lambda: ours.BatchNorm2d(4, momentum=None, affine=False),
    "InstanceNorm2d": lambda: ours.InstanceNorm2d(4, track_running_stats=True),
    "SyncBatchNorm": lambda: ours.convert(theirs.SyncBatchNorm(4)),
    "SwitchableNorm2d": lambda: ours.SwitchableNorm2d(4),
}


@pytest.mark.parametrize("make", TRACKING.values(), ids=TRACKING)
def test_recalibrate(make):
    layer = make().double().eval()
    batches = [tensor(n, 4, 5, 6, seed=n) for n in (3, 1, 4)]
    numbanorm.recalibrate(layer, iter(batches), [layer])
    x = torch.cat(batches)
    axes = (2, 3) if isinstance(layer, theirs.InstanceNorm2d) else (0, 2, 3)
    mean, var = x.mean(axes), x.var(axes)
    if mean.dim() == 2:
        mean, var = mean.mean(0), var.mean(0)
    assert_close(layer.running_mean, mean, scale=1)
    assert_close(layer.running_var, var, scale=1)
    assert (int(layer.num_batches_tracked), layer.training) == (3, False)
    assert layer._pool is None


def test_recalibrate_leaves_layers_alone_after_an_error():
    layer = ours.BatchNorm2d(4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match="recalibrate"):
        other = torch.rand(3, 4, 5, 5).to(torch.complex64)
        numbanorm.recalibrate(layer, [torch.rand(3, 4, 5, 5), other], [layer])
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(TypeError, match="running statistics"):
        numbanorm.recalibrate(layer, [], [ours.BatchNorm2d(4, track_running_stats=False)])


def test_folding_takes_layers_of_pytorch():
    norm = ours.BatchNorm2d(2).eval()
    weight, _ = numbanorm.fold_conv(np.ones((2, 1, 3, 3), np.float32), None, norm)
    assert_close(weight, np.full((2, 1, 3, 3), 1 / np.sqrt(1 + 1e-5)), scale=1)
