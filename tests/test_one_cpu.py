"""Where there are more threads than CPUs: processes end, and a container's quota is kept."""

import math
import os
import sys
import threading

import numba
import numpy as np
import pytest
from children import run

import numbanorm as nn
from numbanorm.numba_ext import threads as _threads
from numbanorm.numba_ext.quota import cpu_quota
from numbanorm.tuning import use

HANGS = 600  # seconds, as in test_processes.py


# -- Processes end -------------------------------------------------------------------------------


def on_one_cpu(way):
    """Use several threads in some way where tbb starts none, and end as Python does."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    globals()[way]()
    assert _threads.threading_layer() is not None


def normalize():
    with use(parallel_from=1):
        nn.InstanceNorm1d(2)(np.arange(24.0).reshape(3, 2, 4))


def in_thread(work=normalize):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def in_fork():
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        normalize()
        sys.exit()  # as Python does, in contrast to os._exit()
    assert os.waitpid(pid, 0)[1] == 0


def in_fork_after_use():
    normalize()
    in_fork()
    normalize()


def in_fork_after_use_in_thread():
    in_thread()
    in_fork()


def in_two_threads():
    in_thread()
    in_thread()


def with_threads_of_the_user():
    nn.set_num_threads(2)
    in_thread()


def with_threads_that_the_user_started():
    in_thread(numba.get_num_threads)
    in_thread()


WAYS = [
    normalize, in_thread, in_two_threads, in_fork_after_use, in_fork_after_use_in_thread,
    with_threads_of_the_user, with_threads_that_the_user_started,
]  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no choice of CPUs here")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_process_on_one_cpu_ends(way):
    run(on_one_cpu, way.__name__, timeout=HANGS, NUMBA_NUM_THREADS="2")


# -- Quota ---------------------------------------------------------------------------------------


def v2(quota, period=100000):
    return {"cpu.max": f"{quota} {period}"}


def v1(quota, period=100000):
    return {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period}


# By what it is: the groups of the process, quotas by folder, and how many CPUs that makes.
QUOTAS = {
    "version 2": ("0::/a/b", {"a/b": v2(200000)}, 2),
    "version 2, of the group around": ("0::/a/b", {"a/b": v2("max"), "a": v2(150000)}, 1.5),
    "version 2, in a container": ("0::/", {".": v2(50000)}, 0.5),
    "version 2, by the host's path": ("0::/docker/a", {".": v2(100000)}, 1),
    "version 2, none": ("0::/a", {"a": v2("max")}, math.inf),
    "version 1": ("4:cpu,cpuacct:/a\n0::/", {"cpu,cpuacct/a": v1(60000, 20000)}, 3),
    "version 1, by the host's path": ("2:memory:/b\n1:cpu:/docker/a", {"cpu": v1(100000)}, 1),
    "version 1, of memory": ("2:memory:/", {"cpu": v1(100000)}, math.inf),
    "version 1, none": ("1:cpu:/", {"cpu": v1(-1)}, math.inf),
    "both": ("1:cpu:/\n0::/", {"cpu": v1(200000), "unified": v2("max")}, 2),
    "damaged": ("0::/", {".": v2("")}, math.inf),
    "of other bytes": ("2:memory:/\udcff\nno groups\n0::/", {".": v2(100000)}, 1),
    "no groups": (None, {}, math.inf),
}


@pytest.mark.parametrize(("groups", "quotas", "expected"), QUOTAS.values(), ids=QUOTAS)
def test_quota(tmp_path, groups, quotas, expected):
    root = tmp_path
    for folder, files in quotas.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(f"{value}\n")
    if groups is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(f"{groups}\n", errors="surrogateescape")
    assert cpu_quota(root) == expected


@pytest.mark.parametrize(
    ("quota", "most", "default", "expected"),
    [(1, 8, 8, 1), (1.5, 8, 8, 2), (9, 8, 8, None), (math.inf, 8, 8, None), (math.inf, 1, 1, 1),
     (1, 4, 8, None)],  # NUMBA_NUM_THREADS says otherwise
)  # fmt: skip
def test_default_number_of_threads(monkeypatch, quota, most, default, expected):
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", most)
    monkeypatch.setattr(numba.config, "NUMBA_DEFAULT_NUM_THREADS", default)
    assert _threads.default_num_threads(quota) == expected
