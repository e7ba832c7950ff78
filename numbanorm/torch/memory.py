"""How tensors lie in memory, as arrays, and the memory of outputs, which is used again.

A new y has the memory of an earlier one that nobody has any more; the gradient of x that of the
gradient of y, where nobody else has it, by hook, name or memory.
"""

import ctypes
import sys
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


# All memory from an address on, as NumPy takes 0 for none. An array of a part of it is made in a
# quarter of the time that NumPy's array interface takes, and does not keep what it is a part of.
_START = 64
_MEMORY = memoryview((ctypes.c_char * (sys.maxsize - _START)).from_address(_START))
_READ_ONLY = _MEMORY.toreadonly()


def borrow(tensor: Tensor, shape: Axes, dtype: np.dtype[Any], writable: bool = False) -> Array:
    """Return the memory of a tensor without gaps as an array, as long as the tensor lives."""
    address = tensor.data_ptr()
    if not address:  # it is empty, or its memory was freed, which raises
        array = as_array(tensor).view(dtype).reshape(shape)
        array.setflags(write=writable)
        return array
    return np.ndarray(shape, dtype, _MEMORY if writable else _READ_ONLY, address - _START)


def form_of(method: Method) -> torch.memory_format:
    """Return how y and dx are in memory."""
    # Rows are made contiguous, as PyTorch does; channels stay where they are in memory.
    return torch.contiguous_format if are_rows(method) else torch.preserve_format


def outline(x: Tensor, form: torch.memory_format) -> Array:
    """Return an array that lies in memory as y would, and is not to be read."""
    y, dtype = torch.empty_like(x, memory_format=form, device="meta"), DTYPES[x.dtype]
    return np.ndarray(y.shape, dtype, _MEMORY, 0, [n * dtype.itemsize for n in y.stride()])


def empty_like(x: Tensor, form: torch.memory_format) -> Tensor:
    """Return a new tensor for y or dx."""
    return torch.empty_like(x, memory_format=form)


def has_same_form(dy: Tensor, x: Tensor, form: torch.memory_format) -> bool:
    """Tell whether dy is in memory as dx is to be, without gaps."""
    if dy.is_contiguous():
        return form is torch.contiguous_format or x.is_contiguous()
    dense = None if form is torch.contiguous_format else FORMS.get(x.dim())
    return dense is not None and all(t.is_contiguous(memory_format=dense) for t in (dy, x))


def gradient_like(x: Tensor, dy: Tensor, dy_is_free: bool, form: torch.memory_format) -> Tensor:
    """Return memory for dx: that of dy where it is free and of the same form."""
    # Memory of its own would be read before it is written, and its pages may be fresh.
    return dy if dy_is_free and has_same_form(dy, x, form) else empty_like(x, form)


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
    def empty_like(self, x: Tensor, form: torch.memory_format) -> Tensor:
        """Return a tensor for y, in memory of its size that is free, if there is any."""
        n_bytes = x.nbytes
        if (
            n_bytes < tuning().recycle_tensors_from
            or not tuning().recycle
            or not private.can_count_storages()
            or not has_same_form(x, x, form)
        ):
            return empty_like(x, form)
        found = self.find(n_bytes, x.dtype)
        y = None if found is None else found.lend(x.shape, x.stride())
        if found is None or y is None:
            with torch.inference_mode(False):  # what is made in that mode is of no use outside it
                new = _Memory(empty_like(x, form))
                y = new.tensor.data
            self.keep(new)
            return y
        self.use(found)
        return y


outputs = _Outputs()
