"""The threads of GNU OpenMP, for kernels that are called among PyTorch's operations.

PyTorch's threads wait for its next operation, and keep the cores busy with it: those that do are to
run our kernels. As Numba's threading layer they would be that of the whole process, and a forked
child that uses it is killed. Here a kernel is launched by the function that GCC has programs call.
"""

import ctypes
from pathlib import Path
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numbanorm.numba_ext import private
from numbanorm.numba_ext.cache import cached_njit
from numbanorm.numba_ext.jit import FLAGS

# void GOMP_parallel(void (*body)(void *), void *data, unsigned n_threads, unsigned flags) and
# int omp_get_thread_num(void), omp_get_num_threads(void).
_FUNCTIONS = PARALLEL, THREAD_NUM, NUM_THREADS = (
    "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads",
)  # fmt: skip


def load(library: Path) -> bool:
    """Have kernels find the functions of a library; return whether it has them."""
    try:
        functions = [getattr(ctypes.CDLL(str(library)), name) for name in _FUNCTIONS]
    except (OSError, AttributeError):
        return False
    for name, function in zip(_FUNCTIONS, functions, strict=True):
        address = ctypes.cast(function, ctypes.c_void_p).value
        llvmlite.binding.add_symbol(f"numbanorm_{name}", address)
    return True


@intrinsic
def _parallel(typing_context: Any, function: Any, n: Any, args: Any) -> Any:
    """Call the function at an address for shares 0 to n - 1, each in a thread."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()

        def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
            types = (arg.type for arg in args)
            declared = private.declare(builder, f"numbanorm_{name}", result, *types)
            return builder.call(declared, args)

        place = private.on_stack(builder, private.pack(builder, values))
        body_type = ir.FunctionType(ir.VoidType(), [pointer])
        body = ir.Function(builder.module, body_type, f"{builder.function.name}.body")
        body.linkage = "internal"
        n_threads = builder.trunc(values[1], word)
        data = builder.bitcast(place, pointer)
        call(builder, PARALLEL, ir.VoidType(), body, data, n_threads, word(0))

        # A thread does every n_threads-th share: there may be fewer threads than were asked for.
        start, loop, end = map(body.append_basic_block, ("start", "loop", "end"))
        inner = ir.IRBuilder(start)
        shared = inner.load(inner.bitcast(body.args[0], place.type))
        function, n, args = private.unpack(inner, shared, 3)
        first, step = (
            inner.zext(call(inner, name, word), n.type) for name in (THREAD_NUM, NUM_THREADS)
        )
        inner.cbranch(inner.icmp_signed("<", first, n), loop, end)
        inner.position_at_end(loop)
        i = inner.phi(n.type)
        i.add_incoming(first, start)
        private.call_address(context, inner, function, (i, n, args), propagate=False)
        following = inner.add(i, step)
        i.add_incoming(following, inner.block)
        inner.cbranch(inner.icmp_signed("<", following, n), loop, end)
        inner.position_at_end(end)
        inner.ret_void()
        return context.get_dummy_value()

    return types.none(*private.THREE), generate


@cached_njit(**FLAGS)
def launch_openmp(function: Any, n: Any, args: Any) -> None:
    """Call the function at this address for shares 0 to n - 1, each in a thread of OpenMP."""
    _parallel(function, n, args)
