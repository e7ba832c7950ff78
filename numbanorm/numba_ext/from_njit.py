"""Python functions of the library that the user's own compiled code can call.

The call goes through the interpreter, by the one road that layers and functions take: the user's
code waits for no kernel to be compiled, its numbers are theirs, and what it holds of this library
is how arguments become Python's objects and results arrays. Numba keeps that in the user's cache,
and looks at the user's file alone to tell whether it is stale (numba#1833); but it keeps the
:class:`Callback`, too, which cannot be loaded into another version: the code is compiled anew then.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload, register_jitable

from numbanorm.numba_ext import private
from numbanorm.numba_ext.cache import digest_of_modules
from numbanorm.numba_ext.threads import thread_count

AFunction = TypeVar("AFunction", bound=Callable[..., Any])


class Callback:
    """What compiled code calls: a function that returns a message or a result."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, has_gil: int, *args: Any) -> tuple[str, Any]:
        """Call the function, in one thread if this one is Numba's.

        A parallel loop lets go of the interpreter's lock; within one no other may begin.
        """
        try:
            if has_gil:
                return "", self._function(*args)
            with thread_count(1):
                return "", self._function(*args)
        except ValueError as error:
            return str(error), None

    def __reduce__(self) -> Any:
        """Go by name, and by what the calling code was made by."""
        name = self._function.__module__, self._function.__name__
        return _load_callback, (*name, _digest(self._function.__module__))


class _StaleError(OSError):
    """What Numba takes for a cache without this file."""


# Users' caches have the name of this module, and of this function: both have to stay.
def _load_callback(module: str, name: str, digest: bytes) -> Callback:
    function = getattr(importlib.import_module(module), name, None)
    if function is None or digest != _digest(module):
        raise _StaleError(f"{module}.{name} is called by code of another version of the library")
    return Callback(function)


def _digest(module: str) -> bytes:
    """Return a digest of what makes the calling code; the package itself has the version."""
    package = module.partition(".")[0]
    return digest_of_modules(package, module, __name__, private.__name__)


def from_njit(result: Callable[..., Any]) -> Callable[[AFunction], AFunction]:
    """Have compiled code call a Python function whose first argument is an array of floats.

    ``result`` returns Numba's type of the function's result for the types of its arguments.
    """

    def declare(function: AFunction) -> AFunction:
        if not private.has("python"):
            return function
        signature = inspect.signature(function)
        names = ", ".join(signature.parameters)

        @overload(function, strict=False)
        def compiled(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).args
            _check_types(signature, given)
            context = {"checked": _checked, "call": _call(function, result(*given))}
            # Numba takes the names of arguments from the code of a function.
            caller = eval(f"lambda {names}: checked(call(({names},)))", {**globals(), **context})
            # And the name of its symbol, which caches of several files may bring into one process.
            digest = _digest(function.__module__).hex()[:16]
            caller.__name__ = caller.__qualname__ = f"{function.__name__}_{digest}"
            return caller

        return function

    return declare


def _check_types(signature: inspect.Signature, given: tuple[Any, ...]) -> None:
    """Raise at compile time what the function would raise a TypeError for."""
    for k, (name, kind) in enumerate(zip(signature.parameters, given, strict=False)):
        is_array = isinstance(kind, types.Array)
        # Numba has arrays of float16, but cannot compile with them.
        fits = is_array and kind.dtype in (types.float32, types.float64)
        if (k == 0 or is_array) and not fits:
            raise TypingError(f"{name}: an array of float32 or float64 is needed, got {kind}")


@register_jitable
def _checked(outcome: Any) -> Any:
    message, result = outcome
    if message:
        raise ValueError(message)
    return result


def _call(function: Callable[..., Any], result_type: Any) -> Any:
    """Return an intrinsic that calls a function with a tuple of arguments, by a Callback."""
    callback = Callback(function)
    optional = types.Optional(result_type)
    outcome = types.Tuple((types.unicode_type, optional))

    @intrinsic
    def call(typing_context: Any, args: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            arguments = private.unpack(builder, values[0], len(args))
            returned = private.call_python(context, builder, callback, args, arguments, outcome)
            message, result = private.unpack(builder, returned, 2)
            # Zeros where there is none.
            result = context.make_helper(builder, optional, result).data
            return context.make_tuple(builder, signature.return_type, [message, result])

        return types.Tuple((types.unicode_type, result_type))(args), generate

    return call
