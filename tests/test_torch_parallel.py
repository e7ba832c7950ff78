"""Models that PyTorch spreads over processes: converted, they train as they did."""

from datetime import timedelta

import pytest
from cases import assert_close, normal

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")

nn, dist = torch.nn, torch.distributed


def process(rank, folder):
    """Run all scenarios as one of two processes, and save what each returns."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(minutes=5), rank=rank, world_size=2
    )
    for scenario in SCENARIOS:
        torch.save(scenario(rank), f"{folder}/{scenario.__name__}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run two processes, once for all tests; return what a scenario returned in each."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is not available")
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return lambda scenario: [torch.load(folder / f"{scenario.__name__}-{k}") for k in range(2)]


def tensor(*shape, seed=0):
    return torch.tensor(normal(*shape, seed=seed))


# -- Sharded weights -----------------------------------------------------------------------------


def shard_1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def shard_2(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_1(rank):
    return sharded(rank, shard_1)


def fsdp_2(rank):
    return sharded(rank, shard_2)


def sharded(rank, shard):
    """Return dx and the loss of some steps, by PyTorch's layers and by ours."""
    found = []
    for convert in (lambda model: model, ours.convert):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.Sigmoid(), nn.Linear(8, 8), nn.BatchNorm1d(8),
            nn.RMSNorm(8), nn.GroupNorm(2, 8), nn.Unflatten(1, (2, 4)),
            nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        ).double()  # fmt: skip
        model, steps = shard(convert(model)), []
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            x = tensor(5, 6, seed=2 * step + rank).requires_grad_()
            loss = (model(x) * tensor(5, 2, 4, seed=9)).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += [x.grad, loss.detach()]
        found.append(steps)
    return found


@pytest.mark.parametrize("scenario", [fsdp_1, fsdp_2])
def test_sharded_weights(results, scenario):
    for expected, found in results(scenario):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, scale=100)


# -- SyncBatchNorm in DistributedDataParallel ----------------------------------------------------

SIZES = {"unequal": (5, 2), "one is empty": (4, 0), "autocast": (4, 4)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4),
    )  # fmt: skip


def before(model):
    """Convert, and then let PyTorch make layers of its own of ours."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(ours.convert(model))
    assert any(type(layer) is nn.SyncBatchNorm for layer in model)
    return ours.convert(model)


def after(model):
    return ours.convert(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def train(model, x, autocast):
    """Return the gradients of a loss that is a sum over samples, y and running statistics."""
    model = model if autocast else model.double()
    x = (x.float() if autocast else x).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.double() ** 3).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters()}
    found |= dict(model.named_buffers())
    return {name.removeprefix("module."): t.clone() for name, t in found.items()}


def ddp(rank):
    """Return what two processes make of their share of a batch."""
    found = {}
    for name, sizes in SIZES.items():
        for convert in (before, after):
            x = tensor(sum(sizes), 3, 9, 9).split(sizes)[rank]
            autocast = name == "autocast"
            model = convert(network() if autocast else network().double())
            model = nn.parallel.DistributedDataParallel(model)
            found[name, convert.__name__] = train(model, x.clone(), autocast)
    return found


def all_empty(rank):
    """Return what a step without any sample leaves, and a step after it."""
    model = nn.parallel.DistributedDataParallel(after(network().double()))
    empty = train(model, tensor(0, 3, 9, 9), False)
    model.zero_grad()
    return empty, train(model, tensor(2, 3, 9, 9, seed=rank), False)


class Stop(torch.autograd.Function):
    """Nothing comes back from here."""

    forward = staticmethod(lambda ctx, y: y.clone())
    backward = staticmethod(lambda ctx, dy: None)


def no_gradient(rank):
    """Return dx where no gradient comes to the layer in one process."""
    x = tensor(4, 3).split(2)[rank].requires_grad_()
    y = ours.SyncBatchNorm(3).double()(x)
    ((y if rank == 0 else Stop.apply(y)) ** 3).sum().backward()
    return x.grad


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SIZES)
def test_sync_batch_norm(results, name, when):
    sizes, autocast = SIZES[name], name == "autocast"
    model = ours.convert(network() if autocast else network().double())
    expected = train(model, tensor(sum(sizes), 3, 9, 9), autocast)
    found = [result[name, when] for result in results(ddp)]
    rounding = 2**-6 if autocast else 1e-12
    for key, value in expected.items():
        whole = torch.cat([each[key] for each in found]) if key in ("y", "dx") else found[0][key]
        if "weight" in key or "bias" in key:
            value = value / 2  # it takes the mean of the gradients of processes
        assert whole.dtype == value.dtype
        close = torch.testing.assert_close
        scale = value.abs().max().item()
        close(whole.double(), value.double(), rtol=0, atol=rounding * max(scale, 1))
        if key not in ("y", "dx"):
            assert torch.equal(found[0][key], found[1][key])


def test_no_sample_at_all(results):
    for rank, (empty, step) in enumerate(results(all_empty)):
        assert empty["y"].shape == (0, 4, 5, 5)
        for layer in ("1", "4"):
            assert not empty[f"{layer}.weight"].any()
            assert empty[f"{layer}.num_batches_tracked"] == 0
            assert empty[f"{layer}.running_mean"].eq(0).all()
            assert empty[f"{layer}.running_var"].eq(1).all()
            assert step[f"{layer}.num_batches_tracked"] == 1
        whole = torch.cat([tensor(2, 3, 9, 9, seed=k) for k in range(2)])
        expected = train(ours.convert(network().double()), whole, False)
        assert_close(step["y"], expected["y"][2 * rank :][:2], scale=100)


def masked_batch():
    """Return x, a mask of it, and dy; two channels have nothing in one process, or in both."""
    mask = tensor(5, 4, 6, seed=1) > 0
    mask[:2, 1] = mask[:, 2] = False
    return tensor(5, 4, 6), mask, tensor(5, 4, 6, seed=2)


def masked(rank):
    """Return y, dx and what is in a layer after a step with a mask."""
    x, mask, dy = (t.split((2, 3))[rank] for t in masked_batch())
    return masked_step(ours.SyncBatchNorm(4), x, mask, dy)


def masked_step(layer, x, mask, dy):
    layer, x = layer.double(), x.clone().requires_grad_()
    y = layer(x, mask=mask)
    y.backward(dy)
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()]


def test_masks(results):
    expected = masked_step(ours.BatchNorm1d(4), *masked_batch())
    first, second = results(masked)
    for k, value in enumerate(expected):
        found = torch.cat([first[k], second[k]]) if k < 2 else first[k]
        if k in (2, 3):  # the gradients of parameters are those of a process's own samples
            found = found + second[k]
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)


def test_other_processes_do_not_wait_for_a_gradient(results):
    x = tensor(4, 3).requires_grad_()
    y = ours.BatchNorm1d(3).double()(x)
    (y[:2] ** 3).sum().backward()
    assert_close(torch.cat(results(no_gradient)), x.grad, scale=100)


SCENARIOS = [fsdp_1, fsdp_2, ddp, all_empty, no_gradient, masked]
