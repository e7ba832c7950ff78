"""Groups of a few rows, each with a weight, forward and backward in one kernel each."""

from numbanorm.kernels.access import first_value, take_row
from numbanorm.kernels.apply import apply_vector, backward_vector, scale_vector
from numbanorm.kernels.formulas import (
    group_coefficients,
    round_coefficients,
    unshift_all,
    write_rstds,
    write_statistics,
)
from numbanorm.kernels.overlap import prefetch_distance, reduce_while_writing
from numbanorm.kernels.stream import (
    buffer_size,
    close_stream,
    lines_at_once,
    open_stream,
    write_run,
)
from numbanorm.numba_ext.jit import inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, release
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LONG_ROW, PREFETCH_FAR


@inline
def _next_groups(first, end, shape, block):
    """Return how many groups come next, where their rows start, and how these follow.

    Row j of run i is row ``start + i * step + j``, for ``n_runs`` runs of ``n_in_run`` rows. A run
    has the rows of one group where B is 1, else a row of each group.
    """
    n_rows, n_inner = shape[1:3]
    if n_inner == 1:
        n_here = min(block, end - first)
        return n_here, first * n_rows, n_rows, n_here, n_rows
    a, b = first // n_inner, first % n_inner
    n_here = min(block, end - first, n_inner - b)
    return n_here, a * n_rows * n_inner + b, n_inner, n_rows, n_here


@inline
def _row_of_block(block, i, j, length):
    """Return the number of row j of run i of a block, see _next_groups, and its length or 0."""
    _, start, step, n_runs, n_in_run = block
    return start + i * step + j, length if i < n_runs and j < n_in_run else 0


@kernel
def forward_groups(
    threads, x, mask, feature, parameters, eps, center, use_batch_stats, block, overlap, streamed,
    statistics, y,
):  # fmt: skip
    """Normalise groups of R rows: x, mask or None, y (A, R, B, L), weight and bias (2, F).

    ``feature`` (A * R * B,) says which weight a row has; ``statistics`` (3, A * B) are taken and
    written if ``use_batch_stats``, else read. Up to ``block`` groups are handled at once, and those that come
    next ``overlap`` them or after them. ``streamed`` is True or None.
    """
    n_rows, n_inner, length = x.shape[1:]
    first, end = thread_range(threads, x.shape[0] * n_inner)
    (weight, bias), (count, mean, var) = unstack(parameters, 2), unstack(statistics, 3)
    interleaved = n_inner > 1
    own = allocate(5, block, mean.dtype)
    buffer = allocate(None, buffer_size(lines_at_once(y), streamed, y), y.dtype)
    rstd, shift, n, s1, s2 = unstack(own, 5)
    stream, out = open_stream(buffer), flat_slice(y, 0, y.size)
    # Twice as far as elsewhere: one array is read, and no weights of elements are to be held.
    overlap, distance = (
        overlap and use_batch_stats,
        prefetch_distance(streamed, 2 * PREFETCH_FAR, y),
    )
    # A thread's groups are next to each other: the longer a run is, the faster it is read.
    nothing = 0, 0, 0, 0, 0
    written, first_written = nothing, first
    while first < end or written[0] > 0:
        summed = nothing
        if first < end and (overlap or written[0] == 0):
            summed = _next_groups(first, end, x.shape, block)
        for g in range(summed[0]):
            n[g], s1[g], s2[g] = 0.0, 0.0, 0.0
        for i in range(max(summed[3], written[3])):
            for j in range(max(summed[4], written[4])):
                g = j if interleaved else i
                q, n_here = _row_of_block(written, i, j, length)
                p, n_next = _row_of_block(summed, i, j, length)
                if not use_batch_stats:
                    n_next = 0
                elif length < LONG_ROW and not interleaved:
                    n_next = n_next * n_rows if j == 0 else 0
                # Where nothing is summed up, what comes next is asked for all the same.
                at = (
                    p if summed[0] > 0 else q + (0 if interleaved else written[0] * n_rows)
                ) * length
                next_row = take_row(None, x, mask, at, n_next)
                upcoming = take_row(None, x, mask, at + distance, 0)
                around = shift[g]
                if n_next > 0 and n[g] == 0:
                    around = first_value(next_row[1], next_row[2])
                    shift[g] = around
                n_valid = take_row(None, x, None, q * length, n_here)
                mu, scale, offset = 0.0, 0.0, 0.0
                if n_here > 0:
                    mu, scale = mean[first_written + g], rstd[g] * weight[feature[q]]
                    offset = bias[feature[q]]
                coef = round_coefficients(mu, scale, offset, y)
                n_row, sum_1, sum_2, stream = reduce_while_writing(
                    streamed, stream, next_row, n_next, upcoming, around, apply_vector, n_valid, n_here,
                    coef, out, q * length,
                )  # fmt: skip
                if n_next > 0:
                    n[g] += n_row
                    s1[g] += sum_1
                    s2[g] += sum_2
        last = first + summed[0]
        if use_batch_stats:
            unshift_all(flat_slice(n, 0, summed[0]), shift, s1, s2)
            for g in range(summed[0]):
                write_statistics(first + g, n[g], shift[g], s2[g], center, count, mean, var)
        write_rstds(count[first:last], var[first:last], eps, rstd)
        written, first_written, first = summed, first, last
    close_stream(streamed, stream, out)
    release((own, buffer))


