"""Compiling: kernels are kept on disk, a file for each kernel and each choice of argument types.

Numba's own cache keeps an index for each function. Two processes that fill one at once can mix up
its entries; a damaged file, a full disk or a folder that cannot be written to raises. Here the
name of a file says what it is for, and a checksum says that it is whole and of this source. What
cannot be read is compiled; what cannot be written is compiled again by the next process.
"""

import contextlib
import functools
import gc
import hashlib
import os
import pickle
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature
from numba.misc.appdirs import AppDirs

# What Numba compiles differently, see its reference of environment variables.
_SETTINGS = ("BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE")

try:
    # Read while it is imported, and not again: it may be edited while the process runs.
    _SOURCE = b"".join(
        file.read_bytes()
        for folder in ("kernels", "numba_ext", "")
        for file in sorted((Path(__file__).parents[1] / folder).glob("*.py"))
        if folder or file.stem == "tuning"
    )
except OSError:
    # Nothing says which source a file is of, so that none must fit.
    _SOURCE = os.urandom(32)

_has_warned = False

T = TypeVar("T")


def cached_njit(**flags: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return ``numba.njit(**flags)``, whose kernels are kept on disk."""

    def compiled(function: Callable[..., Any]) -> Any:
        kernel = numba.njit(**flags)(function)
        if kernel is function:  # NUMBA_DISABLE_JIT is set
            return kernel
        # As numba.njit(cache=True) does, with a cache of its own.
        kernel._cache = KernelCache(function.__qualname__)
        kernel.compile = uninterrupted(_uncollected(kernel.compile))
        return kernel

    return compiled


class _InlinedLibrary(JITCodeLibrary):
    """The code of a function that is only linked into others, and is compiled with them.

    Numba would make machine code of it that nobody calls. It is optimised all the same before it is
    linked: kernels with short rows take a twentieth longer else.
    """

    def _finalize_final_module(self) -> None:
        self._finalized = True

    @property
    def codegen(self) -> Any:
        """What keeps the environments of functions that Python calls: this is none."""
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Do nothing."""


class InlinedCompiler(Compiler):
    """Compiles what only kernels call: ``pipeline_class`` of ``numba.njit``."""

    def __init__(self, typing_context: Any, target_context: Any, library: Any, *rest: Any) -> None:
        if library is None:
            library = _InlinedLibrary(target_context.codegen(), "inlined")
            library.enable_object_caching()
        super().__init__(typing_context, target_context, library, *rest)


def _uncollected(function: Callable[..., T]) -> Callable[..., T]:
    """Return a function during which Python looks for no garbage.

    Numba makes so many objects, which live on, that a tenth of the time went into that.
    """

    @functools.wraps(function)
    def call(*args: Any) -> T:
        if not gc.isenabled():
            return function(*args)
        gc.disable()
        try:
            return function(*args)
        finally:
            gc.enable()

    return call


def uninterrupted(function: Callable[..., T]) -> Callable[..., T]:
    """Return a function that Ctrl-C interrupts at its end only.

    Numba cannot compile again after a KeyboardInterrupt in the middle, and locks may stay behind.
    """

    @functools.wraps(function)
    def call(*args: Any) -> T:
        handler = signal.getsignal(signal.SIGINT)
        # None is a handler that is not Python's.
        if handler is None or threading.current_thread() is not threading.main_thread():
            return function(*args)
        pressed = threading.Event()
        signal.signal(signal.SIGINT, lambda *_: pressed.set())
        try:
            return function(*args)
        finally:
            signal.signal(signal.SIGINT, handler)
            if pressed.is_set():
                signal.raise_signal(signal.SIGINT)

    return call


def folders() -> list[Path]:
    """Return where compiled kernels are looked for, and written to the first that takes them."""
    package = Path(__file__).resolve().parents[1]
    # Several copies of the library may share a folder.
    name = f"{package.name}-{hashlib.sha256(os.fsencode(package)).hexdigest()[:16]}"
    if numba.config.CACHE_DIR:
        return [Path(numba.config.CACHE_DIR, name)]
    user = Path(AppDirs("numba", False).user_cache_dir, name)
    # Without a home, the path starts with a tilde.
    return [package / "__pycache__", *([user] if user.is_absolute() else [])]


def is_writable(folder: Path) -> bool:
    """Tell whether files can be written to a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


class KernelCache:
    """What Numba asks of a cache, for one kernel."""

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel

    @property
    def cache_path(self) -> str:
        """The folder that is written to, if it can be."""
        return str(folders()[0])

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled kernel for this signature, or None."""
        target_context.refresh()
        content = _read(self._file_name(signature, target_context.codegen()))
        if content is None:
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(content))

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a compiled kernel, unless addresses of this process are part of it."""
        if not compiled.library.has_dynamic_globals:
            name = self._file_name(signature, compiled.codegen)
            _write(name, dumps(compiled._reduce()))

    def flush(self) -> None:
        """Do nothing; files of another source count as damaged."""

    def _file_name(self, signature: Any, codegen: Any) -> str:
        types, _ = normalize_signature(signature)
        settings = [getattr(numba.config, name, None) for name in _SETTINGS]
        machine = codegen.magic_tuple(), sys.implementation.cache_tag, numba.__version__
        key = repr((self._kernel, types, settings, machine))
        return f"{self._kernel}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.nbc"


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(_SOURCE + content).digest()


def _read(name: str) -> bytes | None:
    for folder in folders():
        with contextlib.suppress(OSError):
            file = (folder / name).read_bytes()
            checksum, content = file[:32], file[32:]
            if checksum == _checksum(content):
                return content
    return None


def _write(name: str, content: bytes) -> None:
    global _has_warned
    problems = []
    for folder in folders():
        unfinished = folder / f"{name}.{os.urandom(8).hex()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(_checksum(content) + content)
            unfinished.replace(folder / name)
            return
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"numbanorm cannot keep its compiled kernels ({'; '.join(problems)}), and every "
            f"process compiles them anew; set the environment variable NUMBA_CACHE_DIR to a folder "
            f"that can be written to",
            RuntimeWarning,
            stacklevel=2,
        )
