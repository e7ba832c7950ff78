"""Compiling: kernels are kept on disk, a file for each kernel and each choice of argument types.

Numba's own cache keeps an index for each function. Two processes that fill one at once can mix up
its entries; a damaged file, a full disk or a folder that cannot be written to raises. Here the
name of a file says what it is for and of which source, and a checksum says that it is whole. What
cannot be read is compiled; what cannot be written is compiled again by the next process.

What is read is run. So files are read that this user or root has written, in a folder that nobody
else can write to; the checksum is that of the name, too, lest a file is put in another's place.
"""

import contextlib
import errno
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
    own, user = package / "__pycache__" / package.name, _user_folder(package.name)
    # Without a home, the path starts with a tilde.
    return [own, user] if user.is_absolute() else [own]


def _user_folder(name: str) -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or "~", name, "Cache")
    if sys.platform == "darwin":
        return Path("~/Library/Caches", name).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", name).expanduser()


def is_writable(folder: Path) -> bool:
    """Tell whether kernels can be kept in a folder, which is made if need be."""
    try:
        _make(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _make(folder: Path) -> None:
    """Make a folder for this user alone, and those around it; raise if others may write to it."""
    if not folder.is_dir():
        if not folder.parent.is_dir():
            _make(folder.parent)
        of_python = folder.name == "__pycache__"
        with contextlib.suppress(FileExistsError):  # as of another process
            folder.mkdir(0o777 if of_python else 0o700)
            if not of_python:
                folder.chmod(0o700)  # whatever the umask
    if folder.name != "__pycache__":
        problem = _problem_of_trust(folder.stat())
        if problem:
            raise PermissionError(errno.EPERM, problem)


def _problem_of_trust(stat: os.stat_result) -> str:
    """Return why a file or a folder may hold what others have written, "" if it does not."""
    if not hasattr(os, "geteuid"):
        return ""
    if stat.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {stat.st_uid}"
    mode = stat.st_mode & 0o777
    return f"others can write to it, mode {mode:o}" if mode & 0o022 else ""


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


def digest_of_modules(*modules: str) -> bytes:
    """Return a digest of the code of these modules alone."""
    return hashlib.sha256(b"".join(_code_of_module(name)[0] for name in modules)).digest()


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
            name = self.file_name(signature, target_context)
        except Exception as error:
            private.lose("disk", repr(error))
            return None
        content = _read(name)
        if content is not None:
            try:
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


def _checksum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()


def _read(name: str) -> bytes | None:
    problems = []
    for folder in folders():
        with contextlib.suppress(OSError), open(folder / name, "rb") as file:
            places = (folder, folder.stat()), (folder / name, os.fstat(file.fileno()))
            distrusted = [f"{path}: {p}" for path, stat in places if (p := _problem_of_trust(stat))]
            if distrusted:
                problems += distrusted
                continue
            checksum, content = file.read(32), file.read()
            if checksum == _checksum(name, content):
                return content
    if problems:
        _warn(
            f"numbanorm does not read compiled kernels that others may have written "
            f"({'; '.join(problems)}), and compiles them anew; take that right from others if the "
            f"files are yours (chmod -R go-w), or"
        )
    return None


def _write(name: str, content: bytes) -> None:
    problems = []
    for folder in folders():
        unfinished = folder / f"{name}.{os.urandom(8).hex()}"
        try:
            _make(folder)
            with open(unfinished, "xb", opener=_open_own) as file:
                file.write(_checksum(name, content) + content)
            unfinished.replace(folder / name)
            _make_room(folder, name)
            return
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()
    _warn(
        f"numbanorm cannot keep its compiled kernels ({'; '.join(problems)}), and every "
        f"process compiles them anew;"
    )


def _open_own(path: str, flags: int) -> int:
    """Open a new file that is this user's alone, whatever the umask."""
    descriptor = os.open(path, flags, 0o600)
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, 0o600)
    return descriptor


def _warn(problem: str) -> None:
    """Warn once, and say what would do."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"{problem} set the environment variable NUMBA_CACHE_DIR to a folder of your own that "
            f"can be written to, or that python -m numbanorm warmup has filled",
            RuntimeWarning,
            stacklevel=2,
        )


def _make_room(folder: Path, name: str) -> None:
    """Remove old files of the same kernel, of another source."""
    for file in folder.glob(f"{name.rpartition('-')[0]}-*.nbc"):
        with contextlib.suppress(OSError):
            if file.name != name and file.stat().st_mtime < time.time() - _OLD:
                file.unlink()
