"""SyncBatchNorm in several real processes, and layers in the workers of a DataLoader."""

import importlib.metadata
import os
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import test_launch
from cases import assert_close, normal
from children import run

import numbanorm
from numbanorm.numba_ext import launch
from numbanorm.numba_ext import threads as _threads
from numbanorm.tuning import use

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")
from numbanorm.torch import private  # noqa: E402

# -- SyncBatchNorm -------------------------------------------------------------------------------

# Samples of each process: all differ, and one has none.
SIZES = {"two": (3, 1), "three": (2, 1, 4), "one-is-empty": (3, 0, 2)}
SCENARIOS = ["network", "large-offset", *SIZES]


def network():
    torch.manual_seed(0)
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6, affine=False),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(100, 5),
        nn.BatchNorm1d(5, track_running_stats=False),
    ).double()  # fmt: skip


def layer():
    return torch.nn.BatchNorm2d(3, momentum=0.3).double()


def whole_batch(scenario):
    """Return a model, and the batch of all processes with dy, to be split into SIZES."""
    if scenario in ("network", "large-offset"):
        sizes = (2, 1, 4)
        x = torch.tensor(normal(7, 3, 9, 9) + (1e6 if scenario == "large-offset" else 0))
        if scenario == "large-offset":
            return layer(), sizes, x, torch.tensor(normal(7, 3, 9, 9, seed=1))
        return network(), sizes, x, torch.tensor(normal(7, 5, seed=1))
    sizes = SIZES[scenario]
    x, dy = (torch.tensor(normal(sum(sizes), 3, 4, 5, seed=seed)) for seed in (0, 1))
    return layer(), sizes, x, dy


def results(model, x, dy):
    """Run two training steps, then evaluation where it does not depend on the batch."""
    found = {}
    for step in range(2):
        x = (x + step).detach().requires_grad_()
        y = model(x)
        y.backward(dy)
        found |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
    if not isinstance(model, torch.nn.Sequential):
        found["evaluation"] = model.eval()(x).detach()
    return found


def process(rank, folder):
    """Run all scenarios as one of three processes, and save what comes out."""
    torch.set_num_threads(1)
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    # Every process has to know of every group, its own or not.
    pair = dist.new_group([0, 1])
    for scenario in SCENARIOS:
        found = of_process(scenario, rank, pair)
        torch.save(found, f"{folder}/{scenario}-{rank}")
    errors(rank, f"{folder}/errors-{rank}")
    with pytest.warns(RuntimeWarning, match="process groups"):
        private.look_up(lambda n: None if n == private.PROCESS_GROUP else private._find(n))
    for scenario in SIZES:
        found = of_process(scenario, rank, pair)
        torch.save(found, f"{folder}/{scenario}-by-layers-{rank}")
    dist.destroy_process_group()


def of_process(scenario, rank, pair):
    """Return what a process has of a scenario, or nothing if it has no part in it."""
    model, sizes, x, dy = whole_batch(scenario)
    if rank >= len(sizes):
        return {}
    group = pair if len(sizes) == 2 else None
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    model = ours.convert(model)
    layout = torch.channels_last if rank == 1 else torch.contiguous_format
    own = x.split(sizes)[rank].contiguous(memory_format=layout)
    found = results(model, own, dy.split(sizes)[rank])
    for p in model.parameters():
        torch.distributed.all_reduce(p.grad, group=group)
    found |= {f"d{name}": p.grad for name, p in model.named_parameters()}
    return found | dict(model.named_buffers())


def errors(rank, path):
    """Save what happens where it cannot work."""
    messages = []
    sync = ours.SyncBatchNorm(3).double()
    for x in (
        # One value per channel in all processes together.
        torch.rand(1 if rank == 0 else 0, 3).double(),
        torch.rand(2, 3).bfloat16(),
    ):
        try:
            sync(x)
        except ValueError as error:
            messages.append(str(error))
    x = torch.rand(2, 3).double().requires_grad_()
    (dx,) = torch.autograd.grad(sync(x).pow(3).sum(), x, create_graph=True)
    try:
        dx.sum().backward()
    except NotImplementedError as error:
        messages.append(str(error))
    torch.save(messages, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run three processes, once for all tests."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is not available")
    path = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(process, (str(path),), nprocs=3)
    return path


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_processes_are_as_one(folder, scenario):
    model, sizes, x, dy = whole_batch(scenario)
    if scenario == "large-offset":
        ours.convert(model)  # PyTorch's own variance is off by 1e-12 here
    expected = results(model, x, dy)
    found = [torch.load(folder / f"{scenario}-{rank}") for rank in range(len(sizes))]
    scale = 1e6 if scenario == "large-offset" else 100
    for name, value in expected.items():
        whole = torch.cat([each[name] for each in found])
        assert_close(whole, value, scale=scale, what=name)
    for each in found:
        for name, p in model.named_parameters():
            assert_close(each[f"d{name}"], p.grad, scale=10 * scale, what=name)
        for name, buffer in model.named_buffers():
            assert_close(each[name].double(), buffer.double(), scale=scale, what=name)
            assert torch.equal(each[name], found[0][name])


