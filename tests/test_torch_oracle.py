"""PyTorch as a second oracle: it knows neither this library nor its reference."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
from cases import assert_close, by_id, normal

import numbanorm as nn

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
T = torch.nn


def row(name, make, *shapes):
    return [pytest.param(make, s, id=f"{name}-{'x'.join(map(str, s))}") for s in shapes]


# Arguments that both take alike: m is either of the two modules.
PAIRS = [
    *row("BatchNorm1d", lambda m, **k: m.BatchNorm1d(5, **k), (7, 5), (4, 5, 9), (2, 5, 1)),
    *row("BatchNorm2d", lambda m, **k: m.BatchNorm2d(4, **k), (3, 4, 5, 6), (1, 4, 7, 7)),
    *row("BatchNorm3d", lambda m, **k: m.BatchNorm3d(3, **k), (2, 3, 2, 4, 3)),
    *row("BatchNorm2d-eps", lambda m, **k: m.BatchNorm2d(4, 0.1, 0.7, **k), (3, 4, 5, 6)),
    *row("BatchNorm2d-cumulative", lambda m, **k: m.BatchNorm2d(4, momentum=None, **k),
         (3, 4, 5, 6)),
    *row("BatchNorm2d-plain", lambda m, **k: m.BatchNorm2d(4, affine=False, **k), (3, 4, 5, 6)),
    *row("BatchNorm2d-untracked", lambda m, **k: m.BatchNorm2d(4, track_running_stats=False, **k),
         (3, 4, 5, 6)),
    *row("BatchNorm2d-plain-untracked",
         lambda m, **k: m.BatchNorm2d(4, affine=False, track_running_stats=False, **k),
         (3, 4, 5, 6)),
    *row("InstanceNorm1d", lambda m, **k: m.InstanceNorm1d(3, **k), (4, 3, 9), (3, 9)),
    *row("InstanceNorm2d", lambda m, **k: m.InstanceNorm2d(4, **k), (3, 4, 5, 6), (4, 5, 6)),
    *row("InstanceNorm2d-affine", lambda m, **k: m.InstanceNorm2d(4, affine=True, **k),
         (3, 4, 5, 6)),
    *row("InstanceNorm2d-tracking",
         lambda m, **k: m.InstanceNorm2d(4, affine=True, track_running_stats=True, **k),
         (3, 4, 5, 6), (4, 5, 6)),
    *row("InstanceNorm2d-tracking-plain",
         lambda m, **k: m.InstanceNorm2d(4, momentum=0.5, track_running_stats=True, **k),
         (3, 4, 5, 6)),
    *row("InstanceNorm3d", lambda m, **k: m.InstanceNorm3d(3, affine=True, **k),
         (2, 3, 2, 4, 3), (3, 2, 4, 3)),
    *row("LayerNorm", lambda m, **k: m.LayerNorm(10, **k), (6, 10), (2, 3, 10), (10,)),
    *row("LayerNorm-axes", lambda m, **k: m.LayerNorm([4, 5], **k), (3, 4, 5), (2, 3, 4, 5)),
    *row("LayerNorm-scale", lambda m, **k: m.LayerNorm(10, bias=False, **k), (6, 10)),
    *row("LayerNorm-plain", lambda m, **k: m.LayerNorm(10, 0.1, False, **k), (6, 10)),
    *row("GroupNorm", lambda m, **k: m.GroupNorm(2, 6, **k), (3, 6, 4, 5), (5, 6), (5, 6, 7)),
    *row("GroupNorm-1", lambda m, **k: m.GroupNorm(1, 6, **k), (3, 6, 4, 5)),
    *row("GroupNorm-C", lambda m, **k: m.GroupNorm(6, 6, **k), (3, 6, 4, 5)),
    *row("GroupNorm-plain", lambda m, **k: m.GroupNorm(3, 6, 1e-3, False, **k), (3, 6, 4, 5)),
    *row("RMSNorm", lambda m, **k: m.RMSNorm(10, **k), (6, 10), (2, 3, 10)),
    *row("RMSNorm-axes", lambda m, **k: m.RMSNorm((4, 5), eps=0.01, **k), (3, 4, 5)),
    *row("RMSNorm-plain", lambda m, **k: m.RMSNorm(10, elementwise_affine=False, **k), (6, 10)),
]  # fmt: skip
pairs = pytest.mark.parametrize(("make", "shape"), PAIRS)


def both(make, dtype=np.float64):
    """Make a layer of ours and of theirs, with the same random state, by their state dict."""
    ours = make(nn, dtype=dtype)
    theirs = make(T, dtype=getattr(torch, np.dtype(dtype).name))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if name == "running_var":
                value.uniform_(0.5, 2, generator=generator)
            elif name != "num_batches_tracked":
                value.normal_(generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pairs
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_training_and_evaluation(make, shape, dtype):
    ours, theirs = both(make, dtype)
    for step, training in enumerate([True, True, False]):
        x, dy = (normal(*shape, seed=2 * step + i, dtype=dtype) for i in (0, 1))
        ours.train(training).zero_grad()
        theirs.train(training).zero_grad()
        t = torch.tensor(x, requires_grad=True)
        expected = theirs(t)
        expected.backward(torch.tensor(dy))
        # Where the two differ it is by the rounding of either; a weight sums less than 100 terms.
        assert_close(ours(x), expected.detach().numpy(), scale=10, what="y")
        assert_close(ours.backward(dy), t.grad.numpy(), scale=10, what="dx")
        for name, value in ours.gradients().items():
            assert_close(value, getattr(theirs, name).grad.numpy(), scale=10, what=name)
        for name, value in theirs.state_dict().items():
            if name == "num_batches_tracked" and isinstance(ours, nn.InstanceNorm):
                continue  # PyTorch's InstanceNorm has a counter, and leaves it at 0
            # The counter as well: far from a rounding error, and of the same shape.
            got = ours.state_dict()[name].astype(dtype)
            assert_close(got, value.numpy(), scale=1, what=name)


@pairs
def test_state_dicts_load_both_ways(make, shape):
    ours, theirs = both(make, np.float32)
    ours(normal(*shape, dtype=np.float32))
    mine = ours.state_dict()
    assert list(mine) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert mine[name].shape == tuple(value.shape)
        assert mine[name].dtype == value.numpy().dtype
    theirs.load_state_dict({k: torch.as_tensor(np.array(v)) for k, v in mine.items()}, strict=True)
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), mine[name])


@pairs
def test_repr(make, shape):
    # Newer versions of PyTorch print `bias` as well, after `affine` or at the end.
    theirs = re.sub(r", bias=(True|False)", "", repr(make(T)))
    if "bias=False" not in repr(make(nn)):
        assert repr(make(nn)) == theirs


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_channels_last_tensors_are_transposed_arrays(rank):
    make = [None, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][rank]
    x = torch.tensor(normal(3, 4, *range(5, 5 + rank), dtype=np.float32))
    if rank == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    theirs = getattr(T, make.__name__)(4)
    assert_close(make(4)(x.numpy()), theirs(x).detach().numpy(), scale=1)


# -- SwitchableNorm, written plainly -------------------------------------------------------------


def statistics(kind, x, groups):
    """Give mean and biased variance of x (N, C, ...), in a shape that broadcasts to it."""
    space = tuple(range(2, x.ndim))
    if kind == "gn":
        n, c = x.shape[:2]
        split = x.reshape(n, groups, -1)
        mean, var = split.mean(-1), split.var(-1, correction=0)
        shape = (n, c, *[1] * len(space))
        return [v.repeat_interleave(c // groups, 1).reshape(shape) for v in (mean, var)]
    axes = {"in": space, "ln": (1, *space), "bn": (0, *space)}[kind]
    return x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)


def plain_switchable(x, p, over, groups, running=None):
    mean, var = 0, 0
    weights = torch.softmax(p["mean_weight"], 0), torch.softmax(p["var_weight"], 0)
    column = (1, -1, *[1] * (x.ndim - 2))
    for k, kind in enumerate(over):
        if kind == "bn" and running:
            m, v = (torch.tensor(f).reshape(column) for f in running)
        else:
            m, v = statistics(kind, x, groups)
        mean, var = mean + weights[0][k] * m, var + weights[1][k] * v
    y = (x - mean) / torch.sqrt(var + 1e-5)
    return y * p["weight"].reshape(column) + p["bias"].reshape(column)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "over",
    [("in", "ln", "bn"), ("bn", "ln"), ("gn", "bn", "in", "ln"), ("in",), ("ln",), ("bn",),
     ("gn",), ("gn", "ln"), ("in", "bn")],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 7), (2, 4, 3, 2, 5)], ids=str)
def test_switchable(over, shape, training):
    groups = {"num_groups": 2} if "gn" in over else {}
    ours = nn.SwitchableNorm(4, over=over, dtype=np.float64, **groups).train(training)
    for seed, p in enumerate(ours.parameters().values()):
        p[...] = normal(*p.shape, seed=seed)
    running = None
    if "bn" in over and not training:
        ours.running_mean[...], ours.running_var[...] = [0.1, 0.2, -1, 3], [0.5, 1, 2, 3]
        running = ours.running_mean, ours.running_var
    x, dy = normal(*shape), normal(*shape, seed=1)
    t = torch.tensor(x, requires_grad=True)
    p = {k: torch.tensor(v, requires_grad=True) for k, v in ours.parameters().items()}
    expected = plain_switchable(t, p, over, 2, running)
    expected.backward(torch.tensor(dy))
    assert_close(ours(x), expected.detach().numpy(), scale=10)
    assert_close(ours.backward(dy), t.grad.numpy(), scale=10)
    for name, value in ours.gradients().items():
        assert_close(value, p[name].grad.numpy(), scale=100, what=name)


# -- the first oracle, against the second --------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "case"),
    [
        (lambda: T.BatchNorm2d(4), "BatchNorm2d"),
        (lambda: T.InstanceNorm2d(4, affine=True, track_running_stats=True),
         "InstanceNorm2d-tracking"),
        (lambda: T.GroupNorm(2, 6), "GroupNorm"),
        (lambda: T.LayerNorm([2, 4, 5]), "LayerNorm-3axes"),
        (lambda: T.RMSNorm(10), "RMSNorm"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_reference(make, case, training):
    theirs, case = make().double().train(training), by_id[case]
    with torch.no_grad():
        for seed, p in enumerate(theirs.parameters()):
            p += torch.tensor(normal(*p.shape, seed=seed))
        if case.tracked is not None:
            theirs.running_mean += 0.3
            theirs.running_var *= 1.7
    # What Case.naive asks of a layer, with PyTorch's numbers.
    names = "weight", "bias", "running_mean", "running_var"
    state = {k: v.numpy().copy() for k, v in theirs.state_dict().items()}
    layer = SimpleNamespace(training=training, **{k: state.get(k) for k in names})
    x, dy = case.input(), normal(*case.shape, seed=1)
    naive = case.naive(layer, x)
    t = torch.tensor(x, requires_grad=True)
    y = theirs(t)
    y.backward(torch.tensor(dy))
    assert_close(y.detach().numpy(), naive.y, scale=10)
    gradients = naive.backward(dy)
    assert_close(t.grad.numpy(), gradients.pop("dx"), scale=10)
    for name, value in gradients.items():
        assert_close(getattr(theirs, name).grad.numpy(), value, scale=10)
    if case.tracked is not None and training:
        expected = ref.track(layer.running_mean, layer.running_var, naive, case.tracked)
        assert_close(theirs.running_mean.numpy(), expected[0], scale=1)
        assert_close(theirs.running_var.numpy(), expected[1], scale=1)
