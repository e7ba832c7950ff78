"""Groups that are rows with a weight for each element, forward and backward in one kernel each."""

from numbanorm.kernels.access import enters_sums, first_value, take_row
from numbanorm.kernels.formulas import (
    apply_weight,
    element_gradient,
    round_coefficients,
    scale_shift,
    unshift,
    write_rstds,
    write_rstds_of_runs,
    write_statistics,
)
from numbanorm.kernels.overlap import prefetch_distance, reduce_while_writing
from numbanorm.kernels.scratch import add_up, clear, spread
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
from numbanorm.numba_ext.vectors import (
    is_finite,
    load,
    prefetch,
    splat,
    store,
    total,
    where,
    widen,
)
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import ELEMENTS, LANES, PREFETCH_FAR


@inline
def normalize_vector(row, i, n, coef, ys, k):
    """Normalise a vector of a row, see terms, by weight, bias, m, rstd, t; write it to ys[k]."""
    x, (weight, bias, m, rstd, t) = load(row[1], i, n), coef
    x_hat = scale_shift(x, load(m, i, n), load(rstd, i, n), load(t, i, n))
    store(x_hat * load(weight, i, n) + load(bias, i, n), ys, k, n)


@inline
def _repeated(parameters, n_rows, length):
    """Return how many elements the weights of some rows have, if those are to be repeated, or 0."""
    return n_rows * length if parameters.shape[2] < length else 0


