"""Files in memory: where an array's are, and how what was read of them is given back."""

import mmap
from typing import Any

import numpy as np

from numbanorm.core.types import Array


def mapping_of(x: Any) -> mmap.mmap | None:
    """Return the file mapping that has an array's memory, if its pages may be given back."""
    shared = False
    while isinstance(x, np.ndarray):
        # A copy on write is private: its pages may have what the file has not.
        shared = shared or (isinstance(x, np.memmap) and x.mode != "c")
        x = x.base
    gives_back = isinstance(x, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED")
    return x if shared and gives_back else None


def give_back(x: Array | None) -> None:
    """Have the pages of x not count as the process's own: they are read again when needed."""
    mapping = mapping_of(x)
    if x is not None and mapping is not None:
        first, end = np.lib.array_utils.byte_bounds(x)
        start = np.frombuffer(mapping, np.uint8).ctypes.data
        begin = (first - start) // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - start - begin)
