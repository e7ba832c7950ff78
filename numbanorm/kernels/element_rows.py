"""Groups that are rows with a weight for each element: (M, D), as in LayerNorm.

A row fits in a cache, so that its statistics and its output are one pass over memory together.
"""

import numpy as np

from numbanorm.kernels.access import arithmetic, first_value, read, take_row
from numbanorm.kernels.formulas import (
    ElementAffine,
    ElementGradient,
    ElementScale,
    enters_sums,
    round_coefficients,
    unshift,
    write_rstds,
    write_statistics,
    x_hat,
)
from numbanorm.kernels.fused import read_dy, row_again, row_of_norm
from numbanorm.kernels.modes import ElementTiles, Mode
from numbanorm.kernels.outputs import write_row, write_row_called
from numbanorm.kernels.pipeline import prefetch_distance, reduce_while_writing
from numbanorm.kernels.scratch import add_up, clear, spread
from numbanorm.numba_ext.jit import inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.lines import allocate, fence, release
from numbanorm.numba_ext.vectors import is_finite, load, prefetch, splat, store, total, where, widen
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import ELEMENTS, LANES, PREFETCH_FAR


@inline
def _repeated_size(parameters, n_rows, length):
    """Return how many elements the repeated weights of some rows have; 0 if none are repeated."""
    return n_rows * length if parameters.shape[2] < length else 0


