"""Compiling: kernels are kept on disk, a file for each kernel and each choice of argument types.

Numba's own cache keeps an index for each function. Two processes that fill one at once can mix up
its entries; a damaged file, a full disk or a folder that cannot be written to raises. Here the
name of a file says what it is for and of which source, and a checksum says that it is whole. What
cannot be read is compiled; what cannot be written is compiled again by the next process.
"""

import contextlib
import functools
import gc
import hashlib
import inspect
import opcode
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import numba

from numbanorm.numba_ext import private

# What Numba compiles differently, see its reference of environment variables.
_SETTINGS = ("BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE")
# Seconds after which a file of another source makes room: there may be several copies of the
# library that share a folder, each with files of its own.
_OLD = 30 * 86400

_has_warned = False

T = TypeVar("T")


def cached_njit(**flags: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return ``numba.njit(**flags)``, whose kernels are kept on disk."""

    def compiled(function: Callable[..., Any]) -> Any:
        kernel = numba.njit(**flags)(function)
        if kernel is function:  # NUMBA_DISABLE_JIT is set
            return kernel
        if not hasattr(kernel, "_cache"):
            private.lose("disk", "numba.core.dispatcher.Dispatcher._cache is missing")
        if private.has("disk"):
            # As numba.njit(cache=True) does, with a cache of its own.
            kernel._cache = KernelCache(function)
        kernel.compile = uninterrupted(_uncollected(kernel.compile))
        return kernel

    return compiled


def _uncollected(function: Callable[..., T]) -> Callable[..., T]:
    """Return a function during which Python looks for no garbage.

    Numba makes many objects that live on: looking for garbage took 10 % of the compile time.
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
    if numba.config.CACHE_DIR:
        return [Path(numba.config.CACHE_DIR, package.name)]
    # Without a home, the path starts with a tilde.
    return [package / "__pycache__", *(f for f in [_user_folder(package.name)] if f.is_absolute())]


def _user_folder(name: str) -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or "~", name, "Cache")
    if sys.platform == "darwin":
        return Path("~/Library/Caches", name).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", name).expanduser()


def is_writable(folder: Path) -> bool:
    """Tell whether files can be written to a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


# -- What a kernel is compiled from --------------------------------------------------------------


def _digest_of_source(module: str) -> bytes:
    """Return a digest of a module and of all that it imports of the package.

    It is that of the code as it is imported: comments and docstrings are not part of it.
    """
    digests: dict[str, bytes] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in digests:
            digests[name], imports = _code_of_module(name)
            todo += imports
    content = b"".join(name.encode() + digest for name, digest in sorted(digests.items()))
    return hashlib.sha256(content).digest()


@functools.cache
def _code_of_module(name: str) -> tuple[bytes, list[str]]:
    """Return a digest of a module's own code, and what it imports of its package."""
    try:
        # A module may be there as source, compiled, in a zip file, ...
        module: Any = sys.modules[name]
        code = module.__spec__.loader.get_code(name)
    except (AttributeError, ImportError, OSError, SyntaxError):
        code = None
    if code is None:
        # Nothing says which source a kernel is of, so that no file must fit.
        return os.urandom(32), []
    package = name.partition(".")[0]
    names = set(_names_of(code))
    modules = {other for other in names if other.partition(".")[0] == package} - {package}
    # from a import b: b may be a module of a.
    inner = {f"{a}.{b}" for a in {package, *modules} & names for b in names}
    imports = [other for other in modules | inner if other in sys.modules]
    return hashlib.sha256(repr(_meaning(code)).encode()).digest(), imports


def _codes(code: CodeType) -> Iterable[CodeType]:
    return (value for value in code.co_consts if isinstance(value, CodeType))


def _names_of(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for inner in _codes(code):
        yield from _names_of(inner)


def _meaning(code: CodeType) -> Any:
    """Return what code does, whatever its lines and docstrings are."""
    constants, instructions = list(code.co_consts), bytearray(code.co_code)
    if code.co_flags & inspect.CO_OPTIMIZED:
        # The docstring of a function is the first constant.
        if constants and isinstance(constants[0], str) and not code.co_name.startswith("<"):
            constants[0] = None
    else:
        # Those of modules and classes are stored, and so is a line number from Python 3.13 on.
        for name in {"__doc__", "__firstlineno__"} & set(code.co_names):
            store = bytes([opcode.opmap["STORE_NAME"], code.co_names.index(name)])
            places = range(2, len(instructions), 2)
            at = next((k for k in places if instructions[k : k + 2] == store), None)
            if at is not None:
                if instructions[at - 2] == opcode.opmap["LOAD_CONST"]:
                    constants[instructions[at - 1]] = None
                instructions[at - 1] = 0
    return (
        code.co_name, code.co_flags, code.co_argcount, code.co_posonlyargcount,
        code.co_kwonlyargcount, bytes(instructions), code.co_exceptiontable, code.co_names,
        code.co_varnames, code.co_freevars, code.co_cellvars, [_constant(c) for c in constants],
    )  # fmt: skip


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _meaning(value)
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    # The order of a set changes from process to process.
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value


# -- Files ---------------------------------------------------------------------------------------


class KernelCache:
    """What Numba asks of a cache, for one kernel."""

    def __init__(self, function: Any) -> None:
        self._kernel = function.__qualname__
        # Now, and not once a file is needed: the source may be edited while the process runs.
        self._source = _digest_of_source(function.__module__)

    @property
    def cache_path(self) -> str:
        """The folder that is written to, if it can be."""
        return str(folders()[0])

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled kernel for this signature, or None."""
        if not private.has("disk"):
            return None
        try:
            content = _read(self.file_name(signature, target_context))
            if content is not None:
                return private.unpack_compiled(target_context, content)
        except Exception as error:
            private.lose("disk", repr(error))
            return None
        lost = private.lost()
        private.run_self_tests()
        if private.lost() == lost:
            return None
        return self.load_overload(signature, target_context)

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a compiled kernel, unless addresses of this process are part of it."""
        if not private.has("disk"):
            return
        try:
            content = private.pack_compiled(compiled)
            name = self.file_name(signature, compiled.target_context)
        except Exception as error:
            private.lose("disk", repr(error))
            return
        if content is not None:
            _write(name, content)

    def flush(self) -> None:
        """Do nothing."""

    def file_name(self, signature: Any, target_context: Any) -> str:
        """Return the name of the file for this signature."""
        types = getattr(signature, "args", signature)
        settings = [getattr(numba.config, name, None) for name in _SETTINGS]
        versions = sys.implementation.cache_tag, numba.__version__, private.lost()
        key = repr((self._kernel, types, settings, private.machine(target_context), versions))
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return f"{self._kernel}-{digest}-{self._source.hex()[:16]}.nbc"


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


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
            _make_room(folder, name)
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


def _make_room(folder: Path, name: str) -> None:
    """Remove old files of the same kernel, of another source."""
    for file in folder.glob(f"{name.rpartition('-')[0]}-*.nbc"):
        with contextlib.suppress(OSError):
            if file.name != name and file.stat().st_mtime < time.time() - _OLD:
                file.unlink()
