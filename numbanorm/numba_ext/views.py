"""Views: parts of arrays, which kernels make without a call. Nothing is checked.

One row of an array is a ``View``: an address and a size. A function takes several of them, and each
of the seven fields of Numba's arrays takes its share of the time to compile. Views of more axes are
arrays without an owner: Numba counts no references in kernels.
"""

import functools
import operator
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import (
    intrinsic,
    lower_builtin,
    make_attribute_wrapper,
    models,
    register_model,
    type_callable,
)

from numbanorm.numba_ext.private import pack, unpack


class View(types.Type):
    """Elements next to each other in memory: ``size`` of them, which are read and written."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(f"View({dtype})")


@register_model(View)
class _ViewModel(models.StructModel):
    def __init__(self, data_model_manager: Any, view: Any) -> None:
        members = [("data", types.CPointer(view.dtype)), ("size", types.intp)]
        super().__init__(data_model_manager, view, members)


make_attribute_wrapper(View, "size", "size")


@type_callable(operator.getitem)
def _type_of_item(context: Any) -> Any:
    def find(view: Any, i: Any) -> Any:
        return view.dtype if isinstance(view, View) and isinstance(i, types.Integer) else None

    return find


@lower_builtin(operator.getitem, View, types.Integer)
def _get_item(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    view, i = signature.args
    index = context.cast(builder, args[1], i, types.intp)
    return context.unpack_value(
        builder, view.dtype, address_of(context, builder, view, args[0], index)
    )


@type_callable(operator.setitem)
def _type_of_set_item(context: Any) -> Any:
    def find(view: Any, i: Any, value: Any) -> Any:
        return types.none if isinstance(view, View) and isinstance(i, types.Integer) else None

    return find


@lower_builtin(operator.setitem, View, types.Integer, types.Any)
def _set_item(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    view, i, value = signature.args
    index = context.cast(builder, args[1], i, types.intp)
    item = context.cast(builder, args[2], value, view.dtype)
    context.pack_value(
        builder, view.dtype, item, address_of(context, builder, view, args[0], index)
    )


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
    """Return n elements of an array from the i-th in memory on, a view; None of None."""
    if is_none(array):
        return types.none(array, i, n), no_value
    view = View(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_value, i, n = args
        first = address_of(context, builder, array, array_value, i)
        return pack(builder, [first, n], context.get_value_type(view))

    return view(array, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def unstack(typing_context: Any, array: Any, n: Any) -> Any:
    """Return the first n arrays along the first axis of one (n or more, ...), as views.

    ``n`` is a literal; of None each is None. A kernel takes one array for several, as each array
    argument adds to the time of a call.
    """
    n_arrays = n.literal_value
    kind = array if is_none(array) else View(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if is_none(array):
            return context.make_tuple(builder, signature.return_type, [args[0]] * n_arrays)
        shape = unpack(builder, field(context, builder, array, args[0], "shape"), array.ndim)
        size = functools.reduce(builder.mul, shape[1:])
        views = []
        for k in range(n_arrays):
            place = address_of(context, builder, array, args[0], builder.mul(size, size.type(k)))
            views.append(pack(builder, [place, size], context.get_value_type(kind)))
        return context.make_tuple(builder, signature.return_type, views)

    return types.UniTuple(kind, n_arrays)(array, n), generate


@intrinsic
def item(typing_context: Any, record: Any, i: Any) -> Any:
    """Return a record of the i-th element of each view in one; of None it is None."""
    kinds = [kind if is_none(kind) else kind.dtype for kind in record]
    result = types.BaseTuple.from_types(kinds, record.instance_class)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            value if is_none(view)
            else context.unpack_value(
                builder, view.dtype, address_of(context, builder, view, value, args[1])
            )
            for view, value in zip(record, unpack(builder, args[0], len(kinds)), strict=True)
        ]  # fmt: skip
        return context.make_tuple(builder, result, values)

    return result(record, types.intp), generate


@intrinsic(prefer_literal=True)
def member(typing_context: Any, values: Any, k: Any) -> Any:
    """Return the k-th of a tuple, k a literal; None of None."""
    index = k.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if is_none(values) else builder.extract_value(args[0], index)

    return (values if is_none(values) else values[index])(values, k), generate


if numba.config.DISABLE_JIT:
    # Kernels are Python functions then.

    def flat_slice(array: Any, i: int, n: int) -> Any:
        """Return n elements from the i-th in memory on, or None."""
        return None if array is None else array.reshape(-1)[i : i + n]

    def unstack(array: Any, n: int) -> Any:
        """Return the first n arrays, flat."""
        return (None,) * n if array is None else tuple(array.reshape(len(array), -1)[:n])

    def item(record: Any, i: int) -> Any:
        """Return a record of the i-th elements."""
        return type(record)(*(None if view is None else view[i] for view in record))

    def member(values: Any, k: int) -> Any:
        """Return the k-th of a tuple, or None."""
        return None if values is None else values[k]
