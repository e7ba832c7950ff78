"""Floats of 16 bits: what is stored as integers of 16 bits, and calculated with as float32.

Numba has no float16 on CPUs, and LLVM's bfloat none in its Python binding. A float16 is stored as
an int16 here, and a bfloat16, the upper half of a float32, as a uint16. The same bits are made on
every CPU: rounded once to the nearest, ties to even, with subnormals, infinities and quiet NaN.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numbanorm.numba_ext.vectors import Vector, has_feature
from numbanorm.numba_ext.views import is_none, no_value
from numbanorm.tuning import LANES

# The float that is stored in such an integer.
FLOAT16, BFLOAT16 = types.int16, types.uint16


def _has_float16() -> bool:
    """Tell whether the CPU that is compiled for converts float16 itself, as x86's F16C does."""
    return has_feature("f16c")


class _Bits:
    """Integers of 32 bits, or vectors of them, and constants of their kind."""

    def __init__(self, builder: Any, like: Any) -> None:
        self.builder, self.is_vector = builder, isinstance(like, ir.VectorType)
        self.word, self.float = self.of(ir.IntType(32)), self.of(ir.FloatType())
        self.short, self.half = self.of(ir.IntType(16)), self.of(ir.HalfType())

    def of(self, element: Any) -> Any:
        return ir.VectorType(element, LANES) if self.is_vector else element

    def __call__(self, value: int) -> Any:
        return ir.Constant(self.word, [value] * LANES if self.is_vector else value)

    def number(self, value: float) -> Any:
        return ir.Constant(self.float, [value] * LANES if self.is_vector else value)


def _decode(builder: Any, dtype: Any, stored: Any) -> Any:
    """Return the float32 of what is stored."""
    bits = _Bits(builder, stored.type)
    if dtype == BFLOAT16:
        word = builder.shl(builder.zext(stored, bits.word), bits(16))
        return builder.bitcast(word, bits.float)
    if _has_float16():
        return builder.fpext(builder.bitcast(stored, bits.half), bits.float)
    word = builder.zext(stored, bits.word)
    magnitude = builder.shl(builder.and_(word, bits(0x7FFF)), bits(13))
    # The bias of the exponent is 112 larger, which makes subnormals normal, too.
    scaled = builder.fmul(builder.bitcast(magnitude, bits.float), bits.number(2.0**112))
    infinity = bits(0x7C00 << 13)
    is_nan = builder.icmp_unsigned(">", magnitude, infinity)
    special = builder.select(is_nan, bits(0x7FC00000), bits(0x7F800000))
    magnitude = builder.select(
        builder.icmp_unsigned("<", magnitude, infinity),
        builder.bitcast(scaled, bits.word), builder.or_(magnitude, special),
    )  # fmt: skip
    sign = builder.shl(builder.and_(word, bits(0x8000)), bits(16))
    return builder.bitcast(builder.or_(magnitude, sign), bits.float)


def _encode(builder: Any, dtype: Any, value: Any) -> Any:
    """Return how a float32 is stored."""
    bits = _Bits(builder, value.type)
    word = builder.bitcast(value, bits.word)
    if dtype == BFLOAT16:
        upper = builder.lshr(word, bits(16))
        rounded = builder.add(word, builder.add(bits(0x7FFF), builder.and_(upper, bits(1))))
        is_nan = builder.fcmp_unordered("uno", value, value)
        quiet = builder.or_(upper, bits(0x40))
        word = builder.select(is_nan, quiet, builder.lshr(rounded, bits(16)))
        return builder.trunc(word, bits.short)
    if _has_float16():
        return builder.bitcast(builder.fptrunc(value, bits.half), bits.short)
    sign = builder.and_(word, bits(0x80000000))
    magnitude = builder.xor(word, sign)
    # Normal: the exponent's bias is 112 smaller; half of the last place, or less for an even one.
    odd = builder.and_(builder.lshr(magnitude, bits(13)), bits(1))
    rounding = builder.add(bits(0xFFF - (112 << 23) + (1 << 32)), odd)
    normal = builder.lshr(builder.add(magnitude, rounding), bits(13))
    # Subnormal: what is added to 0.5 is rounded to the last place of a float16.
    shifted = builder.fadd(builder.bitcast(magnitude, bits.float), bits.number(0.5))
    subnormal = builder.sub(builder.bitcast(shifted, bits.word), bits(0x3F000000))
    result = builder.select(
        builder.icmp_unsigned("<", magnitude, bits(113 << 23)), subnormal, normal
    )
    result = builder.select(
        builder.icmp_unsigned(">=", magnitude, bits(143 << 23)), bits(0x7C00), result
    )
    quiet = builder.or_(bits(0x7E00), builder.and_(builder.lshr(magnitude, bits(13)), bits(0x3FF)))
    is_nan = builder.icmp_unsigned(">", magnitude, bits(0x7F800000))
    result = builder.or_(builder.select(is_nan, quiet, result), builder.lshr(sign, bits(16)))
    return builder.trunc(result, bits.short)


def _is_stored(dtype: Any) -> bool:
    return dtype in (FLOAT16, BFLOAT16)


@intrinsic
def decode(typing_context: Any, value: Any) -> Any:
    """Return the float32, or vector of them, of what is stored in 16 bits; others as they are."""
    if is_none(value):
        return types.none(value), no_value
    is_vector = isinstance(value, Vector)
    dtype = value.dtype if is_vector else value
    if not _is_stored(dtype):
        return value(value), lambda context, builder, signature, args: args[0]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _decode(builder, dtype, args[0])

    return (Vector(types.float32) if is_vector else types.float32)(value), generate


@intrinsic
def encode(typing_context: Any, vector: Any, array: Any) -> Any:
    """Return a vector as it is stored in an array."""
    if not _is_stored(array.dtype):
        return vector(vector, array), lambda context, builder, signature, args: args[0]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _encode(builder, array.dtype, args[0])

    return Vector(array.dtype)(vector, array), generate


if numba.config.DISABLE_JIT:
    # Kernels are Python functions then, and vectors arrays.

    def decode(value: Any) -> Any:
        """Return the float32 of what is stored in 16 bits; others as they are."""
        dtype = None if value is None else value.dtype
        if dtype == np.int16:
            return value.view(np.float16).astype(np.float32)
        if dtype == np.uint16:
            return (value.astype(np.uint32) << 16).view(np.float32)
        return value

    def encode(vector: Any, array: Any) -> Any:
        """Return a vector as it is stored in an array."""
        if array.dtype == np.int16:
            with np.errstate(over="ignore"):
                return vector.astype(np.float16).view(np.int16)
        if array.dtype == np.uint16:
            word = vector.view(np.uint32)
            rounded = (word + (0x7FFF + (word >> 16 & 1)).astype(np.uint32)) >> 16
            return np.where(np.isnan(vector), word >> 16 | 0x40, rounded).astype(np.uint16)
        return vector
