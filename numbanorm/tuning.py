"""Every threshold of the library: its unit, why it is there, and where it was measured.

None of them changes a result of the same layout by more than rounding, and those that decide how
sums are cut (``row_part``, ``column_part``, ...) depend on the shape alone, so that the bits are
those of any number of threads. Where no machine is named, it was an Intel Xeon (AVX-512, 2 cores,
2 MiB second cache a core); "EPYC" is an AMD EPYC of Zen 4 (1 MiB).

Other values, for a test or for a measurement:

>>> import numbanorm.tuning
>>> with numbanorm.tuning.use(parallel_from=0):
...     numbanorm.tuning.tuning().parallel_from
0
"""

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# -- Compiled into the kernels -------------------------------------------------------------------

# Elements of a vector: float64 sums of so many, and what they are made of, fit in 32 registers of
# AVX-512. A sum is taken in as many lanes, so that this changes bits.
LANES = 16
# Elements of a step of a sum over a row: two vectors, as one would wait for itself.
STEP = 2 * LANES
# Rows that are added to a vector of columns at a time: the sums stay in registers meanwhile.
ROWS = 4
# Columns up to which it is half as many where dy is read beside x: a core foresees few streams. On
# an EPYC they take 0.7 to 0.9 of the time from memory, and of more columns 1.15.
COLUMNS = 1 << 9
# Fewest coefficients, repeated, that are written with at a time where rows are short.
PERIOD = 1 << 8
# Prefetch distance of a loop over a row, in lines of 64 bytes: far where x comes from memory, near
# where it comes from a cache, as an array of at most ``PREFETCH_NEAR_UP_TO`` elements may, and a
# core's first cache has several rows to hold. Without it some runs took two to three times as long.
PREFETCH_FAR, PREFETCH_NEAR, PREFETCH_NEAR_UP_TO = 1 << 7, 1 << 5, 1 << 20
# Elements of four rows that are summed up in their own type before they are added in float64: a
# vector of float32 has too few of them to lose digits, and they stay in the first cache.
ELEMENTS = 1024
# Pieces of a task of the algebra on small arrays.
PIECES = 1024
# Rows of a group of fewer elements are summed up as one: a row takes some time to begin and end.
LONG_ROW = 1 << 8

# -- Of the machine ------------------------------------------------------------------------------

# What Linux says of the caches of a core.
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Bytes of a cache that are a core's own. Of a larger one a virtual machine has been told the size
# (480 MB for two cores of an Intel Xeon), but not who else uses it. Some say 0, or nothing at all:
# there is that much then, as smaller last caches are rare.
CACHE_PER_CORE = 16 << 20


def cache_bytes() -> int:
    """Return the bytes of the largest cache that the cores have, between those of 1 and of all.

    NUMBANORM_CACHE_BYTES in the environment takes its place.
    """
    given = os.environ.get("NUMBANORM_CACHE_BYTES", "")
    if given.strip().isdecimal():
        return int(given)
    if given:
        warnings.warn(
            f"NUMBANORM_CACHE_BYTES: a number of bytes is needed, got {given!r}, which is ignored",
            RuntimeWarning,
            stacklevel=2,
        )
    sizes = [CACHE_PER_CORE]
    for file in CACHES.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
    return min(max(sizes), CACHE_PER_CORE * (os.cpu_count() or 1))


