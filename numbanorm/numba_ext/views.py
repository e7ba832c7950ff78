"""Views: parts of an array, as arrays that kernels make without a call.

Nothing is checked, and they have no owner: Numba counts no references in kernels.
"""

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numbanorm.numba_ext.private import pack, unpack


def field(context: Any, builder: Any, array_type: Any, array: Any, name: str) -> Any:
    """Return a field of an array: data, shape, ..."""
    return context.data_model_manager[array_type].get(builder, array, name)


def address_of(context: Any, builder: Any, array_type: Any, array: Any, i: Any) -> Any:
    """Return the address of the i-th element in memory."""
    return builder.gep(field(context, builder, array_type, array, "data"), [i])


def size_of(dtype: Any) -> int:
    """Return the bytes of an element in memory."""
    return 1 if dtype == types.boolean else int(dtype.bitwidth // 8)


def is_none(value: Any) -> bool:
    """Tell whether this is the type of None."""
    return isinstance(value, types.NoneType)


def no_value(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Make None, where something else would be made of an array."""
    return context.get_dummy_value()


def make_view(
    context: Any, builder: Any, array_type: Any, data: Any, shape: Any, strides: Any, itemsize: Any
) -> Any:
    """Return an array without an owner; shape and strides are sequences."""
    model = context.data_model_manager[array_type]
    n_items = shape[0]
    for n in shape[1:]:
        n_items = builder.mul(n_items, n)
    fields = {
        "nitems": n_items,
        "itemsize": itemsize,
        "data": data,
        "shape": pack(builder, shape),
        "strides": pack(builder, strides),
    }
    view = ir.Constant(model.get_value_type(), None)
    for name, value in fields.items():
        view = model.set(builder, view, value, name)
    return view


@intrinsic
def flat_slice(typing_context: Any, array: Any, i: Any, n: Any) -> Any:
    """Return n elements of an array from the i-th in memory on, (n,); None of None.

    Numba's own slices take long to compile.
    """
    if is_none(array):
        return types.none(array, i, n), no_value
    view_type = types.Array(array.dtype, 1, "C", readonly=not array.mutable)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_value, i, n = args
        itemsize = field(context, builder, array, array_value, "itemsize")
        first = address_of(context, builder, array, array_value, i)
        return make_view(context, builder, view_type, first, [n], [itemsize], itemsize)

    return view_type(array, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def unstack(typing_context: Any, array: Any, n: Any) -> Any:
    """Return the first n arrays along the first axis of one (n or more, ...).

    ``n`` is a literal; of None each is None. A kernel takes one array for several, as each array
    argument adds to the time of a call.
    """
    n_arrays = n.literal_value
    if is_none(array):

        def generate_nothing(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.make_tuple(builder, signature.return_type, [args[0]] * n_arrays)

        return types.UniTuple(array, n_arrays)(array, n), generate_nothing
    view_type = types.Array(array.dtype, array.ndim - 1, "C", readonly=not array.mutable)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, itemsize, shape, strides = (
            field(context, builder, array, args[0], name)
            for name in ("data", "itemsize", "shape", "strides")
        )
        shape = unpack(builder, shape, array.ndim)[1:]
        step, *strides = unpack(builder, strides, array.ndim)
        places = []
        for k in range(n_arrays):
            first = builder.bitcast(data, ir.IntType(8).as_pointer())
            place = builder.gep(first, [builder.mul(step, step.type(k))])
            places.append(builder.bitcast(place, data.type))
        arrays = [
            make_view(context, builder, view_type, place, shape, strides, itemsize)
            for place in places
        ]
        return context.make_tuple(builder, signature.return_type, arrays)

    return types.UniTuple(view_type, n_arrays)(array, n), generate


if numba.config.DISABLE_JIT:
    # Kernels are Python functions then.

    def flat_slice(array: Any, i: int, n: int) -> Any:
        """Return n elements from the i-th in memory on, or None."""
        return None if array is None else array.reshape(-1)[i : i + n]

    def unstack(array: Any, n: int) -> Any:
        """Return the first n arrays."""
        return (None,) * n if array is None else tuple(array[:n])
