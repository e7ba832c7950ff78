"""Compile every kernel into the cache: which there are, and several at a time."""

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple
from unittest import mock

import numba
import numpy as np

from numbanorm import _kernels, _threads
from numbanorm.layers import BatchNorm, LayerNorm


class Task(NamedTuple):
    """A kernel and the types of its arguments."""

    kernel: str
    twin: str
    types: tuple[Any, ...]

    def compile(self) -> None:
        """Compile the kernel, unless it is in the cache."""
        getattr(getattr(_kernels, self.kernel), self.twin).compile(self.types)


def tasks() -> list[Task]:
    """Return all kernels with all types of arguments, as layers call them."""
    names = {id(kernel): name for name, kernel in vars(_kernels).items()}
    found: dict[Task, None] = {}

    def note(kernel: Any, size: int, *args: object) -> None:
        types = tuple(map(numba.typeof, args))
        found.update(dict.fromkeys(Task(names[id(kernel)], twin, types) for twin in kernel._fields))

    # Nothing is computed: what is taken for results is whatever stood in memory.
    with mock.patch.object(_threads, "run", note), np.errstate(all="ignore"):
        for dtype, masked in itertools.product((np.float32, np.float64), (False, True)):
            x = np.ones((2, 2, 2), dtype)
            mask = x > 0 if masked else None
            for layer in (
                BatchNorm(2, dtype=dtype),
                BatchNorm(2, axis=-1, dtype=dtype),
                LayerNorm(2, dtype=dtype),
            ):
                layer.forward(x, mask=mask)
                layer.backward(x)
    # The parallel twins take longest.
    return sorted(found, key=lambda task: task.twin)


def warmup() -> int:
    """Compile everything, show how far it is, and return how many kernels there are."""
    todo = tasks()
    # Numba compiles in one thread at a time, hence processes; not forked, as threads may run.
    n_processes = min(numba.config.NUMBA_DEFAULT_NUM_THREADS, len(todo))
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(task.compile) for task in todo]
        for future in _progress(as_completed(futures), len(todo)):
            future.result()
    return len(todo)


def _progress(futures: Iterable[Future[None]], total: int) -> Iterator[Future[None]]:
    """Show how many are done: as a bar where tqdm is installed, else in lines."""
    try:
        from tqdm import tqdm
    except ImportError:
        for n, future in enumerate(futures, 1):
            print(f"{n} of {total} kernels", flush=True)
            yield future
    else:
        yield from tqdm(futures, total=total, unit=" kernels")
