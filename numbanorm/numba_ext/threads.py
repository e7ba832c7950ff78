"""Threads: loads the threading layer, counts threads, and runs kernels on one or on several.

Python threads take turns at the parallel kernels, each of which has use for all cores: Numba's
workqueue aborts the process otherwise, and a fork has a moment in which no kernel runs and
nothing is being compiled. A forked child where Numba's threads are not to be had runs kernels on
one.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib.metadata
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba

from numbanorm.numba_ext import openmp, private
from numbanorm.numba_ext.cache import uninterrupted
from numbanorm.numba_ext.launch import SERIAL, in_threads, launch, one_share
from numbanorm.numba_ext.quota import cpu_quota
from numbanorm.tuning import tuning


def default_num_threads(quota: float) -> int | None:
    """Return how many threads kernels use as long as nobody says it, None for as many as Numba."""
    most = numba.config.NUMBA_NUM_THREADS
    if most == numba.config.NUMBA_DEFAULT_NUM_THREADS and most > quota:
        return math.ceil(quota)
    return 1 if most == 1 else None


_num_threads = default_num_threads(cpu_quota())
_lock = threading.RLock()
# The Python thread that started Numba's threads, as long as it alone has used them.
_only_user: int | None = None
_lost_threads = False
# Whether there are OpenMP's threads for PyTorch, and whether a fork has taken them.
_openmp = _lost_openmp = False
# Whether Numba's threads are known to run: asking Numba takes as long as a small array.
_started = False


class _PythonThread(threading.local):
    # What thread_count() says in this Python thread.
    num_threads: int | None = None
    # What is told of each call of a kernel instead of calling it, see recording().
    recorder: Callable[..., None] | None = None


_per_thread = _PythonThread()
# Those of all threads: a list is asked faster than what a thread has for its own.
_recorders: list[Callable[..., None]] = []


@contextlib.contextmanager
def recording(note: Callable[..., None]) -> Iterator[None]:
    """Call no kernel in this Python thread: ``note`` is called with each and its arguments."""
    _per_thread.recorder = note
    _recorders.append(note)
    try:
        yield
    finally:
        _recorders.remove(note)
        _per_thread.recorder = None


def call(kernel: Any, *args: object) -> Any:
    """Call a kernel that has no tasks to share out."""
    if _recorders and _per_thread.recorder is not None:
        return _per_thread.recorder(kernel, *args)
    return kernel(*args)


def run(kernel: Any, size: int, *args: object) -> None:
    """Call a kernel, on several threads if its ``size`` elements are worth it."""
    global _only_user, _started
    if _recorders and _per_thread.recorder is not None:
        _per_thread.recorder(kernel, SERIAL, *args)
        return
    n = 1 if size < tuning().parallel_from else _per_thread.num_threads or _num_threads
    if n == 1 or _lost_threads or numba.config.DISABLE_JIT:
        kernel(SERIAL, *args)
        return
    with _lock:
        if n is not None and _openmp and _per_thread.num_threads:
            kernel(in_threads(_address_of_openmp(), n), *args)
            return
        this_thread = threading.get_ident()
        if not _started:
            if threading_layer() is None:
                _only_user = this_thread
                uninterrupted(numba.get_num_threads)()  # starts them
            _started = True
        if _only_user != this_thread:
            _only_user = None
        # Numba keeps one count per Python thread; the caller's is left as it was. A Ctrl-C in
        # numba.get_num_threads() would leave a lock behind that all other threads wait for.
        count = _thread_count()
        before = count.get()
        n = n or before
        if n != before:
            count.set(n)
        try:
            # It is tested when it is compiled, and may be lost then.
            launcher = address_of_launch() if private.has("launch") else 0
            if private.has("launch"):
                kernel(in_threads(launcher, n), *args)
            else:
                _run_in_python_threads(kernel, n, args)
        finally:
            if n != before:
                count.set(before)


def _run_in_python_threads(kernel: Any, n: int, args: Any) -> None:
    with ThreadPoolExecutor(n) as pool:
        for share in [pool.submit(kernel, one_share(i, n), *args) for i in range(n)]:
            share.result()


@functools.cache
def address_of_launch() -> int:
    """Return where the machine code of ``launch`` begins."""
    return private.address_of_compiled(launch, private.THREE)


@functools.cache
def _address_of_openmp() -> int:
    return private.address_of_compiled(openmp.launch_openmp, private.THREE)


@functools.cache
def _thread_count() -> private.ThreadCount:
    return private.ThreadCount()


class thread_count:
    """Let this Python thread use ``n`` threads, or Numba's maximum, whatever is set for all."""

    def __init__(self, n: int) -> None:
        self.n = 1 if _lost_openmp else min(n, numba.config.NUMBA_NUM_THREADS)

    def __enter__(self) -> None:
        """Begin."""
        self.before, _per_thread.num_threads = _per_thread.num_threads, self.n

    def __exit__(self, *_: object) -> None:
        """Have the count as before."""
        _per_thread.num_threads = self.before


