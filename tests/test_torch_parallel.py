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


SCENARIOS = [fsdp_1, fsdp_2]