# -- Chosen for each call ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Tuning:
    """What decides how a call is run: which layout x takes, how it is cut, and what is streamed."""

    parallel_from: int = 1 << 16
    """Elements from which a call is worth waking threads (10 to 20 us)."""
    piece_work: int = 4
    """Elements that a piece of the algebra counts for in ``parallel_from``."""
    row_work: int = 1 << 5
    """The same for a row of few elements with a weight for each, but each for no more than
    ``piece_work``: it takes so long to begin and end. Forward and backward of LayerNorm (4096, 8)
    took 0.16 ms instead of 0.23 on two threads of an AMD EPYC."""

    cache_bytes: int | None = dataclasses.field(default_factory=cache_bytes)
    """Bytes of the last cache, which say what is streamed, see ``stream_bytes``. None: nothing."""
    stream_from: int = 1 << 7
    """Elements of a row below which there are too few whole lines to be streamed."""
    stream_parts_from: int = 1 << 10
    """The same for parts of rows: the rest of the line at their end is written much later."""

    whole_groups: bool = True
    """Whether groups that fit in a cache are read once and written at once; if not, all is done in
    pieces."""
    row_part: int = 1 << 15
    """Elements of a part of a row: 128 KiB of float32, still in a core's own cache."""
    column_part: int = 1 << 12
    """Most rows of a part of a column: a float64 sum of any length is then as exact as that of so
    many values."""
    least_rows: int = 1 << 9
    """Fewest rows of a part: fewer take longer to merge than to sum up."""
    column_block: int = 1 << 10
    """Columns of a task."""
    column_fold: int = 256
    """Elements of a row that several short ones are folded into: each takes long to begin."""
    column_width: int = 256
    """Fewest columns of a task of whole groups: narrow rows are each on a page of their own."""

    apply_width: int = 1 << 12
    """Columns of a task of whole groups, and rows that are read in one run, in evaluation, which
    reads x once: runs of memory of 16 KiB take 25 % less time than those of 4 KiB on an EPYC, and
    longer ones as long."""
    apply_tasks: int = 16
    """Fewest such tasks of columns."""

    cached_group: int = 1 << 16
    """Elements of a block of columns that is read again from a core's own cache (256 KiB)."""
    column_run: int = 3 << 7
    """Columns that are groups of their own and are handled at once: in fewer, rows are short runs
    of memory. There are fewer where groups are long, unless there are many."""
    slab: int = 1 << 18
    """Elements that one task reads twice, the second time from a cache (1 MiB of float32)."""
    row_run: int = 1 << 14
    """Elements of rows next to each other that are read in one run where the rows of groups are
    interleaved."""
    short_row: int = 256
    """Interleaved rows, shorter than this, and ``many_rows`` or more, are seen as columns."""
    many_rows: int = 16
    """See ``short_row``."""
    row_over_rows: int = 6
    """The same for rows of at most so many elements for each of the rows: of 8 rows of 3 x 3 images
    BatchNorm took a third of the time on an EPYC, of 2 rows of 8 x 8 more than twice as long."""
    tiny_row: int = 128
    """Rows of a group that are shorter, and ``few_rows`` or more, are seen as one row with a weight
    for each element; the weights are read again for each of ``few_samples`` samples or more."""
    few_rows: int = 2
    """See ``tiny_row``."""
    few_samples: int = 3
    """See ``tiny_row``."""
    few_groups: int = 16
    """Fewest groups for that, and ``many_weights`` the most weights: these are to take little room
    beside x."""
    many_weights: int = 1 << 17
    """See ``few_groups``."""
    group_block: int = 1 << 10
    """Elements of a block of groups that is reduced while the block before it is written: few
    enough for both, and for what is written, to be in a core's first cache."""
    long_row: int = 1 << 14
    """Elements of a row, with a weight for each, from which parts of rows are tasks. A row of 2e6
    took a sixth of the time on one thread of an EPYC, 100 of 32768 as long as whole."""
    long_rows: int = 1 << 22
    """Elements of all such rows up to which they are: more are read again from memory, unless whole
    rows, four of x and dy, would be, too. 200 rows of 32768 then took 1.3 times as long."""
    element_part: int = 1 << 10
    """Elements of such a part: float64 sums of as many gradients of weight and bias stay in a
    core's first cache, beside dy and x."""
    overlap: int = 1 << 15
    """Elements of a block up to which the next block is reduced while it is written: with more, it
    has left a core's own cache by then."""
    run: int = 1 << 12
    """Elements of rows of one sample, each with weights of its own, that are handled for all
    samples in turn: a run of memory, whose weights, and the sums of whose gradients, stay in a
    core's own cache."""
    task: int = 1 << 14
    """Elements of a task: enough to cost nothing beside its start."""
    long_task: int = 1 << 16
    """Elements of a task whose sums are added to others', or that has a part of each row only."""
    tasks: int = 64
    """Tasks of a call: enough for many cores."""

    mapped_part: int = 1 << 25
    """Bytes of a file in memory that are read at a time, and then given back: more than a disk
    needs to be fast, and less than anyone misses."""

    recycle: bool = os.environ.get("NUMBANORM_RECYCLE", "1") != "0"
    """Whether outputs take the memory of earlier ones (`python asv_benchmarks/recycling.py` says
    what it gives); NUMBANORM_RECYCLE=0 switches it off, and the next as well."""
    dx_over_dy: bool = os.environ.get("NUMBANORM_RECYCLE", "1") != "0"
    """Whether PyTorch's gradient of x is written over that of y where nobody else has it."""
    recycle_tensors_from: int = 1 << 20
    """Bytes from which a tensor's memory is recycled: what is smaller malloc has at hand."""
    recycle_arrays_from: int = 1 << 22
    """The same for NumPy arrays."""
    layouts_bytes: int = 16 << 20
    """Bytes of the layouts that are kept for shapes that were seen before, 5 to 100 KB each."""

    @property
    def stream_bytes(self) -> float:
        """Bytes of an output from which it is written by streaming stores.

        x, y, dy and dx fill a cache together, with what other layers have there. Never takes 20 to
        50 % longer for 25 MB and more; docs/performance.md has the table.
        """
        return math.inf if self.cache_bytes is None else self.cache_bytes / 8


# The last one is in force.
_stack = [Tuning()]


def tuning() -> Tuning:
    """Return what is in force."""
    return _stack[-1]


@contextlib.contextmanager
def use(**changes: Any) -> Iterator[Tuning]:
    """Have other values in force, in all threads, until the end of a ``with``."""
    changed = dataclasses.replace(tuning(), **changes)
    _stack.append(changed)
    try:
        yield changed
    finally:
        _stack.remove(changed)  # another thread's may be above it
