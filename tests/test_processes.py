"""Threads, forks, threading layers, compile caches, Ctrl-C: each in a process of its own.

A child process calls a function of this file. Its exit status and its output are looked at, so
that an abort or a hang of the child is a failure and not the end of the test run.
"""

import compileall
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from cases import DTYPES, Case, by_id, normal
from children import ROOT, compiled, run
from test_threads import BIG

import numbanorm as nn
from numbanorm.numba_ext import cache as _cache
from numbanorm.numba_ext import threads as _threads
from numbanorm.tuning import tuning, use

LAYERS = ["tbb", "omp", "workqueue"]
HANGS = 600  # seconds: long enough for the slowest of machines with all else it has to do

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@functools.cache
def problem_of(layer):
    try:
        run(start_threads, NUMBA_THREADING_LAYER=layer)
    except AssertionError as error:
        return str(error)
    return None


def start_threads():
    numba.get_num_threads()


def tbb_is_installed():
    try:
        importlib.metadata.version("tbb")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load_or_skip(layer):
    """Skip a test of a threading layer that Numba cannot have here: any other problem is one."""
    problem = problem_of(layer)
    # tbb has no wheels for some machines, nor has each a libgomp; workqueue is always there.
    here = {"tbb": tbb_is_installed(), "omp": False, "workqueue": True}[layer]
    if problem and not here and "threading layer" in problem:
        pytest.skip(f"Numba cannot load {layer}")
    assert problem is None


@pytest.fixture(params=LAYERS)
def layer(request):
    """Go through the threading layers that Numba can load here."""
    load_or_skip(request.param)
    return request.param


# -- results, in the child -----------------------------------------------------------------------


class Job:
    """One forward and backward of a new layer, always the same."""

    def __init__(self, case, shape=None, dtype=np.float32, masked=False):
        case = by_id[case] if isinstance(case, str) else case
        self.case = replace(case, shape=shape or case.shape)
        self.dtype = dtype
        self.x, self.dy = (self.case.input(dtype, seed=s) for s in (0, 1))
        self.mask = normal(*self.case.shape, seed=2) < 0.5 if masked else None

    def run(self, training=True):
        """Return all that comes of it: arrays by name."""
        layer = self.case.layer(self.dtype).train(training)
        results = {"y": layer(self.x, mask=self.mask), "dx": layer.backward(self.dy)}
        results |= {f"gradient of {k}": v for k, v in layer.gradients().items()}
        return results | layer.state_dict()

    def bits(self, training=True):
        return {k: np.asarray(v).tobytes() for k, v in self.run(training).items()}

    def check(self):
        self.case.check(self.case.layer(self.dtype), self.x, self.dy, self.mask)


EIGHT = [
    "BatchNorm2d", "BatchNorm2d-last", "InstanceNorm2d-tracking", "GroupNorm", "LayerNorm",
    "RMSNorm", "Norm-columns", "SwitchableNorm2d",
]  # fmt: skip


def big_jobs():
    """Make jobs for eight layers, big enough for the parallel kernels."""
    jobs = [Job(name, BIG[name]) for name in EIGHT]
    assert all(job.x.size >= tuning().parallel_from for job in jobs)
    return jobs


# -- threads -------------------------------------------------------------------------------------


def test_eight_threads(layer):
    run(eight_threads, layer, NUMBA_THREADING_LAYER=layer)


def eight_threads(threading_layer):
    jobs, failures = big_jobs(), []
    start = threading.Barrier(len(jobs))

    def work(job):
        try:
            start.wait(HANGS)  # the first calls load or compile, and start Numba's threads
            expected = job.bits()
            for _ in range(199):
                assert job.bits() == expected, job.case.id
            job.check()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert _threads.threading_layer() == threading_layer


