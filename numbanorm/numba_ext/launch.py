"""How a kernel runs on several threads: each of them calls it for a share of its tasks.

Numba compiles a parallel function four times over on its way, and once more for a serial twin. A
kernel here is compiled once, and is itself what the threads call: the same machine code for any
number of threads. It begins with ``begin, end = thread_range(threads, n_tasks)`` and loops over
these tasks. Called from Python it has itself called for each share, and has no tasks of its own then.
"""

from typing import Any

import numba
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from numbanorm.numba_ext.cache import cached_njit
from numbanorm.numba_ext.jit import FLAGS, KERNELS

# What Python calls a kernel with: one share, in its own thread.
SERIAL = 0, -1, 1

_THREE = (types.intp,) * 3


def in_threads(launcher: int, n: int) -> tuple[int, int, int]:
    """Return what Python calls a kernel with for n shares, by ``launch`` at an address."""
    return launcher, -1, n


def _call_address(context: Any, builder: Any, address: Any, args: Any) -> None:
    """Call a compiled function of three integers; its exception becomes that of the caller."""
    function_type = context.call_conv.get_function_type(types.none, _THREE)
    function = builder.inttoptr(address, function_type.as_pointer())
    status, _ = context.call_conv.call_function(builder, function, types.none, _THREE, args)
    with builder.if_then(status.is_error, likely=False):
        context.call_conv.return_status_propagate(builder, status)


@intrinsic
def call_share(typing_context: Any, function: Any, i: Any, n: Any, args: Any) -> Any:
    """Call the function at an address for share ``i`` of ``n``, with the kernel's arguments."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call_address(context, builder, args[0], args[1:])
        return context.get_dummy_value()

    return types.none(types.intp, *_THREE), generate


@cached_njit(parallel=True, **FLAGS)
def launch(function: Any, n: Any, args: Any) -> None:
    """Call the function at this address for shares 0 to n - 1, each in a thread."""
    for i in prange(n):
        call_share(function, i, n, args)


KERNELS["launch"] = launch


@intrinsic
def thread_range(typing_context: Any, threads: Any, n_tasks: Any) -> Any:
    """Return the first task of a share, and the one after its last.

    ``threads``, the first argument of the kernel, is the address of ``launch`` or 0, the
    number of the share or -1, and how many there are.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        threads, n_tasks = args
        launcher, i, n = cgutils.unpack_tuple(builder, threads, 3)
        zero, one = ir.Constant(i.type, 0), ir.Constant(i.type, 1)
        bounds = cgutils.alloca_once_value(builder, cgutils.pack_array(builder, [zero, zero]))
        from_python = builder.icmp_signed("<", i, zero)
        with builder.if_else(from_python, likely=False) as (share_out, find_tasks):
            with share_out:
                function, args = _share_of_kernel(context, builder)
                serial = builder.icmp_signed("==", launcher, zero)
                with builder.if_else(serial) as (once, for_each):
                    with once:
                        _call_address(context, builder, function, (zero, n, args))
                    with for_each:
                        _call_address(context, builder, launcher, (function, n, args))
            with find_tasks:
                ends = [builder.sdiv(builder.mul(k, n_tasks), n) for k in (i, builder.add(i, one))]
                builder.store(cgutils.pack_array(builder, ends), bounds)
        return builder.load(bounds)

    return types.UniTuple(types.intp, 2)(types.UniTuple(types.intp, 3), types.intp), generate


def _share_of_kernel(context: Any, builder: Any) -> tuple[Any, Any]:
    """Return two addresses: of a function that calls the kernel for a share, and of its arguments.

    The kernel is the function that is being built. What the other one is called with is which
    share, of how many, and the second address.
    """
    kernel, argument_types = builder.function, context.fndesc.argtypes
    packer = context.get_arg_packer(argument_types)
    # Before its own arguments a compiled function has two, for its result and its exception.
    given = cgutils.pack_struct(builder, packer.from_arguments(builder, kernel.args[2:]))
    function_type = context.call_conv.get_function_type(types.none, _THREE)
    function = ir.Function(builder.module, function_type, f"{kernel.name}.share")
    function.linkage = "internal"
    function.attributes.add("noinline")  # the kernel would be there twice

    inner = ir.IRBuilder(function.append_basic_block())
    *results, i, n, args = function.args
    known = inner.load(inner.inttoptr(args, given.type.as_pointer()))
    values = cgutils.unpack_tuple(inner, known, len(argument_types))
    values[0] = cgutils.pack_array(inner, [ir.Constant(i.type, 0), i, n])
    inner.ret(inner.call(kernel, [*results, *packer.as_arguments(inner, values)]))

    at = cgutils.alloca_once_value(builder, given)
    return builder.ptrtoint(function, i.type), builder.ptrtoint(at, i.type)


if numba.config.DISABLE_JIT:
    # Kernels are Python functions then.

    def thread_range(threads: tuple[int, int, int], n_tasks: int) -> tuple[int, int]:
        """Return the first task, and the one after the last."""
        return 0, n_tasks