@kernel
def backward_groups(
    threads, dy, x, mask, feature, parameters, eps, center, use_batch_stats, block, overlap, streamed,
    statistics, dx, sums,
):  # fmt: skip
    """Write dx of groups of R rows, and each row's sums of dy and dy * x_hat, (2, A * R * B).

    The other arguments are as in forward_groups.
    """
    n_rows, n_inner, length = x.shape[1:]
    first, end = thread_range(threads, x.shape[0] * n_inner)
    (weight,), (count, mean, var), (s0, s1) = (
        unstack(parameters, 1), unstack(statistics, 3), unstack(sums, 2)
    )  # fmt: skip
    interleaved = n_inner > 1
    own, rows = allocate(3, block, mean.dtype), allocate(4, block, dx.dtype)
    (rstd, g0, g1), (r, m, b, c) = unstack(own, 3), unstack(rows, 4)
    buffer = allocate(None, buffer_size(lines_at_once(dx), streamed, dx), dx.dtype)
    stream, out = open_stream(buffer), flat_slice(dx, 0, dx.size)
    overlap, distance = overlap and use_batch_stats, prefetch_distance(streamed, PREFETCH_FAR, dx)
    nothing = 0, 0, 0, 0, 0
    written = nothing
    while first < end or written[0] > 0:
        summed = nothing
        if first < end and (overlap or written[0] == 0):
            summed = _next_groups(first, end, x.shape, block)
        for g in range(summed[0]):
            g0[g], g1[g] = 0.0, 0.0
        for i in range(max(summed[3], written[3])):
            for j in range(max(summed[4], written[4])):
                g = j if interleaved else i
                q, n_here = _row_of_block(written, i, j, length)
                p, n_next = _row_of_block(summed, i, j, length)
                at = (
                    p if summed[0] > 0 else q + (0 if interleaved else written[0] * n_rows)
                ) * length
                next_row = take_row(dy, x, mask, at, n_next)
                upcoming = take_row(dy, x, mask, at + distance, 0)
                place, scale = q * length, 0.0
                if n_here > 0:
                    s1[q] *= rstd[g]
                    scale = rstd[g] * weight[feature[q]]
                coef = dx.dtype.type(scale), r[g], m[g], b[g], c[g]
                n_valid = take_row(dy, x, mask, place, n_here)
                if not use_batch_stats:
                    stream = write_run(
                        streamed, stream, scale_vector, n_valid, upcoming, n_here, coef, out, place
                    )
                    n_here = 0
                around = mean[first + g] if n_next > 0 else 0.0
                _, sum_1, sum_x, stream = reduce_while_writing(
                    streamed, stream, next_row, n_next, upcoming, around, backward_vector, n_valid,
                    n_here, coef, out, place,
                )  # fmt: skip
                if n_next > 0:
                    s0[p] = sum_1
                    s1[p] = sum_x
                    g0[g] += weight[feature[p]] * sum_1
                    g1[g] += weight[feature[p]] * sum_x
        last = first + summed[0]
        write_rstds(count[first:last], var[first:last], eps, rstd)
        group_coefficients(count[first:last], mean[first:last], rstd, g0, g1, center, r, m, b, c)
        written, first = summed, last
    close_stream(streamed, stream, out)
    release((own, rows, buffer))
