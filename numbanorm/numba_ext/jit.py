"""How everything that Numba compiles is compiled: all flags stand here."""

from typing import Any

from numba import njit

from numbanorm.numba_ext.cache import InlinedCompiler, cached_njit

# With the numpy error model no division is tested for zero, which would keep loops scalar. No
# function written in C calls a kernel. No reference to an array is counted: that takes as long as a
# short row, and long to compile. What a kernel allocates it has to release.
FLAGS: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False,
}  # fmt: skip
# What only kernels call: there is no way in from elsewhere.
CALLED: dict[str, Any] = {"pipeline_class": InlinedCompiler, "no_cpython_wrapper": True, **FLAGS}
# What a kernel calls for each row must be inlined: passing arrays costs more than a short row.
INLINE: dict[str, Any] = {"forceinline": True, **CALLED}

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
