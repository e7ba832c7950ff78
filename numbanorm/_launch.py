"""How a kernel runs on several threads: each of them calls it for a share of its tasks.

Numba compiles a parallel function four times over on its way, and once more for a serial twin. A
kernel here is compiled once, and is itself what the threads call: the same machine code for any
number of threads. It begins with ``begin, end = share(threads, n_tasks)`` and loops over these
tasks. Called from Python it has itself called for each share, and has no tasks of its own then.
"""

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

# What Python calls a kernel with: one share, in its own thread.
SERIAL = 0, -1, 1

_THREE = (types.intp,) * 3


def in_threads(launch: int, n: int) -> tuple[int, int, int]:
    """Return what Python calls a kernel with for n shares, by ``_kernels.launch`` at an address."""
    return launch, -1, n


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


@intrinsic
def share(typing_context: Any, threads: Any, n_tasks: Any) -> Any:
    """Return the first task of a share, and the one after its last.

    ``threads``, the first argument of the kernel, is the address of ``_kernels.launch`` or 0, the
    number of the share or -1, and how many there are.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        threads, n_tasks = args
        launch, i, n = cgutils.unpack_tuple(builder, threads, 3)
        zero, one = ir.Constant(i.type, 0), ir.Constant(i.type, 1)
        bounds = cgutils.alloca_once_value(builder, cgutils.pack_array(builder, [zero, zero]))
        from_python = builder.icmp_signed("<", i, zero)
        with builder.if_else(from_python, likely=False) as (share_out, find_tasks):
            with share_out:
                function, args = _share_of_kernel(context, builder)
                serial = builder.icmp_signed("==", launch, zero)
                with builder.if_else(serial) as (once, for_each):
                    with once:
                        _call_address(context, builder, function, (zero, n, args))
                    with for_each:
                        _call_address(context, builder, launch, (function, n, args))
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
    for k, argument_type in enumerate(argument_types):
        # Threads would queue to count references.
        values[k] = _without_owner(context, inner, argument_type, values[k])
    inner.ret(inner.call(kernel, [*results, *packer.as_arguments(inner, values)]))

    at = cgutils.alloca_once_value(builder, given)
    return builder.ptrtoint(function, i.type), builder.ptrtoint(at, i.type)


@intrinsic
def lend(typing_context: Any, arrays: Any) -> Any:
    """Return a tuple of arrays (or None) as arrays without an owner.

    Numba counts references to every view of an array that may have an owner, which takes as long
    as a short row. The owner must live on: see ``keep``.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[0], len(arrays))
        lent = [
            _without_owner(context, builder, array_type, value)
            for array_type, value in zip(arrays, values, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, lent)

    return arrays(arrays), generate


@intrinsic(prefer_literal=True)
def split(typing_context: Any, array: Any, n: Any) -> Any:
    """Return the first n arrays along the first axis of one (n or more, ...), without an owner.

    ``n`` is a literal; of None each is None. A kernel takes one array for several, as each takes a
    call some time.
    """
    number = n.literal_value
    if isinstance(array, types.NoneType):

        def generate_nothing(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.make_tuple(builder, signature.return_type, [args[0]] * number)

        return types.UniTuple(array, number)(array, n), generate_nothing
    seen = types.Array(array.dtype, array.ndim - 1, "C", readonly=not array.mutable)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = context.make_array(array)(context, builder, args[0])
        shape = cgutils.unpack_tuple(builder, whole.shape, array.ndim)[1:]
        step, *strides = cgutils.unpack_tuple(builder, whole.strides, array.ndim)
        arrays = []
        for k in range(number):
            one = context.make_array(seen)(context, builder)
            populate_array(
                one,
                data=cgutils.pointer_add(builder, whole.data, builder.mul(step, step.type(k))),
                shape=cgutils.pack_array(builder, shape),
                strides=cgutils.pack_array(builder, strides),
                itemsize=whole.itemsize,
                meminfo=None,
            )
            arrays.append(one._getvalue())
        return context.make_tuple(builder, signature.return_type, arrays)

    return types.UniTuple(seen, number)(array, n), generate


@intrinsic
def keep(typing_context: Any, arrays: Any) -> Any:
    """Do nothing with a tuple of arrays, which live until here."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.none(arrays), generate


def _without_owner(context: Any, builder: Any, array_type: Any, value: Any) -> Any:
    if not isinstance(array_type, types.Array):
        return value
    array = context.make_array(array_type)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()


if numba.config.DISABLE_JIT:
    # Kernels are Python functions then.

    def share(threads: tuple[int, int, int], n_tasks: int) -> tuple[int, int]:
        """Return the first task, and the one after the last."""
        return 0, n_tasks

    def lend(arrays: Any) -> Any:
        """Return the arrays."""
        return arrays

    def split(array: Any, n: int) -> Any:
        """Return the first n arrays."""
        return (None,) * n if array is None else tuple(array[:n])

    def keep(arrays: Any) -> None:
        """Do nothing."""
