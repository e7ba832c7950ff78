"""Lines of memory: rows that begin where a line does, and stores of whole lines past the caches.

A vector that is in two lines takes twice as long to load or to store.

An ordinary store first reads the line that it writes to, so that writing takes twice the traffic
of reading, and drives out what is still needed. A non-temporal store of a whole line does neither:
that is how to write y where a cache cannot hold x and y together.
"""

import functools
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

# Bytes of a line.
LINE = 64

# What Linux says of the caches of a core.
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@functools.cache
def cache_size() -> int | None:
    """Return the bytes of the largest cache of a core, or None if that is not known."""
    sizes = []
    for file in CACHES.glob("index*/size"):
        try:
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
        except (OSError, ValueError):
            return None
    return max(sizes, default=None)


@intrinsic
def line_size(typing_context: Any, array: Any) -> Any:
    """Return how many elements of an array fill a line."""
    n = LINE * 8 // array.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, n)

    return types.intp(array), generate


@intrinsic
def room(typing_context: Any, n_rows: Any, n: Any, like: Any) -> Any:
    """Return how many elements of the type of ``like`` rows_of needs for rows of n of them."""
    line = LINE * 8 // like.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        n_rows, n, _ = args
        one, length = ir.Constant(n.type, 1), ir.Constant(n.type, line)
        n_lines = builder.udiv(builder.add(n, builder.sub(length, one)), length)
        return builder.mul(builder.add(builder.mul(n_rows, n_lines), one), length)

    return types.intp(types.intp, types.intp, like), generate


@intrinsic
def rows_of(typing_context: Any, memory: Any, n_rows: Any) -> Any:
    """Return the rows that an array (room(...),) has room for: (n_rows, at least n).

    They begin where lines do, and have no owner, see :func:`numbanorm._launch.lend`.
    """
    size = memory.dtype.bitwidth // 8
    rows = types.Array(memory.dtype, 2, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        n_rows = args[1]

        def number(value: int) -> Any:
            return ir.Constant(n_rows.type, value)

        array = context.make_array(memory)(context, builder, args[0])
        n_lines = builder.sub(builder.udiv(array.nitems, number(LINE // size)), number(1))
        n = builder.mul(builder.udiv(n_lines, n_rows), number(LINE // size))
        address = builder.add(builder.ptrtoint(array.data, n_rows.type), number(LINE - 1))
        first = builder.and_(address, number(-LINE))
        seen = context.make_array(rows)(context, builder)
        populate_array(
            seen,
            data=builder.inttoptr(first, array.data.type),
            shape=cgutils.pack_array(builder, [n_rows, n]),
            strides=cgutils.pack_array(builder, [builder.mul(n, number(size)), number(size)]),
            itemsize=number(size),
            meminfo=None,
        )
        return seen._getvalue()

    return rows(memory, types.intp), generate


@intrinsic
def to_next_line(typing_context: Any, array: Any, i: Any) -> Any:
    """Return how many elements there are from array[i] to where a line begins, from 0 on."""
    size = array.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        address = builder.ptrtoint(builder.gep(data, [args[1]]), args[1].type)
        missing = builder.and_(builder.neg(address), ir.Constant(address.type, LINE - 1))
        return builder.udiv(missing, ir.Constant(address.type, size))

    return types.intp(array, types.intp), generate


@intrinsic
def store_line(typing_context: Any, target: Any, i: Any, source: Any, j: Any) -> Any:
    """Copy a line from source[j] to target[i], which is where a line of memory begins."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_value_type(target.dtype)
        line = ir.VectorType(element, LINE * 8 // target.dtype.bitwidth).as_pointer()
        places = []
        for array_type, array, index in ((source, args[2], args[3]), (target, args[0], args[1])):
            data = context.make_array(array_type)(context, builder, array).data
            places.append(builder.bitcast(builder.gep(data, [index]), line))
        values = builder.load(places[0], align=target.dtype.bitwidth // 8)
        store = builder.store(values, places[1], align=LINE)
        one = ir.Constant(ir.IntType(32), 1)
        store.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), generate


@intrinsic
def fence(typing_context: Any) -> Any:
    """Have other threads see what was stored: non-temporal stores wait for nobody."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


if numba.config.DISABLE_JIT:
    # Kernels are Python functions then.

    def line_size(array: Any) -> int:
        """Return how many elements of an array fill a line."""
        return int(LINE // array.itemsize)

    def room(n_rows: int, n: int, like: Any) -> int:
        """Return how many elements rows_of needs."""
        line = line_size(like)
        return int((n_rows * -(-n // line) + 1) * line)

    def rows_of(memory: Any, n_rows: int) -> Any:
        """Return the rows that there is room for."""
        n = (memory.size // line_size(memory) - 1) // n_rows * line_size(memory)
        first = to_next_line(memory, 0)
        return memory[first : first + n_rows * n].reshape(n_rows, n)

    def to_next_line(array: Any, i: int) -> int:
        """Return how many elements there are from array[i] to where a line begins."""
        return int(-(array.ctypes.data // array.itemsize + i) % line_size(array))

    def store_line(target: Any, i: int, source: Any, j: int) -> None:
        """Copy a line from source[j] to target[i]."""
        n = LINE // target.itemsize
        target[i : i + n] = source[j : j + n]

    def fence() -> None:
        """Do nothing: there is one thread."""
