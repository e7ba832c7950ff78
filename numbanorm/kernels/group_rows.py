"""Groups of a few rows, each row with a weight: (A, R, B, L), reduced and written in one kernel."""

from typing import NamedTuple

import numpy as np

from numbanorm.kernels.access import arithmetic, first_value, take_row
from numbanorm.kernels.formulas import (
    Gradient,
    Scale,
    ScaleShift,
    group_coefficients,
    round_coefficients,
    unshift_all,
    write_all_statistics,
    write_rstds,
)
from numbanorm.kernels.fused import keep_dy
from numbanorm.kernels.modes import GroupTiles, Mode
from numbanorm.kernels.outputs import write_row_called
from numbanorm.kernels.pipeline import prefetch_distance, reduce_while_writing
from numbanorm.numba_ext.jit import if_none, inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, fence, release
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LONG_ROW, PREFETCH_FAR


class Block(NamedTuple):
    """``n`` groups: row j of run i is row ``start + i * step + j``.

    There are ``n_runs`` runs of ``n_in_run`` rows. A run has the rows of one group where B is 1,
    else a row of each group.
    """

    n: int
    start: int
    step: int
    n_runs: int
    n_in_run: int


@inline
def _next_block(first, end, shape, size):
    """Return the next groups, up to ``size`` of them, before group ``end``."""
    n_rows, n_inner = shape[1:3]
    if n_inner == 1:
        n = min(size, end - first)
        return Block(n, first * n_rows, n_rows, n, n_rows)
    a, b = first // n_inner, first % n_inner
    n = min(size, end - first, n_inner - b)
    return Block(n, a * n_rows * n_inner + b, n_inner, n_rows, n)


@inline
def _row_of(block, i, j, length):
    """Return the index of row j of run i of a block, and its length, or 0 if there is none."""
    is_row = i < block.n_runs and j < block.n_in_run
    return block.start + i * block.step + j, length if is_row else 0


@inline
def _scale_shift(n, g, mean, rstd, p, feature, weight, bias, dtype):
    """Return ScaleShift of row p, with n elements, in group g; of no elements anything."""
    if n == 0:
        return ScaleShift(*round_coefficients(0.0, 0.0, 0.0, dtype))
    k = feature[p]
    return ScaleShift(*round_coefficients(mean[g], rstd * weight[k], bias[k], dtype))


# The coefficients of y, or with dy of dx.
_coefficients = if_none(lambda dy, shift, gradient: shift, lambda dy, shift, gradient: gradient)


