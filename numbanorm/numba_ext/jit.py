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
}  # fmt: skip
# What only kernels call: there is no way in from elsewhere.
CALLED: dict[str, Any] = {**private.inlined(), **FLAGS}
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
    compiled, and for arguments where they are Python functions. ``if x is None`` does not do: where
    x is not None Numba finds types for both of its branches.
    """

    def call(*args: Any) -> Any:
        return choose(*args)(*args)

    @overload(call, jit_options=INLINE, strict=False)
    def compiled(*args: Any) -> Any:
        return choose(*args)

    return call


def if_none(when_none: Any, otherwise: Any) -> Any:
    """Return a function that is one of two, by whether its first argument is None."""

    def choose(first: Any, *_: Any) -> Any:
        is_none = first is None or isinstance(first, types.NoneType)
        return when_none if is_none else otherwise

    return by_type(choose)


@private.self_test("inlining")
def _test_inlining() -> bool:
    """Compile a function that is linked into another."""

    @njit(**INLINE)
    def inner(x: Any) -> Any:
        return x + 1

    @njit(**FLAGS)
    def outer(x: Any) -> Any:
        return 2 * inner(x)

    return bool(outer(1.5) == 5)
