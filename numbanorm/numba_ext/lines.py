"""Lines of memory: rows that begin where a line does, and streaming (non-temporal) stores.

A vector that is in two lines takes twice as long to load or to store.

An ordinary store first reads the line that it writes to, so that writing takes twice the traffic
of reading, and evicts what is still needed from the caches. A streaming store of a whole line does
neither: that is how to write y where a cache cannot hold x and y together.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numbanorm.numba_ext.private import declare, pack, unpack
from numbanorm.numba_ext.views import View, address_of, field, is_none, make_view, size_of
from numbanorm.tuning import LANES

# Bytes of a line.
LINE = 64


@intrinsic
def line_size(typing_context: Any, array: Any) -> Any:
    """Return how many elements of an array fill a line."""
    n = LINE * 8 // array.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, n)

    return types.intp(array), generate


@intrinsic
def allocate(typing_context: Any, n_rows: Any, n: Any, dtype: Any) -> Any:
    """Return memory until it is released: rows, (n_rows, n or some more), or (n,) if that is None.

    They begin where lines do; before them is the address of what to release.
    """
    element = dtype.dtype
    one_row = is_none(n_rows)
    rows = View(element) if one_row else types.Array(element, 2, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        n_rows, n, _ = args
        size = size_of(element)

        def number(value: int) -> Any:
            return ir.Constant(n.type, value)

        in_line = LINE // size
        n_lines = builder.udiv(builder.add(n, number(in_line - 1)), number(in_line))
        n_all = n_lines if one_row else builder.mul(n_rows, n_lines)
        # A line more, as malloc's memory may begin anywhere in one, at a multiple of its addresses.
        n_bytes = builder.mul(builder.add(n_all, number(1)), number(LINE))
        byte = ir.IntType(8).as_pointer()
        owner = builder.call(declare(builder, "PyMem_RawMalloc", byte, n.type), [n_bytes])
        missing = builder.icmp_unsigned("==", owner, ir.Constant(byte, None))
        with builder.if_then(missing, likely=False):
            context.call_conv.return_user_exc(builder, MemoryError, ("no memory for a kernel",))
        first = builder.add(builder.ptrtoint(owner, n.type), number(LINE))
        pointer = context.get_data_type(element).as_pointer()
        data = builder.inttoptr(builder.and_(first, number(-LINE)), pointer)
        builder.store(owner, _place_of_owner(builder, data))
        if one_row:
            return pack(builder, [data, n], context.get_value_type(rows))
        width = builder.mul(n_lines, number(in_line))
        strides = [builder.mul(width, number(size)), number(size)]
        return make_view(context, builder, rows, data, [n_rows, width], strides, number(size))

    return rows(types.none if one_row else types.intp, types.intp, dtype), generate


def _place_of_owner(builder: Any, data: Any) -> Any:
    """Return where the address is that malloc returned: before what is in use."""
    owner = ir.IntType(8).as_pointer()
    return builder.gep(builder.bitcast(data, owner.as_pointer()), [ir.IntType(64)(-1)])


@intrinsic
def release(typing_context: Any, arrays: Any) -> Any:
    """Give back the memory of arrays, which were made by ``allocate``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        function = declare(builder, "PyMem_RawFree", ir.VoidType(), byte)
        values = unpack(builder, args[0], len(arrays))
        for array_type, array in zip(arrays, values, strict=True):
            data = field(context, builder, array_type, array, "data")
            builder.call(function, [builder.load(_place_of_owner(builder, data))])
        return context.get_dummy_value()

    return types.none(arrays), generate


@intrinsic
def to_next_line(typing_context: Any, array: Any, i: Any) -> Any:
    """Return how many elements there are from array[i] to where a line begins, from 0 on."""
    size = array.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.ptrtoint(address_of(context, builder, array, *args), args[1].type)
        missing = builder.and_(builder.neg(address), ir.Constant(address.type, LINE - 1))
        return builder.udiv(missing, ir.Constant(address.type, size))

    return types.intp(array, types.intp), generate


@intrinsic
def stream(typing_context: Any, vector: Any, target: Any, i: Any) -> Any:
    """Store a whole vector to target[i], whole vectors after where a line begins, streaming."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, array, index = args
        place = address_of(context, builder, target, array, index)
        place = builder.bitcast(place, values.type.as_pointer())
        # A vector of 16-bit elements is half a line.
        align = min(LINE, LANES * size_of(target.dtype))
        store = builder.store(values, place, align=align)
        one = ir.Constant(ir.IntType(32), 1)
        store.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.void(vector, target, types.intp), generate


@intrinsic
def fence(typing_context: Any) -> Any:
    """Have other threads see what was stored: streaming stores are not in order with others."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


if numba.config.DISABLE_JIT:
    # Kernels are Python functions then.

    def line_size(array: Any) -> int:
        """Return how many elements of an array fill a line."""
        return int(LINE // array.itemsize)

    def allocate(n_rows: int | None, n: int, dtype: Any) -> Any:
        """Return memory."""
        if n_rows is None:
            return np.empty(n, dtype)
        line = LINE // np.dtype(dtype).itemsize
        return np.empty((n_rows, -(-n // line) * line), dtype)

    def release(arrays: Any) -> None:
        """Do nothing: Python does it."""

    def to_next_line(array: Any, i: int) -> int:
        """Return how many elements there are from array[i] to where a line begins."""
        return int(-(array.ctypes.data // array.itemsize + i) % line_size(array))

    def stream(vector: Any, target: Any, i: int) -> None:
        """Store a vector to target[i]."""
        target[i : i + len(vector)] = vector

    def fence() -> None:
        """Do nothing: there is one thread."""