@kernel
def group_rows(
    threads, dy, x, mask, fused, feature, parameters, mode, tiles, streamed, group_stats, y, sums
):
    """Normalise groups of R rows; with dy write dx, and the sums of dy and dy * x_hat of each row.

    dy or None, x, mask or None, y or dx (A, R, B, L); ``feature`` (A * R * B,) says which weight
    and bias (2, F) a row has. ``group_stats`` (3, A * B) are taken and written in forward if
    ``mode.use_batch_stats``, else read. Up to ``tiles.block`` groups are a block: the next one is
    reduced while one is written if ``tiles.overlap``, else after that. ``sums`` are
    (2, A * R * B), or None without dy.
    """
    mode, tiles = Mode(*mode), GroupTiles(*tiles)
    n_rows, n_inner, length = x.shape[1:]
    first, end = thread_range(threads, x.shape[0] * n_inner)
    (weight, bias), (count, mean, var) = unstack(parameters, 2), unstack(group_stats, 3)
    out, size = flat_slice(y, 0, y.size), tiles.block
    use_batch_stats, needs_forward = mode.use_batch_stats, dy is not None and fused is not None
    interleaved, overlap = n_inner > 1, tiles.overlap and use_batch_stats
    scratch, rounded = allocate(6, size, np.float64), allocate(4, size, arithmetic(x))
    (rstd, n, center, s0, s1, next_rstd), (r, m, b, c) = unstack(scratch, 6), unstack(rounded, 4)
    if dy is None:
        # Twice as far as elsewhere: one array is read.
        distance = prefetch_distance(streamed, 2 * PREFETCH_FAR, y)
    else:
        distance = prefetch_distance(streamed, PREFETCH_FAR, y)
    # A thread's groups are next to each other: the longer a run is, the faster it is read.
    written, first_written = Block(0, 0, 0, 0, 0), first
    while first < end or written.n > 0:
        reduced = Block(0, 0, 0, 0, 0)
        if first < end and (overlap or written.n == 0):
            reduced = _next_block(first, end, x.shape, size)
        for g in range(reduced.n):
            n[g], s0[g], s1[g] = 0.0, 0.0, 0.0
        counts, means, variances = (
            flat_slice(count, first, reduced.n), flat_slice(mean, first, reduced.n),
            flat_slice(var, first, reduced.n),
        )  # fmt: skip
        if needs_forward:
            write_rstds(counts, variances, mode.eps, next_rstd)
        n_runs, n_in_run = written.n_runs, written.n_in_run
        if dy is not None or use_batch_stats:
            n_runs, n_in_run = max(reduced.n_runs, n_runs), max(reduced.n_in_run, n_in_run)
        for i in range(n_runs):
            for j in range(n_in_run):
                g = j if interleaved else i
                q, n_write = _row_of(written, i, j, length)
                p, n_next = _row_of(reduced, i, j, length)
                if dy is None:
                    if not use_batch_stats:
                        n_next = 0
                    elif length < LONG_ROW and not interleaved:
                        n_next = n_next * n_rows if j == 0 else 0
                # The upcoming row is prefetched also where nothing is reduced.
                after = q + (0 if interleaved else written.n * n_rows)
                at = (p if reduced.n > 0 else after) * length
                args = feature, weight, bias, arithmetic(x)
                shift = _scale_shift(n_write, first_written + g, mean, rstd[g], q, *args)
                next_shift = _scale_shift(
                    n_next if needs_forward else 0, first + g, mean, next_rstd[g], p, *args
                )
                upcoming = take_row(dy, x, mask, fused, None, at + distance, 0)
                next_row = take_row(dy, x, mask, fused, next_shift, at, n_next)
                keep_dy(dy, fused, next_row, n_next, None)
                row = take_row(dy, x, mask, fused, shift, q * length, n_write)
                center_of_next = 0.0
                if dy is None:
                    if n_next > 0:
                        if n[g] == 0:
                            center[g] = first_value(next_row.x, next_row.mask)
                        center_of_next = center[g]
                else:
                    if n_next > 0:
                        center_of_next = mean[first + g]
                    if n_write > 0:
                        sums[1, q] *= rstd[g]
                    if not use_batch_stats:
                        direct = Scale(shift.s)
                        write_row_called(streamed, row, n_write, direct, out, q * length, upcoming)
                        n_write = 0
                coef = _coefficients(dy, shift, Gradient(shift.s, r[g], m[g], b[g], c[g]))
                n_row, sum_0, sum_1 = reduce_while_writing(
                    streamed, next_row, n_next, center_of_next, row, n_write, coef, out, q * length,
                    upcoming,
                )  # fmt: skip
                if dy is None:
                    if n_next > 0:
                        n[g] += n_row
                        s0[g] += sum_0
                        s1[g] += sum_1
                else:
                    if n_next > 0:
                        sums[0, p], sums[1, p] = sum_0, sum_1
                        s0[g] += weight[feature[p]] * sum_0
                        s1[g] += weight[feature[p]] * sum_1
        if dy is None:
            if use_batch_stats:
                # Now they are mean, m2 and the mean's rest.
                of_groups = flat_slice(n, 0, reduced.n)
                unshift_all(of_groups, center, s1, s0)
                write_all_statistics(of_groups, center, s1, mode.center, counts, means, variances)
            write_rstds(counts, variances, mode.eps, rstd)
        else:
            write_rstds(counts, variances, mode.eps, rstd)
            group_coefficients(counts, means, rstd, s0, s1, mode.center, r, m, b, c)
        written, first_written, first = reduced, first, first + reduced.n
    if streamed:
        fence()
    release((scratch, rounded))