@inline
def _element_weights(values, n, k, n_rows, length, repeated):
    """Return one of ``values`` (G, n = D / span) for each element of rows from k on, (n_rows * D,).

    Unless span is 1 they are written to ``repeated``, which is in a cache and begins where a line
    does: they are read for each sample.
    """
    weights = flat_slice(values, k * n, n_rows * n)
    if n < length:
        spread(weights, length // n, repeated)
        weights = flat_slice(repeated, 0, n_rows * length)
    return weights


@kernel
def forward_element_rows(
    threads, x, mask, fused, parameters, mode, tiles, streamed, group_stats, y
):
    """Normalise rows: x, mask or None, y (M, D), weight and bias (2, G, D / span).

    Rows i and i + G have the same weights, each for ``span`` elements next to each other.
    ``group_stats`` (3, M), count, mean and variance of each row, are taken and written if
    ``mode.use_batch_stats``, else read. ``tiles.block`` rows are a block: the next one is reduced
    while one is written if ``tiles.overlap``, else after that. Blocks are taken in the order of
    memory where ``tiles.run`` is G or y is ``streamed``; else one of each sample, with the same
    weights, before the next weights.
    """
    mode, tiles = Mode(*mode), ElementTiles(*tiles)
    (n_rows, length), (_, n_weights, n_values), block = x.shape, parameters.shape, tiles.block
    use_batch_stats = mode.use_batch_stats
    overlap = tiles.overlap and use_batch_stats
    n_units = (n_rows + block - 1) // block
    unit, end = thread_range(threads, n_units)
    (weight, bias), (count, mean, var) = unstack(parameters, 2), unstack(group_stats, 3)
    # With streaming stores each run of rows that is not in the order of memory would end in parts
    # of lines.
    in_order = tiles.run == n_weights or streamed
    step, n_blocks_alike, n_loaded = block, n_units, n_weights
    if not in_order:
        step, n_blocks_alike, n_loaded = n_weights, n_rows // n_weights, block
    distance = prefetch_distance(streamed, PREFETCH_FAR, y) if in_order else step * length
    repeated = allocate(2, _repeated_size(parameters, n_loaded, length), arithmetic(x))
    repeated_weight, repeated_bias = unstack(repeated, 2)
    weights, biases = repeated_weight, repeated_bias
    rstd, out = allocate(None, block, np.float64), flat_slice(y, 0, y.size)
    n_written, first_written, k_written, k_loaded = 0, 0, 0, -1
    while unit < end or n_written > 0:
        # The first of the weights of a unit, and its first row.
        k = unit // n_blocks_alike * block
        first = unit % n_blocks_alike * step + k
        n_reduced = min(block, n_rows - first) if unit < end and (overlap or n_written == 0) else 0
        if n_written > 0 and k_loaded != k_written:
            k_loaded = k_written
            weights = _element_weights(
                weight, n_values, k_loaded, n_loaded, length, repeated_weight
            )
            biases = _element_weights(bias, n_values, k_loaded, n_loaded, length, repeated_bias)
        o = (first_written % n_weights - k_loaded) * length
        for j in range(max(n_reduced, n_written)):
            g, i = first + j, first_written + j
            n_next = length if use_batch_stats and j < n_reduced else 0
            n = length if j < n_written else 0
            # The upcoming row is prefetched also where nothing is reduced.
            at = g * length
            next_row = take_row(None, x, mask, None, None, at, n_next)
            upcoming = take_row(None, x, mask, fused, None, at + distance, 0)
            mu, scale = (mean[i], rstd[j]) if n > 0 else (0.0, 0.0)
            affine = flat_slice(weights, o, length), flat_slice(biases, o, length)
            coef = ElementAffine(*affine, *round_coefficients(mu, scale, 0.0, arithmetic(x)))
            o = o + length if o + length < n_loaded * length else 0
            shift = first_value(next_row.x, next_row.mask)
            n_next, s1, s2 = reduce_while_writing(
                streamed, next_row, n_next, shift,
                take_row(None, x, None, fused, None, i * length, n), n, coef, out, i * length,
                upcoming,
            )  # fmt: skip
            if use_batch_stats and j < n_reduced:
                mu, m2, _ = unshift(n_next, shift, s1, s2)
                write_statistics(g, n_next, mu, m2, mode.center, count, mean, var)
        write_rstds(
            flat_slice(count, first, n_reduced), flat_slice(var, first, n_reduced), mode.eps, rstd
        )
        if n_reduced > 0:
            unit += 1
        n_written, first_written, k_written = n_reduced, first, k
    if streamed:
        fence()
    release((repeated, rstd))


# -- Backward: four rows at a time, so that the sums of the gradients of weight and bias are read
# -- and written once for four.


@inline
def _entering(counts, x, dy, product, zero):
    """Return dy and its product with x_hat where they enter the sums, else zero."""
    if counts is None:
        return dy, product
    enters = enters_sums(x, counts)
    return where(enters, dy, zero), where(enters, product, zero)


@inline
def terms(row, i, n):
    """Return vectors of dy and dy * x_hat from i on, and 0 where they do not enter the sums.

    ``row.forward`` is ElementAffine; see access.read about n.
    """
    dy, x, counts = (
        read_dy(row.fused, row.forward, row, i, n, i),
        read(row.x, i, n),
        read(row.mask, i, n),
    )
    m, r, t = splat(row.forward.m), splat(row.forward.rstd), splat(row.forward.t)
    normalized = x_hat(x, m, r, t)
    # x_hat may overflow where x is finite. A NaN that counts has to reach the sums.
    finite = where(is_finite(r), normalized, x)
    return _entering(counts, finite, dy, dy * normalized, splat(arithmetic(row.x)(0.0)))


@inline
def _add_four_vectors(rows, i, n, dweight, dbias, distance):
    """Add dy * x_hat and dy of four rows to dweight and dbias, from i on; see access.read about n.

    Return vectors of g = dy * weight, and of g * x_hat, of each row. Prefetch dy.
    """
    prefetch(rows[0].dy, i + distance)
    prefetch(rows[1].dy, i + distance)
    prefetch(rows[2].dy, i + distance)
    prefetch(rows[3].dy, i + distance)
    a, a_hat = terms(rows[0], i, n)
    b, b_hat = terms(rows[1], i, n)
    c, c_hat = terms(rows[2], i, n)
    d, d_hat = terms(rows[3], i, n)
    store(load(dweight, i, n) + widen((a_hat + b_hat) + (c_hat + d_hat)), dweight, i, n)
    store(load(dbias, i, n) + widen((a + b) + (c + d)), dbias, i, n)
    w = load(rows[0].forward.weight, i, n)
    return (a * w, b * w, c * w, d * w), (a_hat * w, b_hat * w, c_hat * w, d_hat * w)


@inline
def _row_or_zeros(dy, x, mask, fused, forward, zeros, at, is_row, n):
    """Return n elements of a row that begins at ``at``, or of zeros if there is no such row."""
    row = take_row(zeros, zeros, mask, fused, forward, 0, n)
    if is_row:
        row = take_row(dy, x, mask, fused, forward, at, n)
    return row


@inline
def _affine(weight, bias, coef, j, d, n):
    """Return ElementAffine of n elements from d on of a row with m, rstd and t in coef[j]."""
    return ElementAffine(
        flat_slice(weight, d, n), flat_slice(bias, d, n), coef[j, 0], coef[j, 1], coef[j, 2]
    )


@inline
def _add_four(v, w):
    return v[0] + w[0], v[1] + w[1], v[2] + w[2], v[3] + w[3]


@inline
def _add_four_rows(rows, n, sums, dweight, dbias, distance):
    """Add what backward sums up over few elements, n, of four rows.

    ``sums`` (4, 2) are those of g = dy * weight and of g * x_hat, accumulated in the type of the
    elements: each of the many lanes of a vector gets too few of them for float32 to lose digits.
    """
    n_vector = n // LANES * LANES
    args = dweight, dbias, distance
    g, g_hat = _add_four_vectors(rows, n_vector, n - n_vector, *args)
    for i in range(0, n_vector, LANES):
        next_g, next_g_hat = _add_four_vectors(rows, i, None, *args)
        g, g_hat = _add_four(g, next_g), _add_four(g_hat, next_g_hat)
    sums[0, 0], sums[0, 1] = sums[0, 0] + total(g[0]), sums[0, 1] + total(g_hat[0])
    sums[1, 0], sums[1, 1] = sums[1, 0] + total(g[1]), sums[1, 1] + total(g_hat[1])
    sums[2, 0], sums[2, 1] = sums[2, 0] + total(g[2]), sums[2, 1] + total(g_hat[2])
    sums[3, 0], sums[3, 1] = sums[3, 0] + total(g[3]), sums[3, 1] + total(g_hat[3])


@inline
def _write_rstds_of_runs(count, var, eps, first, last, step, k, run, rstd):
    """Write rstd of ``run`` groups from k on of each of samples ``first`` to ``last``.

    A sample has ``step`` groups; where the run is all of them, the samples are one run.
    """
    n = (last - first) * run if run == step else run
    for at in range(0, (last - first) * run, max(n, 1)):
        i = first * step + k + at // run * step
        write_rstds(flat_slice(count, i, n), flat_slice(var, i, n), eps, flat_slice(rstd, at, n))


@kernel
def backward_element_rows(
    threads, dy, x, mask, fused, parameters, mode, tiles, streamed, group_stats, dx, dparameters
):
    """Write dx and parameter gradients of rows: dy, x, mask or None, dx (M, D).

    ``parameters`` (2, G, D / span) are weight and bias as in forward_element_rows; rows i and i + G
    are of two samples. ``group_stats`` (3, M) are those of forward. dweight and dbias
    (2, T, G * D / span), a row for each of T blocks of samples, are written unless they are empty.
    A task has ``tiles.run`` rows of each sample of a block; G is a multiple of it.
    """
    mode, tiles = Mode(*mode), ElementTiles(*tiles)
    (_, n_weights, n_values), length, run = parameters.shape, x.shape[1], tiles.run
    n_samples, n_blocks = x.shape[0] // n_weights, dparameters.shape[1]
    block, has_weights = (n_samples + n_blocks - 1) // n_blocks, dparameters.shape[2] > 0
    begin, end = thread_range(threads, n_weights // run * n_blocks)
    (weight, bias), (count, mean, var) = unstack(parameters, 2), unstack(group_stats, 3)
    rstd, sums = allocate(None, block * run, np.float64), allocate(4, 2, np.float64)
    coef, c = allocate(4, 3, arithmetic(x)), allocate(2, 4, arithmetic(x))
    zeros = allocate(None, min(ELEMENTS, length), x.dtype)
    gradients = allocate(2, run * length, np.float64)  # of weight and bias
    repeated = allocate(2, _repeated_size(parameters, run, length), arithmetic(x))
    repeated_weight, repeated_bias = unstack(repeated, 2)
    dy_of_norm = allocate(0 if fused is None else 4, length, arithmetic(x))
    size, scratch = dy_of_norm.shape[1], flat_slice(dy_of_norm, 0, dy_of_norm.size)
    clear(zeros)
    out = flat_slice(dx, 0, dx.size)
    for task in range(begin, end):
        q, b = task // n_blocks, task % n_blocks
        k0, first, last = q * run, b * block, min((b + 1) * block, n_samples)
        _write_rstds_of_runs(count, var, mode.eps, first, last, n_weights, k0, run, rstd)
        weights = _element_weights(weight, n_values, k0, run, length, repeated_weight)
        biases = repeated_bias
        if fused is not None:
            biases = _element_weights(bias, n_values, k0, run, length, repeated_bias)
        clear(gradients)
        # Four rows at a time stay in a cache until dx is written, and ELEMENTS of each in the first
        # cache for all sums. The sums come before dx, which may be dy.
        for lo in range(first, last, 4):
            n_rows = min(4, last - lo)
            for k in range(k0, k0 + run):
                row, o = lo * n_weights + k, (k - k0) * length
                row_weight, row_bias = flat_slice(weights, o, length), flat_slice(biases, o, length)
                # Upcoming rows are prefetched: dy while sums are taken, and x while dx is written,
                # with dy again, as a long row may have left the first cache by then.
                is_last = k + 1 == k0 + run
                distance = (4 * n_weights - run + 1 if is_last else 1) * length
                for j in range(n_rows):
                    r = rstd[(lo + j - first) * run + k - k0]
                    rounded = round_coefficients(mean[row + j * n_weights], r, 0.0, arithmetic(x))
                    coef[j, 0], coef[j, 1], coef[j, 2] = rounded
                    sums[j, 0], sums[j, 1] = 0.0, 0.0
                for j in range(n_rows, 4):
                    coef[j, 0], coef[j, 1], coef[j, 2] = 0.0, 0.0, 0.0
                for d in range(0, length, ELEMENTS):
                    n, at, next_at = min(ELEMENTS, length - d), row * length + d, n_weights * length
                    of_0 = _affine(row_weight, row_bias, coef, 0, d, n)
                    of_1 = _affine(row_weight, row_bias, coef, 1, d, n)
                    of_2 = _affine(row_weight, row_bias, coef, 2, d, n)
                    of_3 = _affine(row_weight, row_bias, coef, 3, d, n)
                    args = dy, x, mask, fused
                    row_0 = _row_or_zeros(*args, of_0, zeros, at, True, n)
                    row_1 = _row_or_zeros(*args, of_1, zeros, at + next_at, n_rows > 1, n)
                    row_2 = _row_or_zeros(*args, of_2, zeros, at + 2 * next_at, n_rows > 2, n)
                    row_3 = _row_or_zeros(*args, of_3, zeros, at + 3 * next_at, n_rows > 3, n)
                    to_1, to_2, to_3 = size + d, 2 * size + d, 3 * size + d
                    _add_four_rows(
                        (
                            row_of_norm(fused, row_0, n, distance, flat_slice(scratch, d, n)),
                            row_of_norm(fused, row_1, n, distance, flat_slice(scratch, to_1, n)),
                            row_of_norm(fused, row_2, n, distance, flat_slice(scratch, to_2, n)),
                            row_of_norm(fused, row_3, n, distance, flat_slice(scratch, to_3, n)),
                        ),
                        n, sums, flat_slice(gradients, o + d, n),
                        flat_slice(gradients, gradients.shape[1] + o + d, n), distance,
                    )  # fmt: skip
                for j in range(n_rows):
                    n_all = max(count[row + j * n_weights], 1.0)
                    c[0, j] = sums[j, 0] / n_all if mode.center else 0.0
                    c[1, j] = sums[j, 1] / n_all
                for j in range(n_rows):
                    at = (row + j * n_weights) * length
                    affine = _affine(row_weight, row_bias, coef, j, 0, length)
                    written = row_again(
                        fused, streamed, take_row(dy, x, mask, fused, affine, at, length), length,
                        flat_slice(scratch, j * size, length),
                    )  # fmt: skip
                    upcoming = take_row(dy, x, mask, fused, None, at + distance, 0)
                    _, _, m, r, t = affine
                    if mode.use_batch_stats:
                        row_coef = ElementGradient(row_weight, m, r, t, c[0, j], c[1, j])
                        write_row(streamed, written, length, row_coef, out, at, upcoming)
                    else:
                        direct = ElementScale(row_weight, r)
                        write_row_called(streamed, written, length, direct, out, at, upcoming)
        if has_weights:
            n = dparameters.shape[2] * run // n_weights
            for k in range(2):
                of_rows = flat_slice(gradients, k * gradients.shape[1], run * length)
                at = (k * n_blocks + b) * dparameters.shape[2] + q * n
                add_up(of_rows, flat_slice(dparameters, at, n))
    if streamed:
        fence()
    release((rstd, sums, coef, c, zeros, gradients, repeated, dy_of_norm))
