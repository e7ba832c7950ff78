"""Vectors: some elements next to each other, as a core calculates with them.

A loop over arrays is vectorised by LLVM, which does not know that they do not overlap, writes each
loop several times over for that, and takes long to do so. Here a loop says what is in registers:

- Sums of columns stay there while several rows are added. In an array they would be loaded and
  stored for each row, which takes longer than to read x from a cache; and a load waits for an
  earlier store whose address may be the same, of which a core compares the last 12 bits: how long
  is a matter of where the arrays happen to lie.
- It can prefetch. The hardware's own prefetcher sometimes sees a pattern in what is read, and
  sometimes not, which takes two to three times as long.
"""

import operator
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from numbanorm.numba_ext.lines import LINE
from numbanorm.numba_ext.private import declare, unpack
from numbanorm.numba_ext.views import View, address_of, is_none, no_value, size_of
from numbanorm.tuning import LANES

FLOATS = types.float32, types.float64


class Vector(types.Type):
    """LANES elements, of which operators make others, one by one.

    A product and a sum of it may be rounded together.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, data_model_manager: Any, vector: Any) -> None:
        element = data_model_manager.lookup(vector.dtype).get_value_type()
        super().__init__(data_model_manager, vector, ir.VectorType(element, LANES))


def _define(function: Any, takes: Any, generate: Any, result: Any = None) -> None:
    """Define an operator of two vectors, for elements of some types; it may make another type."""

    @type_callable(function)
    def find_type(context: Any) -> Any:
        def find(a: Any, b: Any) -> Any:
            if isinstance(a, Vector) and a == b and isinstance(a.dtype, takes):
                return a if result is None else Vector(result)
            return None

        return find

    @lower_builtin(function, Vector, Vector)
    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return generate(builder, *args)


def _rounded_together(operation: str) -> Any:
    return lambda builder, a, b: getattr(builder, operation)(a, b, flags=("contract",))


for _function, _operation in (
    (operator.add, "fadd"), (operator.iadd, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):  # fmt: skip
    _define(_function, types.Float, _rounded_together(_operation))


def _compared(sign: str) -> Any:
    return lambda builder, a, b: builder.fcmp_ordered(sign, a, b)


for _function, _sign in (operator.gt, ">"), (operator.ge, ">="), (operator.eq, "=="):
    _define(_function, types.Float, _compared(_sign), types.boolean)
_define(operator.or_, types.Boolean, lambda builder, a, b: builder.or_(a, b))


def has_feature(name: str) -> bool:
    """Tell whether the CPU that is compiled for has a feature, by LLVM's name for it."""
    features = numba.config.CPU_FEATURES
    if features is None:
        try:
            features = binding.get_host_cpu_features().flatten()
        except RuntimeError:  # LLVM does not know this CPU
            features = ""
    return f"+{name}" in features.split(",")


def _splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.IntType(32)(0))
    return builder.shuffle_vector(
        first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
    )


def _numbers(integer: Any, first: int, n: int) -> Any:
    return ir.Constant(ir.VectorType(integer, n), list(range(first, first + n)))


def _first(builder: Any, n: Any, lanes: int = LANES) -> Any:
    """Return a mask of the first n elements of a vector."""
    word = ir.IntType(32)
    return builder.icmp_signed(
        "<", _numbers(word, 0, lanes), _splat(builder, builder.trunc(n, word), lanes)
    )


def _masked(builder: Any, name: str, result: Any, vector: Any, *args: Any) -> Any:
    """Call llvm.masked.load or store of a type of vectors."""
    kind = {ir.FloatType(): "f32", ir.DoubleType(): "f64"}.get(vector.element)
    suffix = f"v{vector.count}{kind or f'i{vector.element.width}'}"
    function = declare(
        builder, f"llvm.masked.{name}.{suffix}.p0{suffix}", result, *(arg.type for arg in args)
    )
    return builder.call(function, args)