def set_num_threads(n: int) -> None:
    """Set how many threads the kernels use, in every Python thread.

    Results do not depend on it.

    Parameters
    ----------
    n : int
        From 1 to Numba's maximum (``NUMBA_NUM_THREADS``, by default the number of cores). As long
        as neither is set, a container uses no more than its CPU quota.

    Raises
    ------
    TypeError, ValueError
        If ``n`` is not an integer, or not in that range; the count is then as before.

    Examples
    --------
    >>> import numbanorm
    >>> before = numbanorm.get_num_threads()
    >>> numbanorm.set_num_threads(1)
    >>> numbanorm.get_num_threads()
    1
    >>> numbanorm.set_num_threads(before)
    """
    global _num_threads
    most = numba.config.NUMBA_NUM_THREADS
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n: an integer from 1 to {most} is needed, got {n!r}")
    n = n.__index__()
    if not 1 <= n <= most:
        raise ValueError(
            f"n: from 1 to {most} threads are possible, got {n}; for more, set the environment "
            f"variable NUMBA_NUM_THREADS before Numba is imported"
        )
    _num_threads = n


def get_num_threads() -> int:
    """Return the number of threads that the kernels use.

    It is 1 in a forked child where Numba's threads are not to be had.

    Examples
    --------
    >>> import numbanorm
    >>> numbanorm.get_num_threads() >= 1
    True
    """
    if _lost_threads:
        return 1
    if _num_threads is not None:
        return _num_threads
    if threading_layer() is None:
        return int(numba.config.NUMBA_NUM_THREADS)
    return int(_thread_count().get())


def threading_layer() -> str | None:
    """Return the name of Numba's threading layer, or None before its first parallel call."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None


def _load_tbb() -> None:
    # pip puts the library into the environment's lib folder, which the loader does not search;
    # Numba would then fall back to another layer. Once loaded by its path, it is found by name.
    if numba.config.THREADING_LAYER in ("omp", "workqueue"):
        return
    name = "tbb12.dll" if sys.platform == "win32" else "libtbb.so.12"
    candidates = [Path(sys.prefix, "lib", name), Path(sys.prefix, "Library", "bin", name)]
    if not any(path.exists() for path in candidates):
        try:
            files = importlib.metadata.files("tbb") or []
        except importlib.metadata.PackageNotFoundError:
            return
        candidates = [Path(str(file.locate())) for file in files if file.name == name]
    for path in candidates:
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            return


def use_openmp(libraries: Iterable[Path]) -> None:
    """Have calls within :class:`thread_count` run on the threads of GNU OpenMP, if it is there.

    Not where a layer of Numba's was asked for.
    """
    global _openmp
    asked_for = numba.config.THREADING_LAYER != "default"
    if not asked_for and "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        _openmp = private.has("launch") and any(map(openmp.load, libraries))


# A thread that compiles or starts Numba's threads has locks that nobody would release in a child.
_fork_locks: list[Any] = [lock for lock in (_lock, private.compiler_lock()) if lock is not None]


def hold_while_forking(lock: threading.Lock) -> None:
    """Have no thread hold a lock while the process forks: nobody would release it in a child."""
    _fork_locks.append(lock)


def _before_fork() -> None:
    for lock in _fork_locks:
        lock.acquire()


def _after_fork() -> None:
    for lock in reversed(_fork_locks):
        lock.release()


def _after_fork_in_child() -> None:
    global _lost_threads, _lost_openmp
    _after_fork()
    # PyTorch may have used the threads that the child has not; it would wait for them for ever.
    _lost_openmp = _openmp
    layer = threading_layer()
    # Before a fork Numba ends tbb's threads and then starts them again, which only works in the
    # thread that started them, and if no other has used them. GNU OpenMP kills the child.
    restarted = layer == "tbb" and _only_user == threading.get_ident()
    _lost_threads = _lost_threads or not (layer is None or restarted)


_load_tbb()
# Runs before modules are taken apart.
atexit.register(private.keep_tbb)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork,
        after_in_child=_after_fork_in_child,
    )
