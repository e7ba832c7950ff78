"""``python -m numbanorm``: what it prints, and that a warm-up leaves nothing to compile."""

import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from cases import CASES, DTYPES, FEW, LAYOUTS, by_id, normal
from children import compiled, run

import numbanorm as nn
from numbanorm import warmup
from numbanorm.__main__ import main
from numbanorm.numba_ext import cache
from numbanorm.numba_ext.jit import KERNELS
from numbanorm.numba_ext.threads import recording
from numbanorm.tuning import use


def command(*args, **env):
    """Call python -m numbanorm in a new process."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "numbanorm", *args],
        cwd=Path(nn.__file__).parents[1],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.fixture(scope="module")
def warm():
    """Warm up the cache of this test run, and return what that has printed."""
    return command("warmup")


def test_versions_threads_and_cache(tmp_path):
    # Whether tbb can be had is another test's question.
    env = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "3"}
    env["NUMBANORM_CACHE_BYTES"] = str(20 << 20)
    done = command(NUMBA_THREADING_LAYER="workqueue", **env)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [(line[:16].strip(), line[16:].strip()) for line in done.stdout.splitlines()]
    found = dict(rows[:7])
    assert found.pop("numbanorm") == nn.__version__
    assert found.pop("Python") == platform.python_version()
    assert list(found) == ["numba", "llvmlite", "numpy", "scipy", "tbb"]
    for package, version in found.items():
        try:
            assert version == importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            assert version == "not installed"
    assert rows[7] == ("threading layer", "workqueue")
    assert rows[8] == ("threads", "3 of at most 3")
    assert rows[9] == ("streaming stores", "outputs of 2.5 MiB or more")
    ((label, folder),) = rows[10:]
    assert label == "compile cache"
    assert folder.startswith(str(tmp_path))
    assert folder.endswith("(0 kernels)")


def test_a_threading_layer_that_is_not_there():
    done = command(NUMBA_THREADING_LAYER="nonsense")
    assert done.returncode == 0
    assert "nonsense" in done.stdout


def test_nowhere_to_write():
    # A file is no folder, for root as well.
    for args, status in ((), 0), (("warmup",), 1):
        done = command(*args, NUMBA_CACHE_DIR=os.devnull)
        assert (done.returncode, done.stderr) == (status, "")
        assert "cannot be written to" in done.stdout
        assert ("Set the environment variable NUMBA_CACHE_DIR" in done.stdout) == bool(status)


@pytest.mark.parametrize("args", [["nonsense"], ["warmup", "twice"], ["--nonsense"]], ids=" ".join)
def test_wrong_command_line(args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m numbanorm", *args])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert args[-1] in capsys.readouterr().err


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m numbanorm", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "warmup" in capsys.readouterr().out


def file_names():
    """Return the names of the files that the warm-up is to write."""
    names = set()
    for name, signatures in warmup.tasks():
        kernel = KERNELS[name]
        for signature in signatures:
            names.add(kernel._cache.file_name(signature, kernel.targetctx))
    return names


def test_warmup(warm):
    assert warm.returncode == 0, warm.stderr
    (folder,) = [f for f in cache.folders() if f"{f} (" in warm.stdout.splitlines()[-1]]
    assert file_names() <= {path.name for path in folder.iterdir()}


def test_warmup_of_an_empty_cache(tmp_path):
    # All of it takes a minute; the other tests look whether nothing is missing.
    *lines, names = run(warm_up_a_few, NUMBA_CACHE_DIR=str(tmp_path)).splitlines()
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == json.loads(names)
    assert lines[-1].startswith("2 kernels in ")
    assert lines[-1].endswith(f"({len(files)} kernels)")
    assert str(tmp_path) in lines[-1]


def warm_up_a_few():
    few = warmup.tasks()[-2:]
    with mock.patch.object(warmup, "tasks", lambda everything=False: few):
        sys.argv = ["python -m numbanorm", "warmup"]
        assert main() == 0
        print(json.dumps(sorted(file_names())))


def test_other_threads_go_on_while_calls_are_recorded():
    x, recorded = np.arange(6.0).reshape(2, 3), []
    with recording(lambda *args: recorded.append(args)), ThreadPoolExecutor() as pool:
        mean = pool.submit(nn.moments, x, 1).result().mean
        assert recorded == []
        nn.moments(x, 1)
        assert recorded != []
    np.testing.assert_array_equal(mean, [1, 4])


def test_nothing_is_left_to_compile(warm):
    used, misses = json.loads(run(use_everything))
    assert misses == 0
    # Nor is anything compiled that nothing needs.
    assert sorted(used) == sorted(file_names())


def use_everything():
    """Call every layer in every way; print the files that were read, and how many compiled."""
    used, read = set(), cache._read

    def note(name):
        used.add(name)
        return read(name)

    cache._read = note
    # On one thread, on several, and by streaming stores.
    for options in (
        {"cache_bytes": None},
        {"parallel_from": 0, "cache_bytes": None},
        {"parallel_from": 0, "cache_bytes": 0, "stream_from": 1, "stream_parts_from": 1},
    ):
        with use(**options):
            use_layers()
    nn.BatchNorm(2, dtype=np.float64)(np.ones((3, 2)))
    layer, x = nn.BatchNorm(2), np.ones((1 << 18, 2))  # in parts
    layer.backward(layer(x))
    print(json.dumps([sorted(used), compiled()[0]]))


def use_layers():
    for case, dtype, masked, training in itertools.product(
        CASES, DTYPES, (False, True), (True, False)
    ):
        layer = case.layer(np.float32).train(training)
        x, dy = case.input(dtype), case.input(dtype, seed=1)
        mask = normal(*case.shape, seed=2) < 0.5 if masked else None
        nn.moments(x, mask=mask) + nn.Moments.empty(())
        layer(x, mask=mask)
        layer.backward(dy)
        layer(x, mask=mask, out=np.empty_like(x))
        layer.backward(dy, out=dy)
        layer(x, mask=mask, out=x)
    for dtype, masked in itertools.product(DTYPES, (False, True)):
        layer, x = nn.LayerNorm(64, dtype=dtype), normal(1, 64).astype(dtype)
        with use(long_row=1):  # parts of rows
            layer(x, mask=x > 0 if masked else None)
            layer.backward(x)
    for name, layout in itertools.product(FEW, LAYOUTS.values()):
        case = by_id[name]
        layer, x = case.layer(np.float32), layout(case.input(np.float32))
        layer(x, out=None if layout is LAYOUTS["read-only"] else layout(np.empty_like(x)))
        layer.backward(x)