def _load_first(builder: Any, place: Any, n: Any, align: int) -> Any:
    """Return a vector whose first n elements are those at a place, and the others 0."""
    vector, word = place.type.pointee, ir.IntType(32)
    if not _in_pairs(vector):
        nothing = ir.Constant(vector, None)
        mask = _first(builder, n, vector.count)
        return _masked(builder, "load", vector, vector, place, word(align), mask, nothing)
    pairs = ir.VectorType(word, LANES // 2)
    whole = _load_first(
        builder, builder.bitcast(place, pairs.as_pointer()), _half(builder, n), align
    )
    values, before = builder.bitcast(whole, vector), builder.block
    with builder.if_then(builder.trunc(n, ir.IntType(1))):
        last = builder.sub(n, n.type(1))
        value = builder.load(_element(builder, place, last), align=align)
        index = builder.trunc(last, value.type)
        is_last = builder.icmp_signed("==", _numbers(value.type, 0, LANES), _splat(builder, index))
        with_last, after = builder.select(is_last, _splat(builder, value), values), builder.block
    result = builder.phi(vector)
    result.add_incoming(values, before)
    result.add_incoming(with_last, after)
    return result


def _in_pairs(vector: Any) -> bool:
    """Tell whether elements of 16 bits have to be masked in pairs: else each is a branch."""
    return vector.element == ir.IntType(16) and not has_feature("avx512bw")


def _element(builder: Any, place: Any, i: Any) -> Any:
    """Return the place of element i of a vector at a place."""
    return builder.gep(builder.bitcast(place, place.type.pointee.element.as_pointer()), [i])


def _half(builder: Any, n: Any) -> Any:
    return builder.lshr(n, n.type(1))


def _type_of_vector(array: Any) -> Any:
    if is_none(array):
        return types.none
    return Vector(array if isinstance(array, types.Float) else array.dtype)


def _load(context: Any, builder: Any, array: Any, value: Any, i: Any, n: Any) -> Any:
    """Return a vector, see load; ``n`` is None for all of it."""
    if is_none(array):
        return context.get_dummy_value()
    if isinstance(array, types.Float):
        return _splat(builder, value)
    # A boolean has a byte in memory, and a bit in a vector.
    vector = ir.VectorType(context.get_data_type(array.dtype), LANES)
    place = builder.bitcast(address_of(context, builder, array, value, i), vector.as_pointer())
    align = size_of(array.dtype)
    if n is None:
        values = builder.load(place, align=align)
    else:
        values = _load_first(builder, place, n, align)
    if array.dtype == types.boolean:
        values = builder.icmp_unsigned("!=", values, ir.Constant(vector, None))
    return values


@intrinsic
def load(typing_context: Any, array: Any, i: Any, n: Any) -> Any:
    """Return a vector from array[i] on; if n is not None, its first n elements and zeros.

    Of a number it is a vector of that, of None None, and of a record a record of them.
    """
    if isinstance(array, types.BaseNamedTuple):
        kinds = tuple(array)
        result = types.BaseTuple.from_types(
            tuple(map(_type_of_vector, kinds)), array.instance_class
        )
    else:
        kinds, result = (array,), _type_of_vector(array)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, i, n_value = args
        n_valid = None if is_none(n) else n_value
        if isinstance(array, types.BaseNamedTuple):
            values = unpack(builder, value, len(kinds))
            vectors = [
                _load(context, builder, kind, field, i, n_valid)
                for kind, field in zip(kinds, values, strict=True)
            ]
            return context.make_tuple(builder, result, vectors)
        return _load(context, builder, array, value, i, n_valid)

    return result(array, types.intp, n), generate


@intrinsic
def leading(typing_context: Any, n: Any) -> Any:
    """Return a vector of booleans: True for the first n elements."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _first(builder, args[0])

    return Vector(types.boolean)(types.intp), generate


@intrinsic
def is_finite(typing_context: Any, vector: Any) -> Any:
    """Tell which elements are neither infinite nor NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (values,) = args
        # 0, or NaN of what is not finite.
        difference = builder.fsub(values, values)
        return builder.fcmp_ordered("ord", difference, difference)

    return Vector(types.boolean)(vector), generate


@intrinsic
def where(typing_context: Any, condition: Any, a: Any, b: Any) -> Any:
    """Return a where a vector of booleans is True, else b, element by element."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(condition, a, a), generate


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """Return a vector of one value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return Vector(value)(value), generate


@intrinsic
def splat_as(typing_context: Any, vector: Any, value: Any) -> Any:
    """Return a vector of one float64 value, in the type of another vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector_type, number = args[0].type, args[1]
        if vector_type.element != number.type:
            number = builder.fptrunc(number, vector_type.element)
        return _splat(builder, number)

    return vector(vector, types.float64), generate


@intrinsic
def total(typing_context: Any, vector: Any) -> Any:
    """Return the sum of the elements of a vector, added up in pairs."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (values,) = args
        n = LANES
        while n > 1:
            n //= 2
            halves = [
                builder.shuffle_vector(values, values, _numbers(ir.IntType(32), first, n))
                for first in (0, n)
            ]
            values = builder.fadd(*halves)
        return builder.extract_element(values, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), generate


@intrinsic
def widen(typing_context: Any, vector: Any) -> Any:
    """Return a vector as float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.VectorType(ir.DoubleType(), LANES)
        return args[0] if args[0].type == wide else builder.fpext(args[0], wide)

    return Vector(types.float64)(vector), generate


@intrinsic
def narrow(typing_context: Any, vector: Any, array: Any) -> Any:
    """Return a vector of float64 in the type of an array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector_type = context.get_value_type(signature.return_type)
        same = args[0].type == vector_type
        return args[0] if same else builder.fptrunc(args[0], vector_type)

    return Vector(array.dtype)(vector, array), generate


@intrinsic
def multiply_add(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once where the CPU has an instruction for it: always alike there.

    An operator may be rounded together with another one or not, as the compiler likes.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = args[0].type
        name = f"llvm.fmuladd.v{LANES}f{a.dtype.bitwidth}"
        return builder.call(declare(builder, name, vector, *[vector] * 3), args)

    return a(a, a, a), generate


def _store_first(builder: Any, values: Any, place: Any, n: Any, align: int) -> None:
    """Store the first n elements of a vector, by powers of 2.

    A vector of 16 is two to four masked stores of AVX, which take an AMD EPYC long, and of what is
    shorter than 32 bits a branch for each element. These branches depend on a row's length alone:
    LayerNorm of (4096, 8) took 20 % less time, InstanceNorm of 7 x 7 images 40 %.
    """
    word, lane = ir.IntType(32), values.type.element.as_pointer()
    at, size = builder.bitcast(place, lane), LANES
    while size:
        has = builder.icmp_signed("!=", builder.and_(n, n.type(size)), n.type(0))
        low, high = (
            builder.shuffle_vector(values, values, _numbers(word, first, size))
            for first in (0, size % LANES)
        )
        with builder.if_then(has):
            builder.store(low, builder.bitcast(at, low.type.as_pointer()), align=align)
        # Of 16 there is nothing left, and each power of 2 is less than half of what was there.
        values = builder.select(has, high, low)
        at = builder.gep(at, [builder.select(has, n.type(size), n.type(0))])
        size //= 2


@intrinsic
def store(typing_context: Any, vector: Any, array: Any, i: Any, n: Any) -> Any:
    """Write a vector to array[i] and after it: all of it, or if n is not None its first n."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, array_value, i, n_value = args
        place = address_of(context, builder, array, array_value, i)
        place = builder.bitcast(place, values.type.as_pointer())
        align = size_of(array.dtype)
        if is_none(n):
            builder.store(values, place, align=align)
        elif has_feature("avx512bw"):
            mask = _first(builder, n_value, LANES)
            _masked(
                builder, "store", ir.VoidType(), values.type,
                values, place, ir.IntType(32)(align), mask,
            )  # fmt: skip
        else:
            _store_first(builder, values, place, n_value, align)
        return context.get_dummy_value()

    return types.void(vector, array, types.intp, n), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, i: Any) -> Any:
    """Prefetch a vector at array[i], which may be outside; without an array do nothing."""
    if not isinstance(array, (types.Array, View)):
        return types.void(array, i), no_value

    # The hardware's own prefetcher is at times too late where rows are wide or arrays several: that
    # costs up to half of the time.

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )
        first = builder.bitcast(address_of(context, builder, array, *args), byte)
        for k in range(0, LANES * size_of(array.dtype), LINE):
            line = builder.gep(first, [ir.Constant(args[1].type, k)])
            # To read it, into all caches, as data.
            builder.call(prefetch, [line, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


if numba.config.DISABLE_JIT:
    # Kernels are Python functions then, and vectors arrays.

    def load(array: Any, i: int, n: int | None) -> Any:
        """Return a copy of some elements, and zeros; or a vector of a number, or None."""
        if isinstance(array, tuple):
            return type(array)(*(load(values, i, n) for values in array))
        if array is None or np.ndim(array) == 0:
            return None if array is None else np.full(LANES, array)
        vector = np.zeros(LANES, array.dtype)
        vector[:n] = array[i : i + (LANES if n is None else n)]
        return vector

    def leading(n: int) -> Any:
        """Return True for the first n elements."""
        return np.arange(LANES) < n

    def store(vector: Any, array: Any, i: int, n: int | None) -> None:
        """Write a vector, or its first n elements, to an array."""
        array[i : i + (LANES if n is None else n)] = vector[:n]

    def is_finite(vector: Any) -> Any:
        """Tell which elements are finite."""
        return np.isfinite(vector)

    def where(condition: Any, a: Any, b: Any) -> Any:
        """Return a where the condition is True, else b."""
        return np.where(condition, a, b)

    def splat(value: Any) -> Any:
        """Return a vector of one value."""
        return np.full(LANES, value)

    def splat_as(vector: Any, value: Any) -> Any:
        """Return a vector of one value, in the type of another."""
        return np.full_like(vector, value)

    def total(vector: Any) -> Any:
        """Return the sum of the elements of a vector."""
        return vector.sum()

    def widen(vector: Any) -> Any:
        """Return a vector as float64."""
        return vector.astype(np.float64)

    def narrow(vector: Any, array: Any) -> Any:
        """Return a vector in the type of an array."""
        return vector.astype(array.dtype)

    def multiply_add(a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c."""
        return a * b + c

    def prefetch(array: Any, i: int) -> None:
        """Do nothing: it is for speed alone."""
