"""How everything that Numba compiles is compiled: all flags stand here."""

from typing import Any

from numba import njit, types
from numba.extending import overload

from numbanorm.numba_ext import private
from numbanorm.numba_ext.cache import cached_njit

# With the numpy error model no division is tested for zero, which would keep loops scalar. No
# function written in C calls a kernel. No reference to an array is counted: that takes as long as a
# short row, and long to compile. What a kernel allocates it has to release.
FLAGS: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", **private.known(no_cfunc_wrapper=True, _nrt=False),
    **private.compiler(),
}  # fmt: skip
# What only kernels call: there is no way in from elsewhere.
CALLED: dict[str, Any] = {**FLAGS, **private.compiler(inlined=True)}
# What a kernel calls for each row must be inlined: passing arrays costs more than a short row.
INLINE: dict[str, Any] = {**private.known(forceinline=True), **CALLED}

# All kernels by name.
KERNELS: dict[str, Any] = {}


def kernel(function: Any) -> Any:
    """Compile what Python calls, and keep it on disk."""
    compiled = cached_njit(**FLAGS)(function)
    KERNELS[function.__name__] = compiled
    return compiled


# What kernels call; the last may round a product and a sum of it together.
called = njit(**CALLED)
inline = njit(**INLINE)
inline_contract = njit(**{**INLINE, "fastmath": {"contract"}})


def by_type(choose: Any) -> Any:
    """Return a function that is another one for each choice of types, as ``choose`` says.

    ``choose`` returns a Python function, which is inlined, for types of arguments where kernels are
    compiled, and for arguments where they are Python functions. ``if x is None`` does not do where
    the types of its branches differ: Numba finds types for both where x is not None.
    """

    def call(*args: Any) -> Any:
        return choose(*args)(*args)

    @overload(call, jit_options=INLINE, strict=False)
    def compiled(*args: Any) -> Any:
        return choose(*args)

    return call


def by_record(functions: dict[type, Any]) -> Any:
    """Return a function that is one of several, by its first argument, a record or None."""

    def choose(first: Any, *_: Any) -> Any:
        kind = getattr(first, "instance_class", type(first))
        return functions[type(None) if kind is types.NoneType else kind]

    return by_type(choose)


def if_none(when_none: Any, otherwise: Any) -> Any:
    """Return a function that is one of two, by whether its first argument is None.

    Where both return the same type, ``if x is None`` does, of an argument x itself: of None, Numba
    leaves out the other branch.
    """

    def choose(first: Any, *_: Any) -> Any:
        is_none = first is None or isinstance(first, types.NoneType)
        return when_none if is_none else otherwise

    return by_type(choose)


@private.self_test("compiler")
def _test_compiler() -> bool:
    """Compile a function that is linked into another, a branch by type, and loops."""

    @njit(**INLINE)
    def inner(x: Any, y: Any) -> Any:
        return (x, x + 1) if y is None else (x, y)

    @njit(**FLAGS)
    def outer(x: Any, y: Any) -> Any:
        for value in inner(x, y):
            if value < 0:
                raise ValueError
            for _ in range(int(value)):
                x += value
        return x

    return bool(outer(1.0, None) == 6 and outer(1.0, 2.5) == 7)