def test_tbb_of_the_environment_is_found():
    if not tbb_is_installed():
        pytest.skip("tbb is not installed")
    # As after pip install: nothing says where it is, nor that it is to be used.
    unset = {"NUMBA_THREADING_LAYER": "default", "LD_LIBRARY_PATH": "", "DYLD_LIBRARY_PATH": ""}
    assert run(print_threading_layer, **unset) == "tbb\n"


def print_threading_layer():
    Job("BatchNorm2d", BIG["BatchNorm2d"]).check()
    print(_threads.threading_layer())


def test_first_calls_race_to_compile(tmp_path):
    run(race, NUMBA_THREADING_LAYER="workqueue", NUMBA_CACHE_DIR=str(tmp_path))


def race():
    # The same kernels, called from several threads, and on several for a big x.
    name = "InstanceNorm2d"
    jobs = [Job(name), Job(name), Job(name, (9, 4, 57, 61)), Job(name, (9, 4, 57, 61))]
    start, passed = threading.Barrier(len(jobs)), []

    def work(job):
        start.wait(HANGS)
        job.check()
        passed.append(job)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == len(jobs)


def test_the_callers_number_of_threads_stays(layer):
    run(callers_number_of_threads, NUMBA_THREADING_LAYER=layer)


def callers_number_of_threads():
    job = Job("BatchNorm2d", BIG["BatchNorm2d"])
    numba.set_num_threads(3)
    assert nn.get_num_threads() == 3
    for n in (1, 2, 4):
        nn.set_num_threads(n)
        job.run()
        assert (nn.get_num_threads(), numba.get_num_threads()) == (n, 3)


# -- forks ---------------------------------------------------------------------------------------


def in_fork(work):
    """Run work() in a forked child and return its exit status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(HANGS)  # ends a child that hangs
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_thread(work):
    """Return what work() returns, called in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


FORKS = [
    "fork_before_use", "fork_and_go_on", "fork_twice", "fork_from_a_thread",
    "fork_after_use_in_a_thread", "fork_while_threads_work", "multiprocessing_fork",
]  # fmt: skip


@needs_fork
@pytest.mark.parametrize("way", FORKS)
def test_fork(layer, way):
    run(fork, way, NUMBA_THREADING_LAYER=layer)


def fork(way):
    jobs = big_jobs()[::3]
    expected = [] if way == "fork_before_use" else [job.bits() for job in jobs]

    def work():
        for job in jobs:
            job.check()
        if expected:
            assert [job.bits() for job in jobs] == expected

    globals()[way](work)
    work()  # the parent goes on
    assert in_fork(work) == 0


def fork_before_use(work):
    assert in_fork(work) == 0


def fork_and_go_on(work):
    for _ in range(5):
        assert in_fork(work) == 0
        work()


def fork_twice(work):
    def work_and_fork():
        work()
        assert in_fork(work) == 0

    assert in_fork(work_and_fork) == 0


def fork_from_a_thread(work):
    assert in_thread(lambda: in_fork(work)) == 0


def fork_after_use_in_a_thread(work):
    in_thread(work)
    assert in_fork(work) == 0


def fork_while_threads_work(work):
    failures, stop = [], threading.Event()

    def go_on():
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=go_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    statuses = [in_fork(work) for _ in range(5)]
    statuses += [in_thread(lambda: in_fork(work)) for _ in range(5)]
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert statuses == [0] * 10


def multiprocessing_fork(work):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work) for _ in range(3)]
    for child in children:
        child.start()
    work()
    for child in children:
        child.join(HANGS)
    assert [child.exitcode for child in children] == [0] * 3


@needs_fork
def test_fork_while_another_thread_compiles(tmp_path):
    run(fork_while_compiling, NUMBA_CACHE_DIR=str(tmp_path))


def fork_while_compiling():
    job, other = Job("BatchNorm2d"), Job("LayerNorm")
    thread = threading.Thread(target=job.check)
    thread.start()
    # The child needs the lock of the compiler, which a thread of the parent has.
    while not _compiling():
        time.sleep(0.001)
    assert in_fork(other.check) == 0
    thread.join()
    other.check()


