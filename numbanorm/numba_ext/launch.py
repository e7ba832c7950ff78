"""How a kernel runs on several threads: each of them calls it for a share of its tasks.

Numba compiles a parallel function four times over on its way, and once more for a serial one. A
kernel here is compiled once, and is itself what the threads call: the same machine code for any
number of threads. It begins with ``begin, end = thread_range(threads, n_tasks)`` and loops over
these tasks. A call for all threads has ``launch`` call the kernel itself for each share, and gets
an empty range.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from numbanorm.numba_ext import private
from numbanorm.numba_ext.cache import cached_njit
from numbanorm.numba_ext.jit import FLAGS, KERNELS

# What Python calls a kernel with for all tasks, in its own thread.
SERIAL = 0, 0, 1


def in_threads(launcher: int, n: int) -> tuple[int, int, int]:
    """Return what Python calls a kernel with for n shares, by ``launch`` at an address."""
    return launcher, -1, n


def one_share(i: int, n: int) -> tuple[int, int, int]:
    """Return what Python calls a kernel with for share ``i`` of ``n``, in its own thread."""
    return 0, i, n


@intrinsic
def call_share(typing_context: Any, function: Any, i: Any, n: Any, args: Any) -> Any:
    """Call the function at an address for share ``i`` of ``n``, with the kernel's arguments."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        private.call_address(context, builder, args[0], args[1:])
        return context.get_dummy_value()

    return types.none(types.intp, *private.THREE), generate


@cached_njit(parallel=True, **FLAGS)
def launch(function: Any, n: Any, args: Any) -> None:
    """Call the function at this address for shares 0 to n - 1, each in a thread."""
    for i in prange(n):
        call_share(function, i, n, args)


if private.has("launch"):
    KERNELS["launch"] = launch


@intrinsic
def thread_range(typing_context: Any, threads: Any, n_tasks: Any) -> Any:
    """Return the first task of a share, and the one after its last.

    ``threads``, the first argument of the kernel, is the address of ``launch`` or 0, the
    number of the share or -1 for all of them, and how many there are.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        private.align_stack(builder.function)
        threads, n_tasks = args
        launcher, i, n = private.unpack(builder, threads, 3)
        zero, one = ir.Constant(i.type, 0), ir.Constant(i.type, 1)
        if private.has("launch"):
            with builder.if_then(builder.icmp_signed("<", i, zero), likely=False):
                share = private.Share(context, builder)
                private.call_address(context, builder, launcher, (share.function, n, share.args))
                share.raise_first()
            # Share -1 has as many tasks as none: from 0 to 0.
            n_tasks = builder.select(builder.icmp_signed("<", i, zero), zero, n_tasks)
        ends = [builder.sdiv(builder.mul(k, n_tasks), n) for k in (i, builder.add(i, one))]
        return private.pack(builder, ends)

    return types.UniTuple(types.intp, 2)(types.UniTuple(types.intp, 3), types.intp), generate


@private.self_test("launch")
def _test_launch() -> bool:
    """Have a kernel call itself for two shares, one of which fails."""

    @njit(**FLAGS)
    def kernel(threads: Any, fails: Any, done: Any) -> None:
        begin, end = thread_range(threads, 5)
        for task in range(begin, end):
            if task == fails:
                raise ValueError
            done[task] += 1

    @njit(**FLAGS)
    def launch_one_by_one(function: Any, n: Any, args: Any) -> None:
        for i in range(n):
            call_share(function, i, n, args)

    threads = in_threads(private.address_of_compiled(launch_one_by_one, private.THREE), 2)
    done = np.zeros(5)
    kernel(threads, -1, done)
    try:
        kernel(threads, 3, done)
    except ValueError:
        return done.tolist() == [2, 2, 2, 1, 1]
    return False


if numba.config.DISABLE_JIT:
    # Kernels are Python functions then.

    def thread_range(threads: tuple[int, int, int], n_tasks: int) -> tuple[int, int]:
        """Return the first task, and the one after the last."""
        _, i, n = threads
        return i * n_tasks // n, (i + 1) * n_tasks // n