@inline
def _of_elements(values, k, n_rows, length, found):
    """Return one of ``values`` (G, D / span) for each element of rows from k on, (n_rows * D,).

    Unless span is 1 they are written to ``found``: there they are near, and begin where a line
    does, as they are read for each sample.
    """
    n = values.shape[1]
    own = flat_slice(values, k * n, n_rows * n)
    if n < length:
        spread(own, length // n, found)
        own = flat_slice(found, 0, n_rows * length)
    # Alone it could not be returned, as nobody counts references to it.
    return (own,)


@kernel
def forward_elements(
    threads,
    x,
    mask,
    parameters,
    eps,
    center,
    use_batch_stats,
    run,
    block,
    overlap,
    streamed,
    statistics,
    y,
):
    """Normalise rows: x, mask or None, y (M, D), weight and bias (2, G, D / span).

    Rows i and i + G have the same weights, each for ``span`` elements next to each other.
    ``statistics`` (3, M), count, mean and variance of each row, are taken and written if ``use_batch_stats``,
    else read.
    ``block`` rows are handled at once, and those that come next ``overlap`` them or after them:
    those with the same weights, of the next sample, or in the order of memory where ``run`` is G or
    y is ``streamed``, which is True or None.
    """
    (n_rows, length), n_weights = x.shape, parameters.shape[1]
    n_units = (n_rows + block - 1) // block
    unit, end = thread_range(threads, n_units)
    (weight, bias), (count, mean, var) = unstack(parameters, 2), unstack(statistics, 3)
    # Past the caches each run of rows that is not in the order of memory would end in parts of
    # lines.
    in_order = run == n_weights or streamed is not None
    step, n_alike, n_own = block, n_units, n_weights
    if not in_order:
        step, n_alike, n_own = n_weights, n_rows // n_weights, block
    distance = prefetch_distance(streamed, PREFETCH_FAR, y) if in_order else step * length
    of_elements = allocate(2, _repeated(parameters, n_own, length), y.dtype)
    own_weight, own_bias = unstack(of_elements, 2)
    weights, biases = own_weight, own_bias
    rstd = allocate(None, block, mean.dtype)
    buffer = allocate(None, buffer_size(lines_at_once(y), streamed, y), y.dtype)
    stream, out = open_stream(buffer), flat_slice(y, 0, y.size)
    overlap = overlap and use_batch_stats
    n_written, first_written, k_written, k_own = 0, 0, 0, -1
    while unit < end or n_written > 0:
        # The first of the weights that are at hand for a unit, and its first row.
        k = unit // n_alike * block
        first = unit % n_alike * step + k
        n_summed = min(block, n_rows - first) if unit < end and (overlap or n_written == 0) else 0
        if n_written > 0 and k_own != k_written:
            k_own = k_written
            (weights,) = _of_elements(weight, k_own, n_own, length, own_weight)
            (biases,) = _of_elements(bias, k_own, n_own, length, own_bias)
        o = (first_written % n_weights - k_own) * length
        for j in range(max(n_summed, n_written)):
            g, i = first + j, first_written + j
            n = length if use_batch_stats and j < n_summed else 0
            n_here = length if j < n_written else 0
            # Where nothing is summed up, what comes next is asked for all the same.
            at = g * length
            next_row, upcoming = (
                take_row(None, x, mask, at, n),
                take_row(None, x, mask, at + distance, 0),
            )
            n_valid = take_row(None, x, None, i * length, n_here)
            mu, scale = (mean[i], rstd[j]) if n_here > 0 else (0.0, 0.0)
            of_row = flat_slice(weights, o, length), flat_slice(biases, o, length)
            coef = *of_row, *round_coefficients(mu, scale, 0.0, y)
            o = o + length if o + length < n_own * length else 0
            shift = first_value(next_row[1], next_row[2])
            n, s1, s2, stream = reduce_while_writing(
                streamed, stream, next_row, n, upcoming, shift, normalize_vector, n_valid, n_here, coef, out,
                i * length,
            )  # fmt: skip
            if use_batch_stats and j < n_summed:
                mu, _, m2 = unshift(n, shift, s1, s2)
                write_statistics(g, n, mu, m2, center, count, mean, var)
        last = first + n_summed
        write_rstds(count[first:last], var[first:last], eps, rstd)
        if n_summed > 0:
            unit += 1
        n_written, first_written, k_written = n_summed, first, k
    close_stream(streamed, stream, out)
    release((of_elements, rstd, buffer))


@inline
def _element_terms(dys, xs, counts, i, n, row):
    """Return vectors of dy and dy * x_hat from i on, and 0 where they do not enter the sums.

    ``row`` (3,) is what round_coefficients returns; see gradient_terms about the others.
    """
    dy, x = load(dys, i, n), load(xs, i, n)
    m, r, t = splat(row[0]), splat(row[1]), splat(row[2])
    x_hat = scale_shift(x, m, r, t)
    product = dy * x_hat
    if counts is not None:
        zero = splat(dys.dtype.type(0.0))
        # x_hat may overflow where x is finite. Where what counts is NaN, that has to show.
        enters = enters_sums(where(is_finite(r), x_hat, x), load(counts, i, n))
        dy, product = where(enters, dy, zero), where(enters, product, zero)
    return dy, product


@inline
def _add_four_vectors(dys, xs, counts, i, n, rows, weight, dweight, dbias, distance):
    """Add dy * x_hat and dy of four rows to dweight and dbias, from i on; see load about n.

    Return vectors of g = dy * weight, and of g * x_hat, of each row. Ask for what is so far ahead
    of dys.
    """
    prefetch(dys[0], i + distance)
    prefetch(dys[1], i + distance)
    prefetch(dys[2], i + distance)
    prefetch(dys[3], i + distance)
    a, a_hat = _element_terms(dys[0], xs[0], counts[0], i, n, rows[0])
    b, b_hat = _element_terms(dys[1], xs[1], counts[1], i, n, rows[1])
    c, c_hat = _element_terms(dys[2], xs[2], counts[2], i, n, rows[2])
    d, d_hat = _element_terms(dys[3], xs[3], counts[3], i, n, rows[3])
    store(load(dweight, i, n) + widen((a_hat + b_hat) + (c_hat + d_hat)), dweight, i, n)
    store(load(dbias, i, n) + widen((a + b) + (c + d)), dbias, i, n)
    w = load(weight, i, n)
    return (a * w, b * w, c * w, d * w), (a_hat * w, b_hat * w, c_hat * w, d_hat * w)


@inline
def _four(array, nothing, first, step, n_rows, n):
    """Return n elements of up to four rows, ``step`` apart, and of nothing where there is none."""
    return (
        flat_slice(array, first, n),
        flat_slice(array, first + step, n) if n_rows > 1 else flat_slice(nothing, 0, n),
        flat_slice(array, first + 2 * step, n) if n_rows > 2 else flat_slice(nothing, 0, n),
        flat_slice(array, first + 3 * step, n) if n_rows > 3 else flat_slice(nothing, 0, n),
    )


@inline
def _plus(v, w):
    return v[0] + w[0], v[1] + w[1], v[2] + w[2], v[3] + w[3]


@inline
def _add_four_rows(dys, xs, counts, rows, weight, sums, dweight, dbias, distance):
    """Add what backward sums up over few elements (n,) of four rows.

    ``sums`` (4, 2) are those of g = dy * weight and of g * x_hat, which are added up in the type of
    the elements: a vector has many lanes, and each too few of them for float32 to lose digits.
    """
    n = weight.shape[0]
    whole = n // LANES * LANES
    rest = rows, weight, dweight, dbias, distance
    g, g_hat = _add_four_vectors(dys, xs, counts, whole, n - whole, *rest)
    for i in range(0, whole, LANES):
        next_g, next_g_hat = _add_four_vectors(dys, xs, counts, i, None, *rest)
        g, g_hat = _plus(g, next_g), _plus(g_hat, next_g_hat)
    sums[0, 0], sums[0, 1] = sums[0, 0] + total(g[0]), sums[0, 1] + total(g_hat[0])
    sums[1, 0], sums[1, 1] = sums[1, 0] + total(g[1]), sums[1, 1] + total(g_hat[1])
    sums[2, 0], sums[2, 1] = sums[2, 0] + total(g[2]), sums[2, 1] + total(g_hat[2])
    sums[3, 0], sums[3, 1] = sums[3, 0] + total(g[3]), sums[3, 1] + total(g_hat[3])


@inline
def _backward_element_vector(row, i, n, coef, dxs, k):
    """Write the gradient of a vector of a row, see terms, to dxs[k]."""
    (dys, xs, counts), (weight, m, rstd, t, c0, c1) = row, coef
    dx = element_gradient(
        load(dys, i, n), load(xs, i, n), load(counts, i, n), load(weight, i, n),
        load(m, i, n), load(rstd, i, n), load(t, i, n), load(c0, i, n), load(c1, i, n),
    )  # fmt: skip
    store(dx, dxs, k, n)


@kernel
def backward_elements(
    threads, dy, x, mask, parameters, eps, center, use_batch_stats, affine, run, streamed,
    statistics, dx, dparameters,
):  # fmt: skip
    """Write dx and parameter gradients of rows: dy, x, mask or None, dx (M, D).

    ``parameters`` (2, G, D / span) are weight and bias as in forward_elements; rows i and i + G
    are of two samples. ``statistics`` (3, M) are those of forward. dweight and dbias
    (2, T, G * D / span), a row for each of T blocks of samples, are written if ``affine``. A task
    has ``run`` rows of each sample of a block; G is a multiple of it.
    """
    n_weights, length = parameters.shape[1], x.shape[1]
    n_samples = x.shape[0] // n_weights
    n_blocks = dparameters.shape[1]
    block = (n_samples + n_blocks - 1) // n_blocks
    begin, end = thread_range(threads, n_weights // run * n_blocks)
    (weight,), (dweight, dbias) = unstack(parameters, 1), unstack(dparameters, 2)
    count, mean, var = unstack(statistics, 3)
    rstd, sums = allocate(None, block * run, mean.dtype), allocate(4, 2, mean.dtype)
    rows, c = allocate(4, 3, dx.dtype), allocate(2, 4, dx.dtype)
    nothing = allocate(None, min(ELEMENTS, length), dx.dtype)
    buffer = allocate(None, buffer_size(lines_at_once(dx), streamed, dx), dx.dtype)
    gradients = allocate(2, run * length, dweight.dtype)  # of weight and bias
    of_elements = allocate(None, _repeated(parameters, run, length), dx.dtype)
    clear(nothing)
    stream, out = open_stream(buffer), flat_slice(dx, 0, dx.size)
    for task in range(begin, end):
        q, b = task // n_blocks, task % n_blocks
        k0, first, last = q * run, b * block, min((b + 1) * block, n_samples)
        write_rstds_of_runs(count, var, eps, first, last, n_weights, k0, run, rstd)
        (weights,) = _of_elements(weight, k0, run, length, of_elements)
        clear(gradients)
        # Four rows at a time stay in cache for all they are needed for, and some of their
        # elements in the first cache for all sums. Those come before dx, which may be dy.
        for lo in range(first, last, 4):
            n_here = min(4, last - lo)
            for k in range(k0, k0 + run):
                row, o = lo * n_weights + k, (k - k0) * length
                own = flat_slice(weights, o, length)
                # What comes next is asked for: dy while sums are taken, and x while dx is written,
                # with dy again, of which a long row may have left the first cache by then.
                is_last = k + 1 == k0 + run
                distance = (4 * n_weights - run + 1 if is_last else 1) * length
                for j in range(n_here):
                    r = rstd[(lo + j - first) * run + k - k0]
                    i = row + j * n_weights
                    rows[j, 0], rows[j, 1], rows[j, 2] = round_coefficients(mean[i], r, 0.0, dx)
                    sums[j, 0] = 0.0
                    sums[j, 1] = 0.0
                for j in range(n_here, 4):
                    rows[j, 0], rows[j, 1], rows[j, 2] = 0.0, 0.0, 0.0
                for d in range(0, length, ELEMENTS):
                    n = min(ELEMENTS, length - d)
                    where_from = row * length + d, n_weights * length, n_here, n
                    _add_four_rows(
                        _four(dy, nothing, *where_from), _four(x, nothing, *where_from),
                        _four(mask, mask, *where_from), rows, flat_slice(own, d, n), sums,
                        flat_slice(gradients, o + d, n),
                        flat_slice(gradients, gradients.shape[1] + o + d, n), distance,
                    )  # fmt: skip
                for j in range(n_here):
                    n_all = max(count[row + j * n_weights], 1.0)
                    c[0, j] = sums[j, 0] / n_all if center else 0.0
                    c[1, j] = sums[j, 1] / n_all
                for j in range(n_here):
                    i = row + j * n_weights
                    m, r, t = rows[j, 0], rows[j, 1], rows[j, 2]
                    if not use_batch_stats:
                        apply_weight(dy[i], own, r, dx[i])
                        continue
                    at, coef = i * length, (own, m, r, t, c[0, j], c[1, j])
                    stream = write_run(
                        streamed, stream, _backward_element_vector, take_row(dy, x, mask, at, length),
                        take_row(dy, x, mask, at + distance, 0), length, coef, out, at,
                    )  # fmt: skip
        if affine:
            n = dweight.shape[1] * run // n_weights
            own_weight, own_bias = flat_slice(dweight[b], q * n, n), flat_slice(dbias[b], q * n, n)
            add_up(flat_slice(gradients, 0, run * length), own_weight)
            add_up(flat_slice(gradients, gradients.shape[1], run * length), own_bias)
    close_stream(streamed, stream, out)
    release((rstd, sums, rows, c, nothing, buffer, gradients, of_elements))
