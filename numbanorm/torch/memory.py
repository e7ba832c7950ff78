"""How tensors lie in memory, as arrays, and the memory of outputs, which is used again.

A new y has the memory of an earlier one that nobody has any more; the gradient of x that of the
gradient of y, where nobody else has it, by hook, name or memory.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from numbanorm.core.memory import Memory, Recycler
from numbanorm.core.types import Array, Axes
from numbanorm.torch import private
from numbanorm.torch.method import Method, are_rows
from numbanorm.tuning import tuning

# How tensors of so many axes may be in memory without gaps.
FORMS = {4: torch.channels_last, 5: torch.channels_last_3d}
# The types of NumPy that have the elements of a tensor.
DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.int64: np.dtype(np.int64),
    torch.bool: np.dtype(np.bool_),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.uint16),  # as the kernels see it
}
HALVES = torch.float16, torch.bfloat16


class _Exported:
    """A tensor's memory in NumPy's array interface, and the tensor, which an array of it keeps."""

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, tensor: Tensor, interface: dict[str, Any]) -> None:
        self.tensor, self.__array_interface__ = tensor, interface


def as_array(tensor: Tensor) -> Array:
    """Return a tensor's memory as an array."""
    # Tensor.numpy() would mark the memory as not resizable, for good.
    address, dtype, strides = tensor.data_ptr(), DTYPES[tensor.dtype], None
    if not address and tensor.numel():
        raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} has no memory: it was freed")
    if not tensor.is_contiguous():
        strides = tuple([stride * dtype.itemsize for stride in tensor.stride()])
    interface = {
        "version": 3,
        "typestr": dtype.str,
        "shape": tensor.shape,
        "strides": strides,
        "data": (address, False),
    }
    return np.asarray(_Exported(tensor, interface))


def empty_like(x: Tensor, method: Method) -> Tensor:
    """Return a new tensor for y or dx."""
    # Rows are made contiguous, as PyTorch does; channels stay where they are in memory.
    form = torch.contiguous_format if are_rows(method) else torch.preserve_format
    return torch.empty_like(x, memory_format=form)


def has_same_form(dy: Tensor, x: Tensor, method: Method) -> bool:
    """Tell whether dy is in memory as dx is to be, without gaps."""
    # Asking memory_order() would make a small backward 4 % longer.
    if dy.is_contiguous():
        return are_rows(method) or x.is_contiguous()
    form = None if are_rows(method) else FORMS.get(x.dim())
    return form is not None and all(t.is_contiguous(memory_format=form) for t in (dy, x))


def gradient_like(x: Tensor, dy: Tensor, dy_is_free: bool, method: Method) -> Tensor:
    """Return memory for dx: that of dy where it is free and of the same form."""
    # Memory of its own would be read before it is written, and its pages may be fresh.
    return dy if dy_is_free and has_same_form(dy, x, method) else empty_like(x, method)


class _Memory(Memory):
    """A tensor that nobody sees, and its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.storage, self.n_bytes = tensor, tensor.untyped_storage(), tensor.nbytes
        self.address, self.kind = tensor.data_ptr(), tensor.dtype
        self.alone = private.storage_owner_counts(self.storage)

    def is_lost(self) -> bool:
        """Tell whether the memory went elsewhere, as to several processes, or changed its size."""
        same = self.tensor.data_ptr() == self.address and self.storage.nbytes() == self.n_bytes
        return not (same and self.storage.resizable())

    def is_free(self) -> bool:
        """Tell whether nobody else has the memory."""
        return private.storage_owner_counts(self.storage) == self.alone and not self.is_lost()

    def lend(self, shape: Axes, strides: Axes) -> Tensor | None:
        """Return a tensor with the memory, or None if another thread was faster."""
        tensor = self.tensor.as_strided(shape, strides).data  # no view, with a version of its own
        n_tensors, n_storages = private.storage_owner_counts(self.storage)
        return tensor if (n_tensors - 1, n_storages) == self.alone else None


class _Outputs(Recycler[_Memory]):
    def empty_like(self, x: Tensor, method: Method) -> Tensor:
        """Return a tensor for y, in memory of its size that is free, if there is any."""
        n_bytes = x.nbytes
        if (
            n_bytes < tuning().recycle_tensors_from
            or not tuning().recycle
            or not private.can_count_storages()
            or not has_same_form(x, x, method)
        ):
            return empty_like(x, method)
        found = self.find(n_bytes, x.dtype)
        y = None if found is None else found.lend(x.shape, x.stride())
        if found is None or y is None:
            with torch.inference_mode(False):  # what is made in that mode is of no use outside it
                new = _Memory(empty_like(x, method))
                y = new.tensor.data
            self.keep(new)
            return y
        self.use(found)
        return y


outputs = _Outputs()
