"""How a kernel writes what no cache can hold: past them, a whole line of memory at a time.

An ordinary store first reads the line that it writes to, so that writing takes twice the traffic
of reading, and drives out what may still be needed. A non-temporal store of a whole line does
neither. What is to be read again soon must not be written like this.
"""

import functools
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Bytes of a line.
LINE = 64

# How a kernel writes its output: from x to y; over x; or, where it can, by way of a buffer and past
# the caches.
DIRECT, IN_PLACE, STREAMED = 0, 1, 2

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

    def to_next_line(array: Any, i: int) -> int:
        """Return how many elements there are from array[i] to where a line begins."""
        return int(-(array.ctypes.data // array.itemsize + i) % line_size(array))

    def store_line(target: Any, i: int, source: Any, j: int) -> None:
        """Copy a line from source[j] to target[i]."""
        n = LINE // target.itemsize
        target[i : i + n] = source[j : j + n]

    def fence() -> None:
        """Do nothing: there is one thread."""
