"""What functions of vectors are made of: constants, polynomials, and powers of 2."""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numbanorm.numba_ext.private import declare
from numbanorm.tuning import LANES

# Bits of the fraction of each float, and of its exponent's bias.
FRACTION, BIAS = {32: 23, 64: 52}, {32: 127, 64: 1023}


def _constant(vector: Any, value: float) -> Any:
    element = ir.FloatType() if vector.dtype == types.float32 else ir.DoubleType()
    rounded = float(np.float32(value)) if vector.dtype == types.float32 else value
    return ir.Constant(ir.VectorType(element, LANES), [rounded] * LANES)


def constant(for_float32: float, for_float64: float | None = None) -> Any:
    """Return a function that makes a vector of a number, which may differ by the type.

    It takes a vector, whose type it makes another of.
    """
    values = {32: for_float32, 64: for_float32 if for_float64 is None else for_float64}
    if numba.config.DISABLE_JIT:
        return lambda vector: np.full_like(vector, values[vector.itemsize * 8])

    @intrinsic
    def fill(typing_context: Any, vector: Any) -> Any:
        value = _constant(vector, values[vector.dtype.bitwidth])
        return vector(vector), lambda context, builder, signature, args: value

    return fill


def polynomial(for_float32: Sequence[float], for_float64: Sequence[float]) -> Any:
    """Return a polynomial of a vector, from its coefficients, the highest power first."""
    coefficients = {32: for_float32, 64: for_float64}
    if numba.config.DISABLE_JIT:

        def evaluate(x: Any) -> Any:
            first, *others = coefficients[x.itemsize * 8]
            result = np.full_like(x, first)
            for other in others:
                result = result * x + x.dtype.type(other)
            return result

        return evaluate

    @intrinsic
    def evaluate_vector(typing_context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            (value,) = args
            name = f"llvm.fmuladd.v{LANES}f{x.dtype.bitwidth}"
            function = declare(builder, name, value.type, *[value.type] * 3)
            first, *others = coefficients[x.dtype.bitwidth]
            result = _constant(x, first)
            for other in others:
                result = builder.call(function, [result, value, _constant(x, other)])
            return result

        return x(x), generate

    return evaluate_vector


@intrinsic
def times_power_of_two(typing_context: Any, x: Any, n: Any) -> Any:
    """Return x * 2**n, where n has had to_integer added; in two steps, as 2**n may overflow."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, power = args
        bits = x.dtype.bitwidth
        integers = ir.VectorType(ir.IntType(bits), LANES)

        def number(value: int) -> Any:
            return ir.Constant(integers, [value] * LANES)

        offset = number(int(np.float32(1.5 * 2.0**23).view(np.int32)) if bits == 32
                        else int(np.float64(1.5 * 2.0**52).view(np.int64)))  # fmt: skip
        n = builder.sub(builder.bitcast(power, integers), offset)
        half = builder.ashr(n, number(1))
        for part in (half, builder.sub(n, half)):
            exponent = builder.shl(builder.add(part, number(BIAS[bits])), number(FRACTION[bits]))
            value = builder.fmul(value, builder.bitcast(exponent, value.type))
        return value

    return x(x, x), generate


# A float of this size has no fraction: what is added to it is rounded to an integer, which stands
# in the last bits.
to_integer = constant(1.5 * 2.0**23, 1.5 * 2.0**52)

if numba.config.DISABLE_JIT:
    # Kernels are Python functions then, and vectors arrays.

    def times_power_of_two(x: Any, n: Any) -> Any:
        """Return x * 2**n."""
        power = np.nan_to_num(n - to_integer(n)).astype(np.int32)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return np.ldexp(x, power)