@pytest.mark.parametrize("scenario", SIZES)
def test_layers_know_their_groups_where_pytorch_does_not_tell(folder, scenario):
    for rank in range(3):
        found = torch.load(folder / f"{scenario}-by-layers-{rank}")
        expected = torch.load(folder / f"{scenario}-{rank}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_work_says_so(folder):
    for rank in range(3):
        one_value, half, second = torch.load(folder / f"errors-{rank}")
        assert "more than one value per channel" in one_value
        assert "GPU" in half  # in the words of PyTorch
        assert "second derivative" in second


def test_a_single_process_is_a_batch_norm():
    x = torch.tensor(normal(3, 4, 5))
    sync, batch = ours.SyncBatchNorm(4).double(), ours.BatchNorm1d(4).double()
    assert torch.equal(sync(x), batch(x))
    assert torch.equal(sync.eval()(x), batch.eval()(x))


# -- DataLoader ----------------------------------------------------------------------------------


class Normalised(torch.utils.data.Dataset):
    """Large enough for the parallel kernels, if there were several threads."""

    def __init__(self):
        self.layer = ours.convert(torch.nn.BatchNorm2d(4).eval())
        self.layer.running_mean.fill_(0.5)

    def __len__(self):
        return 4

    def __getitem__(self, k):
        x = torch.full((1, 4, 256, 128), k + 0.5, requires_grad=True)
        y = self.layer(x)
        y.sum().backward()
        return y.detach()[0, :, 0, 0], x.grad[0, :, 0, 0], torch.get_num_threads()


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loader(start):
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} on this system")
    data = Normalised()
    data[0]  # the parent's threads are running when a worker starts
    ours.BatchNorm2d(4)(torch.rand(8, 4, 96, 96))
    loader = torch.utils.data.DataLoader(
        data, num_workers=1, multiprocessing_context=start, timeout=600
    )
    for k, (y, dx, threads) in enumerate(loader):
        assert_close(y, torch.full((1, 4), k / (1 + 1e-5) ** 0.5), scale=1)
        assert_close(dx, torch.full((1, 4), (1 + 1e-5) ** -0.5), scale=1)
        assert threads == 1
    # The parent goes on.
    assert ours.BatchNorm2d(4)(torch.rand(8, 4, 96, 96)).isfinite().all()


# -- Threads -------------------------------------------------------------------------------------


BRINGS_OPENMP = any(Path(torch.__file__).parent.glob("lib/libgomp*"))
X = torch.rand(8, 3, 64, 64)


@numba.njit(parallel=True)
def double(x):
    """Do what a user has Numba do, on the threading layer of the process."""
    y = np.empty_like(x)
    for i in numba.prange(x.size):
        y[i] = 2 * x[i]
    return y


def check_double():
    np.testing.assert_array_equal(double(np.arange(9.0)), 2 * np.arange(9.0))


@pytest.mark.parametrize(
    ("environment", "ours_expected"),
    [
        ({"NUMBA_THREADING_LAYER": "default"}, "None" if BRINGS_OPENMP else "tbb"),
        ({"NUMBA_THREADING_LAYER": "tbb"}, "tbb"),
        ({"NUMBA_THREADING_LAYER_PRIORITY": "tbb omp workqueue"}, "tbb"),
    ],
    ids=["PyTorch's", "asked for", "order asked for"],
)
def test_the_threading_layer_is_left_as_it_is(environment, ours_expected):
    if not any(d.name == "tbb" for d in importlib.metadata.distributions()):
        pytest.skip("tbb is not installed")
    assert run(print_threading_layers, **environment).split() == [ours_expected, "tbb"]


def print_threading_layers():
    torch.set_num_threads(2)
    ours.BatchNorm2d(3)(X)
    print(_threads.threading_layer())
    check_double()
    print(_threads.threading_layer())


needs_openmp = pytest.mark.skipif(not BRINGS_OPENMP, reason="this PyTorch brings no OpenMP")


@needs_openmp
def test_kernels_on_the_threads_of_openmp():
    run(check_openmp, NUMBA_THREADING_LAYER="default")


def check_openmp():
    torch.set_num_threads(2)
    test_launch.in_threads = lambda n: launch.in_threads(_threads._address_of_openmp(), n)
    for n_threads in (1, 2, 3, 8):
        for n_tasks in (0, 1, 7, 100):
            test_launch.test_each_task_is_done_once(n_tasks, n_threads)
        for kind in (ValueError, MemoryError):
            test_launch.test_exception([1, 4, 8], kind, n_threads)
    expected, *others = (layer_on(n) for n in (1, 2, 4, 7))
    assert all(np.array_equal(expected, other) for other in others)
    assert _threads.threading_layer() is None


def layer_on(n_threads):
    torch.set_num_threads(n_threads)
    with use(parallel_from=1):
        return ours.BatchNorm2d(3)(X).detach().numpy()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("before", ["ours", "PyTorch's", "the user's"])
def test_fork(before):
    run(use_and_fork, before, timeout=600, NUMBA_THREADING_LAYER="default")


def use_and_fork(before):
    torch.set_num_threads(2)
    {
        "ours": lambda: layer_on(2),
        "PyTorch's": lambda: X + 1,
        "the user's": check_double,
    }[before]()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:  # PyTorch's own operations on several threads would wait for ever
        check_double()
        np.testing.assert_array_equal(layer_on(2), numbanorm.BatchNorm2d(3)(X.numpy()))
        sys.exit()
    assert os.waitpid(pid, 0)[1] == 0
    np.testing.assert_array_equal(layer_on(2), numbanorm.BatchNorm2d(3)(X.numpy()))
    check_double()
