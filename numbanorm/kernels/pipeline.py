"""Software pipelining: reduce one row (latency bound) while another is written (bandwidth bound).

Groups that fit in a cache are handled in blocks, and the two loops over a row are one:

    reduce   block 0 | block 1 | block 2 | ...
    write            | block 0 | block 1 | block 2 ...
    prefetch  ahead of what is reduced

Together they take little longer than the longer of both would alone.
"""

import numpy as np

from numbanorm.kernels.access import (
    elements_to_line,
    prefetch_parts,
    prefetch_row,
    vectors_end,
)
from numbanorm.kernels.outputs import write_output, write_part
from numbanorm.kernels.reduce import add_step, begin_sums, end_sums
from numbanorm.numba_ext.jit import inline
from numbanorm.numba_ext.lines import line_size
from numbanorm.numba_ext.vectors import splat
from numbanorm.tuning import LANES, PREFETCH_NEAR, PREFETCH_NEAR_UP_TO, STEP


@inline
def prefetch_distance(streamed, n_lines, y):
    """Return how many elements ahead to prefetch: so many lines, or fewer if x is in a cache."""
    near = not streamed and y.size < PREFETCH_NEAR_UP_TO
    return np.intp((PREFETCH_NEAR if near else n_lines) * line_size(y))


@inline
def reduce_while_writing(streamed, next_row, n_next, center, row, n, coef, y, place, upcoming):
    """Return the sums of ``next_row``, see reduce.end_sums, while the output of ``row`` is written.

    The output of n elements by ``coef`` goes to y (N,) from ``place`` on, see outputs.write_row.
    Either row may have no elements. The ``upcoming`` row is prefetched.
    """
    centers = splat(center)
    sums = begin_sums(next_row, n_next, centers)
    start, head = np.intp(0), elements_to_line(streamed, y, place, n)
    if head > 0:
        prefetch_parts(y, place, n)
        write_part(streamed, row, start, head, coef, start, y, place)
    end, next_end = head + (n - head) // STEP * STEP, n_next // STEP * STEP
    for i in range(0, max(end - head, next_end), STEP):
        prefetch_row(upcoming, i)
        prefetch_row(upcoming, i + LANES)
        if i < next_end:
            sums = add_step(next_row, i, centers, sums)
        k = head + i
        if k < end:
            write_output(coef, streamed, row, k, None, k, y, place + k)
            k += LANES
            write_output(coef, streamed, row, k, None, k, y, place + k)
    if vectors_end(streamed, y, head, n) > end:
        write_output(coef, streamed, row, end, None, end, y, place + end)
        end += LANES
    write_part(streamed, row, end, n - end, coef, end, y, place + end)
    return end_sums(next_row, n_next, sums)
