"""Threads: loads the threading layer, counts threads, and picks the serial or the parallel twin.

Numba's tbb layer alone is safe for several Python threads at once and in a forked child. Where it
cannot be had, a lock keeps Python threads from entering a workqueue together, and a forked child
of a process that ran another layer uses the serial kernels.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numba

# Below this many elements a parallel launch (10 to 50 µs) costs more than it saves.
PARALLEL_FROM = 1 << 16

_num_threads: int | None = None
_in_unsafe_child = False
_lock = threading.RLock()


class Twins(Protocol):
    """One kernel compiled twice: for a single thread, and for all of them."""

    @property
    def serial(self) -> Any:
        """The kernel for a single thread."""

    @property
    def parallel(self) -> Any:
        """The kernel for all threads."""


def run(kernel: Twins, size: int, *args: object) -> None:
    """Call the twin of ``kernel`` that suits ``size`` elements; both give the same bits."""
    if size < PARALLEL_FROM or _in_unsafe_child:
        kernel.serial(*args)
        return
    with _exclusive(), _thread_count():
        kernel.parallel(*args)


def set_num_threads(n: int) -> None:
    """Set how many threads the kernels use, in every Python thread.

    Results do not depend on it.

    Parameters
    ----------
    n : int
        From 1 to Numba's maximum (``NUMBA_NUM_THREADS``, by default the number of cores).

    Raises
    ------
    TypeError, ValueError
        If ``n`` is not an integer, or not in that range; the count is then as before.

    Examples
    --------
    >>> import numbanorm
    >>> numbanorm.set_num_threads(1)
    >>> numbanorm.get_num_threads()
    1
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

    Examples
    --------
    >>> import numbanorm
    >>> numbanorm.get_num_threads() >= 1
    True
    """
    return int(numba.get_num_threads()) if _num_threads is None else _num_threads


def threading_layer() -> str | None:
    """Return the name of Numba's threading layer, or None before its first parallel call."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None


@contextlib.contextmanager
def _thread_count() -> Iterator[None]:
    # Numba keeps one count per Python thread; the caller's is left as it was.
    before = numba.get_num_threads()
    if _num_threads is None or _num_threads == before:
        yield
        return
    numba.set_num_threads(_num_threads)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def _exclusive() -> contextlib.AbstractContextManager[Any]:
    # Two Python threads in a workqueue at once abort the process ("Concurrent access has been
    # detected"). Until the first launch it is not known which layer there will be.
    return _lock if threading_layer() in (None, "workqueue") else contextlib.nullcontext()


def _load_tbb() -> None:
    # pip puts the library into the environment's lib folder, which the loader does not search;
    # Numba would then fall back to another layer. Once loaded by its path, it is found by name.
    if os.environ.get("NUMBA_THREADING_LAYER", "tbb") not in ("default", "safe", "tbb"):
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


def _after_fork() -> None:
    global _lock, _in_unsafe_child
    _lock = threading.RLock()  # the parent's may be held by a thread that does not exist here
    _in_unsafe_child = _in_unsafe_child or threading_layer() not in (None, "tbb")


_load_tbb()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
