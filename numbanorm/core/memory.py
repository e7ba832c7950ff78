"""Memory of outputs, used again once nobody else has it: fresh pages take as long as a kernel.

Kept is never more than was in use at one time, and nothing once the last layer is gone.
"""

import functools
import sys
import weakref
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np

from numbanorm.core.types import Array
from numbanorm.tuning import tuning

# Memory goes back if it was not used while so many outputs were made for each that is kept.
USED_WITHIN = 16
# Bytes of a page.
PAGE = 1 << 12


class Memory(ABC):
    """Memory that outputs may have, of some kind."""

    n_bytes: int
    kind: object = None
    last_use = 0

    @abstractmethod
    def is_free(self) -> bool:
        """Tell whether nobody else has it."""

    def is_lost(self) -> bool:
        """Tell whether it has gone elsewhere."""
        return False


AMemory = TypeVar("AMemory", bound=Memory)


class Recycler(Generic[AMemory]):
    """What is kept, and may be used again.

    Several threads may ask at once: what :meth:`find` returned is only theirs if nobody else has
    it when they have. A list is not changed once it is here, but for the order of what is in it.
    """

    def __init__(self) -> None:
        self._layers: dict[int, weakref.ref[Any]] = {}
        self.clear()

    def used_by(self, layer: object) -> None:
        """Keep memory until this layer is gone, too.

        A layer counts from its first output, however it was made: by its class, by copying, or by
        taking another class.
        """
        if id(layer) not in self._layers:
            gone = functools.partial(self._note_gone, id(layer))
            self._layers[id(layer)] = weakref.ref(layer, gone)

    def not_used_by(self, layer: object) -> None:
        """Keep no memory for this layer any more."""
        self._note_gone(id(layer), None)

    def _note_gone(self, layer_id: int, _: object) -> None:
        self._layers.pop(layer_id, None)
        if not self._layers:
            self.clear()

    def clear(self) -> None:
        """Keep nothing any more."""
        self._most_in_use = self._n_outputs = 0
        # What was used last comes last. Another thread may be reading the list.
        self._kept: list[AMemory] = []

    def find(self, n_bytes: int, kind: object = None) -> AMemory | None:
        """Return memory of exactly this size that is free: an output holds no more than its own."""
        kept = self._kept
        # First what was used last, as a cache may still have it, then what may be free for longest.
        for memory in (*kept[-1:], *kept):
            if memory.n_bytes == n_bytes and memory.kind == kind and memory.is_free():
                return memory
        return None

    def use(self, memory: AMemory) -> None:
        """Note that an output has this memory; let go what no output has had for long."""
        # Another thread may have put a new list in the place of this one.
        kept = [*(other for other in self._kept if other is not memory), memory]
        self._note_use(memory)
        if self._n_outputs - kept[0].last_use > USED_WITHIN * len(kept) and kept[0].is_free():
            self._most_in_use -= kept[0].n_bytes
            del kept[0]
        self._kept = kept

    def keep(self, memory: AMemory) -> None:
        """Keep new memory, which an output has; let go what is free if that becomes too much."""
        kept = [other for other in self._kept if not other.is_lost()]
        in_use = [other for other in kept if not other.is_free()]
        n_kept, n_in_use = (
            sum(other.n_bytes for other in others) + memory.n_bytes for others in (kept, in_use)
        )
        self._most_in_use = max(self._most_in_use, n_in_use)
        self._kept = [*(kept if n_kept <= self._most_in_use else in_use), memory]
        self._note_use(memory)

    def _note_use(self, memory: AMemory) -> None:
        self._n_outputs += 1
        memory.last_use = self._n_outputs


class _Bytes(Memory):
    """Memory that arrays are views of, which count as those who have it.

    They begin ``start`` bytes after a page does, wherever the memory is.
    """

    def __init__(self, n_bytes: int, start: int) -> None:
        self.n_bytes, self.bytes = n_bytes, np.empty(n_bytes + PAGE, np.uint8)
        self.start = (start - self.bytes.ctypes.data) % PAGE
        self.alone = sys.getrefcount(self.bytes)

    def is_free(self) -> bool:
        return sys.getrefcount(self.bytes) == self.alone

    def lend(self, shape: tuple[int, ...], dtype: Any) -> Array | None:
        """Return an array in the memory, or None if another thread was faster."""
        array: Array = np.ndarray(shape, dtype, self.bytes, self.start)
        return array if sys.getrefcount(self.bytes) == self.alone + 1 else None


class _Arrays(Recycler[_Bytes]):
    _start = 0

    def empty_for(self, layer: object, like: Array) -> Array:
        """Return an array of the shape and type of another one, in C order, for a layer."""
        shape, dtype, n_bytes = like.shape, like.dtype, like.nbytes
        if n_bytes < tuning().recycle_arrays_from or not tuning().recycle:
            return np.empty(shape, dtype)
        self.used_by(layer)
        found = self.find(n_bytes)
        array = None if found is None else found.lend(shape, dtype)
        if found is None or array is None:
            # Each starts elsewhere in a page: a load waits for an earlier store if the last 12 bits
            # of the two addresses are the same.
            self._start = (self._start + PAGE // 4) % PAGE
            new = _Bytes(n_bytes, self._start)
            array = new.lend(shape, dtype)
            assert array is not None
            self.keep(new)
            return array
        self.use(found)
        return array


arrays = _Arrays()