def _compiling():
    from numba.core.compiler_lock import global_compiler_lock

    # Python's lock tells its state by its name alone.
    return "<locked" in repr(global_compiler_lock._lock)


@needs_fork
@pytest.mark.parametrize("way", ["lost", "kept"])
def test_number_of_threads_in_a_child(way):
    layer = {"lost": "workqueue", "kept": "tbb"}[way]
    load_or_skip(layer)
    run(number_of_threads_in_a_child, {"lost": 1, "kept": 2}[way], NUMBA_THREADING_LAYER=layer)


def number_of_threads_in_a_child(expected):
    nn.set_num_threads(2)
    Job("BatchNorm2d", BIG["BatchNorm2d"]).run()
    assert in_fork(lambda: _assert_equal(nn.get_num_threads(), expected)) == 0
    assert nn.get_num_threads() == 2


def _assert_equal(actual, expected):
    assert actual == expected


@needs_fork
def test_data_loader(layer):
    pytest.importorskip("torch")
    run(data_loader, NUMBA_THREADING_LAYER=layer)


def data_loader():
    import torch.utils.data

    job = Job("InstanceNorm2d", (9, 4, 57, 61))
    expected = job.run()["y"]

    class Normalized(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return job.run()["y"]

    loader = torch.utils.data.DataLoader(
        Normalized(), num_workers=2, multiprocessing_context="fork", timeout=HANGS
    )
    for _ in range(2):
        for y in loader:
            np.testing.assert_array_equal(y[0], expected)
            np.testing.assert_array_equal(job.run()["y"], expected)


# -- the same bits -------------------------------------------------------------------------------


def test_the_same_bits_on_every_threading_layer():
    loaded = [layer for layer in LAYERS if problem_of(layer) is None]
    digests = {}
    for name in loaded:
        digests[name] = json.loads(run(print_digests, NUMBA_THREADING_LAYER=name))
    first = digests.pop(loaded[0])
    assert len(first) > 1000
    for name, found in digests.items():
        different = [what for what in first if found[what] != first[what]]
        assert found.keys() == first.keys()
        assert different == [], f"{name} and {loaded[0]} differ"


# By the number of channels and their axis.
CHANNEL_LAYERS = {
    "BatchNorm": lambda c, axis, **k: nn.BatchNorm(c, axis=axis, **k),
    "InstanceNorm": lambda c, axis, **k: nn.InstanceNorm(
        c, affine=True, track_running_stats=True, axis=axis, **k
    ),
    "GroupNorm": lambda c, axis, **k: nn.GroupNorm(2, c, axis=axis, **k),
    "SwitchableNorm": lambda c, axis, **k: nn.SwitchableNorm(c, axis=axis, **k),
    "SwitchableNorm-all": lambda c, axis, **k: nn.SwitchableNorm(
        c, over=("gn", "bn", "in", "ln"), num_groups=2, axis=axis, **k
    ),
    "Norm": lambda c, axis, **k: nn.Norm((0, 2 if axis == 1 else 1), track_stats=True, **k),
}
# By the sizes of the last axes.
ROW_LAYERS = {
    "LayerNorm": lambda *sizes, **k: nn.LayerNorm(sizes, **k),
    "RMSNorm": lambda *sizes, **k: nn.RMSNorm(sizes, **k),
}


def random_jobs(count):
    """Make jobs of random shapes for every layer, its channels first and last."""
    rng = np.random.default_rng(5)
    kinds = list(itertools.product(DTYPES, (False, True)))

    def job(name, make, shape, k):
        dtype, masked = kinds[k % len(kinds)]
        case = Case(name, make, shape, list, ())  # no definition: bits alone are compared
        return f"{name} {shape} {dtype.__name__} {masked}", Job(case, None, dtype, masked)

    for k in range(count):
        for (name, make), last in itertools.product(CHANNEL_LAYERS.items(), (False, True)):
            n, *inner = (2 + int(2 ** rng.uniform(0, top)) for top in (4, 6, 7))
            c = 2 * int(2 ** rng.uniform(0, 5))
            shape, axis = ((n, *inner, c), -1) if last else ((n, c, *inner), 1)
            yield job(name, functools.partial(make, c, axis), shape, k)
        for name, make in ROW_LAYERS.items():
            shape = tuple(1 + int(2 ** rng.uniform(0, top)) for top in (9, 3, 7))
            sizes = shape[1 + k // 2 % 2 :]
            yield job(name, functools.partial(make, *sizes), shape, k)


def print_digests():
    jobs = {f"{name} big": Job(name, shape) for name, shape in BIG.items()}
    jobs |= dict(random_jobs(8))
    digests = {}
    stack = contextlib.ExitStack()
    stack.enter_context(use(parallel_from=2))  # so that small x is cut for threads as well
    for n in (1, 2, 4):
        nn.set_num_threads(n)
        for name, job in jobs.items():
            for training in (True, False):
                for what, value in job.bits(training).items():
                    key = f"{name}, {'training' if training else 'evaluation'}, {what}"
                    digest = hashlib.sha256(value).hexdigest()
                    assert digests.setdefault(key, digest) == digest, f"{key}, {n} threads"
    print(json.dumps(digests))


# -- the compile cache ---------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """Copy the package, without what was compiled, to where it may be changed."""
    root = tmp_path / "copy"
    shutil.copytree(
        ROOT / "numbanorm", root / "numbanorm", ignore=shutil.ignore_patterns("__pycache__")
    )
    return root / "numbanorm"


# What one small layer is given, and what is to come of it.
X = [[[1.0, 3.0], [5.0, 5.0]]]
Y = [[[-1.0, 1.0], [0.0, 0.0]]]


def normalize():
    """Print y, how many kernels were compiled and loaded, and the text of all warnings."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = nn.BatchNorm1d(2, eps=0.0)(np.array(X))
    misses, hits = compiled()
    texts = [f"{w.category.__name__}: {w.message}" for w in caught]
    print(json.dumps({"y": y.tolist(), "compiled": misses, "loaded": hits, "warnings": texts}))


def normalized(*args, **options):
    return json.loads(run(normalize, *args, **options))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_numba_cache_dir(package, tmp_path):
    root, cache = package.parent, tmp_path / "cache" / "not there yet"
    first = normalized(root=root, NUMBA_CACHE_DIR=str(cache))
    assert (first["y"], first["warnings"], first["loaded"]) == (Y, [], 0)
    assert len(files(cache)) == first["compiled"] > 0
    assert not (package / "__pycache__").exists()
    second = normalized(root=root, NUMBA_CACHE_DIR=str(cache))
    assert second == {**first, "compiled": 0, "loaded": first["compiled"]}


NO_HOME = {"HOME": os.devnull, "XDG_CACHE_HOME": "", "LOCALAPPDATA": os.devnull}


def no_cache_dir(**env):
    """Set environment variables, with Numba left to find a folder."""
    return {"NUMBA_CACHE_DIR": "", **env}


def close(package):
    # Permissions mean nothing to root; a file where a folder should be, to everybody.
    (package / "__pycache__").write_bytes(b"")


def test_in_the_package_folder(package):
    first = normalized(root=package.parent, **no_cache_dir(**NO_HOME))
    second = normalized(root=package.parent, **no_cache_dir(**NO_HOME))
    assert first["compiled"] == second["loaded"] == len(files(package / "__pycache__"))
    assert (second["compiled"], first["warnings"], second["warnings"]) == (0, [], [])


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="homes are elsewhere there")
def test_read_only_package_folder(package, tmp_path):
    close(package)
    home = no_cache_dir(HOME=str(tmp_path / "home"), XDG_CACHE_HOME=str(tmp_path / "home/.cache"))
    first = normalized(root=package.parent, **home)
    assert len(files(tmp_path / "home" / ".cache" / "numbanorm")) == first["compiled"] > 0
    assert first["warnings"] == []
    assert normalized(root=package.parent, **home)["compiled"] == 0


def test_nowhere_to_write(package):
    close(package)
    found = normalized(root=package.parent, **no_cache_dir(**NO_HOME))
    assert (found["y"], found["loaded"]) == (Y, 0)
    assert found["compiled"] > 1
    (warning,) = found["warnings"]
    assert warning.startswith("RuntimeWarning: numbanorm cannot keep its compiled kernels")
    assert str(package) in warning
    assert "NUMBA_CACHE_DIR" in warning
    assert not (ROOT / "tests" / "~").exists()


def test_full_disk(package, tmp_path):
    pytest.importorskip("resource")
    cache = str(tmp_path / "cache")
    found = json.loads(run(on_full_disk, root=package.parent, NUMBA_CACHE_DIR=cache))
    assert found["y"] == Y
    (warning,) = found["warnings"]
    assert "NUMBA_CACHE_DIR" in warning
    assert files(Path(cache)) == []  # nor halves of files
    # Once there is room, it is used.
    assert normalized(root=package.parent, NUMBA_CACHE_DIR=cache)["warnings"] == []
    assert normalized(root=package.parent, NUMBA_CACHE_DIR=cache)["compiled"] == 0


def on_full_disk():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    normalize()


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "garbage": lambda content: np.random.default_rng(0).bytes(len(content)),
    "one bit": lambda content: content[:-99] + bytes([content[-99] ^ 1]) + content[-98:],
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory):
    """Fill a cache with what normalize() needs."""
    cache = tmp_path_factory.mktemp("cache")
    normalized(NUMBA_CACHE_DIR=str(cache))
    return cache


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_not_read(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    content = bytes(range(256)) * 9
    _cache._write("kernel", content)
    assert _cache._read("kernel") == content
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert _cache._read("kernel") is None
    _cache._write("kernel", content)
    assert _cache._read("kernel") == content


def test_damaged_files(filled_cache, tmp_path):
    cache = shutil.copytree(filled_cache, tmp_path / "cache")
    before = files(cache)
    # Each file in another way.
    for path, damage in zip(before, itertools.cycle(DAMAGE.values())):
        path.write_bytes(damage(path.read_bytes()))
    first = normalized(NUMBA_CACHE_DIR=str(cache))
    assert (first["y"], first["warnings"], first["loaded"]) == (Y, [], 0)
    assert files(cache) == before
    assert normalized(NUMBA_CACHE_DIR=str(cache))["compiled"] == 0


def test_a_folder_where_a_file_should_be(filled_cache, tmp_path):
    cache = shutil.copytree(filled_cache, tmp_path / "cache")
    for path in files(cache):
        path.unlink()
        path.mkdir()
    found = normalized(NUMBA_CACHE_DIR=str(cache))
    assert found["y"] == Y
    assert len(found["warnings"]) == 1


def edit(source, *changes):
    """Edit a file; its size and time, all that Numba of old looked at, may be as before."""
    text, stat = source.read_text(encoding="utf-8"), source.stat()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    source.write_text(text, encoding="utf-8")
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_older_version_of_the_library(package):
    env = no_cache_dir(**NO_HOME)
    before = normalized(root=package.parent, **env)
    sources = package / "kernels"
    old = "return multiply_add(x - coef.m, coef.s, coef.t)"
    new = "return (x - coef.m) * coef.s - coef.s  # ------"
    edit(sources / "formulas.py", (old, new))
    changed = normalized(root=package.parent, **env)
    assert changed["y"] == [[[-2.0, 0.0], [0.0, 0.0]]]
    assert changed["compiled"] > 0
    assert changed["compiled"] + changed["loaded"] == before["compiled"]
    assert normalized(root=package.parent, **env) == {
        **changed, "compiled": 0, "loaded": before["compiled"]
    }  # fmt: skip
    # The older version, from what was compiled of it.
    edit(sources / "formulas.py", (new, old))
    assert normalized(root=package.parent, **env) == {
        **before, "compiled": 0, "loaded": before["compiled"]
    }  # fmt: skip


def test_an_edit_recompiles_what_imports_the_module(package, tmp_path):
    sources = package / "kernels"
    env = {"root": package.parent, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    before = normalized(**env)
    # Nothing else imports it.
    algebra = sources / "algebra.py"
    algebra.write_text(algebra.read_text(encoding="utf-8") + "\nUNUSED = 1\n", encoding="utf-8")
    after = normalized(**env)
    assert 0 < after["compiled"] < before["compiled"]
    assert after["loaded"] == before["compiled"] - after["compiled"]
    # All import what says how it is compiled.
    jit = package / "numba_ext" / "jit.py"
    jit.write_text(jit.read_text(encoding="utf-8") + "\nUNUSED = 1\n", encoding="utf-8")
    assert normalized(**env) == before


def test_comments_and_docstrings_recompile_nothing(filled_cache, package, tmp_path):
    cache = shutil.copytree(filled_cache, tmp_path / "cache")
    for source in package.rglob("*.py"):
        text = re.sub(r'^( *)"""(?=[A-Z`])', r'\1"""Another word. ', source.read_text(), flags=re.M)
        assert text.startswith('"""Another word.')
        source.write_text(re.sub(r"^( *)return", r"\1# Another line.\n\1return", text, flags=re.M))
    after = normalized(root=package.parent, NUMBA_CACHE_DIR=str(cache))
    assert (after["y"], after["compiled"], after["loaded"]) == (Y, 0, len(files(cache)))


def test_without_sources(package, tmp_path):
    assert compileall.compile_dir(package, legacy=True, quiet=1)
    for source in package.rglob("*.py"):
        source.unlink()
    env = {"root": package.parent, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = normalized(**env)
    assert first["compiled"] > 0
    assert normalized(**env) == {**first, "compiled": 0, "loaded": first["compiled"]}


def test_in_a_zip_file(filled_cache, package):
    archive = shutil.make_archive(package.parent / "library", "zip", package.parent, package.name)
    found = normalized(root=archive, NUMBA_CACHE_DIR=str(filled_cache))
    assert (found["y"], found["compiled"]) == (Y, 0)


def test_another_place_of_installation(filled_cache, package):
    found = normalized(root=package.parent, NUMBA_CACHE_DIR=str(filled_cache))
    assert (found["y"], found["compiled"], found["loaded"]) == (Y, 0, len(files(filled_cache)))


def test_old_files_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    old, recent, other, new = "kernel-1-a.nbc", "kernel-1-b.nbc", "other-1-a.nbc", "kernel-1-c.nbc"
    for name in (old, recent, other):
        _cache._write(name, b"")
    for path in files(tmp_path):
        if path.name in (old, other):
            os.utime(path, (0, 0))
    _cache._write(new, b"")
    assert sorted(path.name for path in files(tmp_path)) == sorted((recent, other, new))


def test_bounds_checked_kernels_are_kept_apart(filled_cache, tmp_path):
    cache = shutil.copytree(filled_cache, tmp_path / "cache")
    other = "0" if os.environ.get("NUMBA_BOUNDSCHECK") == "1" else "1"
    checked = normalized(NUMBA_CACHE_DIR=str(cache), NUMBA_BOUNDSCHECK=other)
    assert (checked["y"], checked["loaded"]) == (Y, 0)
    assert normalized(NUMBA_CACHE_DIR=str(cache))["compiled"] == 0


def test_four_processes_on_one_empty_cache(tmp_path):
    # The same kernels for other types, at once and in another order: an index that two processes
    # write would mix them up.
    env = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "1"}
    failures = []

    def start(number):
        try:
            run(fill_cache, number, str(tmp_path / "go"), **env)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    (tmp_path / "go").touch()
    for thread in threads:
        thread.join()
    assert failures == []
    run(use_filled_cache, **env)


def filling_jobs():
    kinds = itertools.product((np.float32, np.float64), (False, True))
    return [Job("InstanceNorm2d", dtype=dtype, masked=masked) for dtype, masked in kinds]


def fill_cache(number, go):
    while not os.path.exists(go):
        time.sleep(0.001)
    jobs = filling_jobs()
    for job in (jobs[number:] + jobs[:number])[:2]:
        job.check()


def use_filled_cache():
    for job in filling_jobs():
        job.check()
    misses, hits = compiled()
    assert (misses, hits > 0) == (0, True)


# -- not compiled --------------------------------------------------------------------------------


def test_kernels_as_python_functions():
    # As a debugger wants them.
    run(check_a_few, NUMBA_DISABLE_JIT="1", NUMBA_NUM_THREADS="2")


def check_a_few():
    for name in ("BatchNorm2d", "BatchNorm2d-last", "LayerNorm", "GroupNorm", "SwitchableNorm2d"):
        case = by_id[name]
        with use(parallel_from=1):
            case.check(case.layer(), case.input(), normal(*case.shape, seed=1))
    # Machine code divides by no columns, Python does not.
    empty = np.zeros((2, 3, 0))
    assert nn.Norm(1)(empty).shape == empty.shape


# -- bad input -----------------------------------------------------------------------------------


def test_bad_input():
    # The options are those of this run of pytest, not of the child's.
    printed = run(wrong_calls, PYTEST_ADDOPTS="")
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) > 80, printed


def wrong_calls():
    assert pytest.main(["-q", "-p", "no:cacheprovider", "test_errors.py"]) == 0


# -- Ctrl-C --------------------------------------------------------------------------------------


needs_timer = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer here")


@needs_timer
@pytest.mark.parametrize("name", ["SwitchableNorm2d", "LayerNorm"])
def test_ctrl_c(name, layer):
    run(interrupt, name, NUMBA_THREADING_LAYER=layer)


def press_ctrl_c_after(seconds, again=30):
    # A process that was started in the background ignores Ctrl-C, and so do its children.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Again, since Python drops a KeyboardInterrupt that comes in a finaliser.
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds, again)


def release_ctrl_c():
    signal.setitimer(signal.ITIMER_REAL, 0)


def interrupt(name):
    job = Job(name, BIG[name])
    expected = job.run()
    layer = job.case.layer(job.dtype)
    parameters = {k: p.copy() for k, p in layer.parameters().items()}
    rng = np.random.default_rng(0)
    for _ in range(40):
        try:
            press_ctrl_c_after(rng.uniform(0.001, 0.02))
            while True:
                layer(job.x)
                layer.backward(job.dy)
        except KeyboardInterrupt:
            release_ctrl_c()
        layer.zero_grad()
        np.testing.assert_array_equal(layer(job.x), expected["y"])
        np.testing.assert_array_equal(layer.backward(job.dy), expected["dx"])
        for k, gradient in layer.gradients().items():
            np.testing.assert_array_equal(gradient, expected[f"gradient of {k}"])
        for k, parameter in layer.parameters().items():
            np.testing.assert_array_equal(parameter, parameters[k])
        assert layer.running_mean is None or np.isfinite(layer.running_mean).all()
    in_thread(job.check)  # no lock stays behind


@needs_timer
def test_ctrl_c_while_compiling(tmp_path):
    run(interrupt_compiling, NUMBA_CACHE_DIR=str(tmp_path))


def interrupt_compiling():
    job = Job("InstanceNorm2d", (9, 4, 57, 61))
    interrupted = 0
    for seconds in (0.02, 0.1, 0.3, 0.6, 1.0):
        try:
            press_ctrl_c_after(seconds)
            job.check()
            time.sleep(HANGS)
        except KeyboardInterrupt:
            release_ctrl_c()
            interrupted += 1
    assert interrupted == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    in_thread(job.check)
    job.check()
