"""Compile every kernel into the cache: which there are, and several at a time."""

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

import numba
import numpy as np

from numbanorm.layers import BatchNorm, LayerNorm, Norm, SwitchableNorm
from numbanorm.moments import moments
from numbanorm.numba_ext.halves import BFLOAT16, FLOAT16
from numbanorm.numba_ext.jit import KERNELS
from numbanorm.numba_ext.threads import recording
from numbanorm.tuning import use


class Task(NamedTuple):
    """A kernel and the types of its arguments, for one type of x."""

    kernel: str
    signatures: list[tuple[Any, ...]]

    def compile(self) -> None:
        """Compile the kernel, unless it is in the cache."""
        for signature in self.signatures:
            KERNELS[self.kernel].compile(signature)


def tasks(everything: bool = False) -> list[Task]:
    """Return all kernels with all types of arguments, as layers call them.

    They are those of float32 and float64; if ``everything``, of floats of 16 bits, and with an
    activation and a residual, too.
    """
    names = {id(kernel): name for name, kernel in KERNELS.items()}
    signatures_of: dict[tuple[str, type], dict[tuple[Any, ...], None]] = {}
    if "launch" in KERNELS:
        signatures_of["launch", np.intp] = {(numba.intp,) * 3: None}

    def note(kernel: Any, *args: object) -> None:
        name, signature = names[id(kernel)], tuple(map(numba.typeof, args))
        add(name, signature)
        if dtype is np.float16:
            add(name, tuple(map(_as_bfloat16, signature)))
        for array in args:
            # Nothing is computed, but a layer goes on with the results.
            if isinstance(array, np.ndarray) and array.flags.writeable:
                array.fill(1)

    def add(name: str, signature: tuple[Any, ...]) -> None:
        # The algebra is the same for both types of x.
        if not any(
            signature in others for (other, _), others in signatures_of.items() if other == name
        ):
            signatures_of.setdefault((name, dtype), {})[signature] = None

    either, dtypes = (False, True), [np.float32, np.float64]
    if everything:
        dtypes.append(np.float16)
    for dtype, masked, streamed, fused in itertools.product(
        dtypes, either, either, either if everything else (False,)
    ):
        with recording(note), use(cache_bytes=0 if streamed else None, stream_from=0):
            _call_layers(dtype, masked, "relu" if fused else None)
    todo = [Task(name, list(signatures)) for (name, _), signatures in signatures_of.items()]
    # The longest first, so that all processes end at about the same time.
    return sorted(todo, key=_length, reverse=True)


def _as_bfloat16(argument: Any) -> Any:
    """Return the type of an argument that has bfloat16 for float16: both are stored as integers."""
    if isinstance(argument, numba.types.Array) and argument.dtype == FLOAT16:
        return argument.copy(dtype=BFLOAT16)
    if isinstance(argument, numba.types.BaseTuple):
        return numba.types.Tuple(tuple(map(_as_bfloat16, argument)))
    return argument


def _call_layers(dtype: Any, masked: bool, activation: str | None) -> None:
    """Call layers that take all kernels between them."""
    x = np.ones((2, 2, 2), dtype)
    mask, residual = x > 0 if masked else None, None if activation is None else x
    options: Any = {"dtype": np.float64 if dtype is np.float64 else np.float32}
    options["activation"] = activation
    for layer in (
        BatchNorm(2, axis=-1, **options),
        LayerNorm(2, **options),
        Norm(1, **options),
        SwitchableNorm(2, **options),
        SwitchableNorm(2, axis=-1, **options),
    ):
        layer.forward(x, mask=mask, residual=residual)
        layer.backward(x)
    moments(x) + moments(x)
    # Rows of 2 are seen as columns; so many rows, and such long ones, are in parts.
    for layer, shape in (
        (BatchNorm(2, **options), (2, 2, 1 << 6)),
        (BatchNorm(2, **options), (1 << 18, 2)),
        (LayerNorm(1 << 14, **options), (1, 1 << 14)),
    ):
        x = np.ones(shape, dtype)
        mask, residual = x > 0 if masked else None, None if activation is None else x
        layer.forward(x, mask=mask, residual=residual)
        layer.backward(x)


def _length(task: Task) -> int:
    return len(KERNELS[task.kernel].py_func.__code__.co_code) * len(task.signatures)


def warmup(everything: bool = False) -> int:
    """Compile what :func:`tasks` returns, show how far it is, and return how many kernels it is."""
    todo = tasks(everything)
    n_processes = min(numba.config.NUMBA_DEFAULT_NUM_THREADS, len(todo))
    # Numba compiles in one thread at a time, hence processes; not forked, as threads may run.
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
