"""Streaming (non-temporal) stores: a loop writes to a buffer, which leaves in whole lines."""

import numpy as np

from numbanorm.kernels.access import prefetch_row, take_row
from numbanorm.numba_ext.jit import called, inline
from numbanorm.numba_ext.lines import fence, line_size, store_line, to_next_line
from numbanorm.numba_ext.vectors import load, prefetch, store
from numbanorm.numba_ext.views import flat_slice
from numbanorm.tuning import BUFFER, LANES, LONG_BUFFER, LONG_BUFFER_UP_TO, ROWS


@inline
def lines_at_once(y):
    """Return how many elements of a row are written to a buffer at once."""
    return (LONG_BUFFER if y.size < LONG_BUFFER_UP_TO else BUFFER) * line_size(y)


@inline
def buffer_size(n, streamed, y):
    """Return how many elements a buffer holds: n on their way to y, and those that are kept.

    These are read as a vector, wherever it begins.
    """
    return n + 2 * LANES if streamed else 0


@inline
def flush(buffer, n, y, at):
    """Write n elements to y (N,) from ``at`` on; return how many are kept, and where they belong.

    What is only a part of a line is kept for those that come next, unless it is the first.
    """
    line = line_size(y)
    begin = min(n, to_next_line(y, at))
    end = begin + (n - begin) // line * line
    for i in range(begin):
        y[at + i] = buffer[i]
    for i in range(begin, end, line):
        store_line(y, at + i, buffer, i)
    store(load(buffer, end, None), buffer, np.intp(0), None)
    return n - end, at + end


@called
def commit(buffer, pending, y, at):
    """Write what was kept to y (N,)."""
    for i in range(pending):
        y[at + i] = buffer[i]


@inline
def open_stream(buffer):
    """Return what is between loops and memory: the buffer, how many are kept, where they belong."""
    return buffer, np.intp(0), np.intp(0)


@inline
def _seek(stream, y, place):
    """Return the stream once what is kept, unless ``place`` comes next, is written to y (N,)."""
    buffer, pending, at = stream
    if at + pending != place:
        commit(buffer, pending, y, at)
        pending, at = np.intp(0), place
    return buffer, pending, at


@inline
def reserve(streamed, stream, y, place, n):
    """Return where to write n elements that come to y (N,) at ``place``, and the stream."""
    if not streamed:
        return flat_slice(y, place, n), stream
    stream = _seek(stream, y, place)
    return flat_slice(stream[0], stream[1], n), stream


@inline
def end_run(streamed, stream, y, n):
    """Return the stream once a run of n elements is written."""
    buffer, pending, at = stream
    if streamed:
        pending, at = flush(buffer, pending + n, y, at)
    return buffer, pending, at


@inline
def write_vectors(write, row, upcoming, lo, hi, coef, ys, offset):
    """Write elements lo to hi of a row to ys, where ``offset`` is added to their place.

    ``write`` is the function that writes a vector, from ``by``: numbers, or rows of them. The same
    elements of another row are asked for.
    """
    whole = hi - (hi - lo) % LANES
    for i in range(lo, whole, LANES):
        prefetch_row(upcoming, i)
        write(row, i, None, coef, ys, i + offset)
    if whole < hi:
        write(row, whole, hi - whole, coef, ys, whole + offset)


@inline
def write_run(streamed, stream, write, row, upcoming, n, coef, y, place):
    """Write a row of n elements to y (N,) from ``place`` on, and return the stream.

    See write_vectors about the others. ``streamed`` is True or None, as having both makes a kernel
    slower for short rows.
    """
    start = np.intp(0)
    if streamed is None:
        write_vectors(write, row, upcoming, start, n, coef, y, place)
        return stream
    n_at_once = lines_at_once(y)
    for i in range(start, n, n_at_once):
        n_here = min(n_at_once, n - i)
        ys, stream = reserve(streamed, stream, y, place + i, n_here)
        write_vectors(write, row, upcoming, i, i + n_here, coef, ys, -i)
        stream = end_run(streamed, stream, y, n_here)
    return stream


@inline
def close_stream(streamed, stream, y):
    """Write what is kept to y (N,)."""
    if streamed:
        buffer, pending, at = stream
        commit(buffer, pending, y, at)
        fence()


@inline
def write_columns(streamed, buffer, write, dy, x, mask, a, lo, hi, c0, c1, coef, y):
    """Write rows lo to hi of y[a], columns c0 to c1, from rows of coefficients; see write_run."""
    stream, out, n, step = open_stream(buffer), flat_slice(y, 0, y.size), c1 - c0, x.shape[2]
    start = np.intp(0)
    for i in range(lo, hi):
        at = (a * x.shape[1] + i) * step + c0
        row, upcoming = take_row(dy, x, mask, at, n), take_row(dy, x, None, at + ROWS * step, 0)
        ys, stream = reserve(streamed, stream, out, at, n)
        write_vectors(write, row, upcoming, start, n, coef, ys, start)
        stream = end_run(streamed, stream, out, n)
    close_stream(streamed, stream, out)


@inline
def write_buffered_row(buffer, n, y, at, distance):
    """Write a row (n,) to y (N,) from ``at`` on, by streaming stores but for parts of lines.

    A store to one waits for the line, and so does what is stored after it: those of a row that
    comes so far ahead are asked for.
    """
    if to_next_line(y, at) > 0:
        prefetch(y, at + distance)
    pending, end = flush(buffer, n, y, at)
    if pending > 0:
        prefetch(y, end + distance)
    commit(buffer, pending, y, end)
