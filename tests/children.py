"""Call a function of a test file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from numbanorm.numba_ext.jit import KERNELS

ROOT = Path(__file__).parents[1]


def run(function, *args, root=ROOT, timeout=1800, **env):
    """Call a function in a new process, where every warning is an error; return what it printed.

    `root` is where the package is, `env` are environment variables. A result other than 0, of an
    exception or a signal, is a failure.
    """
    path = os.pathsep.join(map(str, (root, ROOT / "tests")))
    call = f"{function.__name__}(*{args!r})"
    done = subprocess.run(
        [
            # No .pyc: Python itself takes an edited file of the same size and time for the old.
            *(sys.executable, "-B", "-W", "error"),
            # From Python 3.12 on, each fork of a process with threads warns.
            *("-W", "ignore:This process:DeprecationWarning"),
            *("-c", f"import {function.__module__} as tests; tests.{call}"),
        ],
        env={**os.environ, "NUMBA_NUM_THREADS": "4", "PYTHONPATH": path, **env},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=timeout,  # only a process that hangs takes so long
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compiled():
    """Count the kernels that this process compiled, and those that it had from the cache."""
    stats = [kernel.stats for kernel in KERNELS.values()]
    return (
        sum(sum(s.cache_misses.values()) for s in stats),
        sum(sum(s.cache_hits.values()) for s in stats),
    )
