"""Algebra on small arrays: pieces merge into groups, whose statistics make coefficients."""

import numpy as np

from numbanorm.kernels.access import first_value
from numbanorm.kernels.formulas import (
    invert_roots,
    merge_pair,
    not_below_one,
    store_scale_shift,
    two_sum,
)
from numbanorm.kernels.scratch import clear, copy_values
from numbanorm.numba_ext.jit import inline, kernel
from numbanorm.numba_ext.launch import thread_range
from numbanorm.numba_ext.vectors import (
    leading,
    load,
    narrow,
    splat,
    store,
    total,
    where,
    widen,
)
from numbanorm.numba_ext.views import flat_slice, unstack
from numbanorm.tuning import LANES, PIECES


@kernel
def merge(parts, merged):
    """Merge an axis of count, mean, m2, rest: (4, A, K, B) -> (4, A, B), which start at 0."""
    n, mean, m2, rest = unstack(merged, 4)
    part_n, part_mean, part_m2, part_rest = unstack(parts, 4)
    _, _, n_parts, n_columns = parts.shape
    for p in range(part_n.size):
        i = p // (n_parts * n_columns) * n_columns + p % n_columns
        n[i], mean[i], m2[i], rest[i] = merge_pair(
            n[i], mean[i], m2[i], rest[i], part_n[p], part_mean[p], part_m2[p], part_rest[p]
        )


@inline
def _gather(values, group, i, n):
    """Return the group's value for each of n pieces of a segment, from piece i on, and zeros.

    ``group`` is the group of the segment's first piece, and the step from one piece to the next.
    """
    first, step = group
    if step == 0:
        return where(leading(n), splat(values[first]), splat(0.0))
    return load(values, first + i, n)


@inline
def _scatter_add(vector, values, group, i, n):
    """Add a value of each of n pieces of a segment, and zeros, to the values of their groups."""
    first, step = group
    if step == 0:
        values[first] += total(vector)
    else:
        store(load(values, first + i, n) + vector, values, first + i, n)


@inline
def _copy_segments(moments, firsts, n, group_mean, group_rest, group_m2):
    """Copy the moments of pieces (4, P), each of which is a group of its own."""
    count, mean, m2, rest = unstack(moments, 4)
    length = count.size // max(firsts.size, 1)
    for j in range(firsts.size):
        at, to = j * length, firsts[j]
        copy_values(flat_slice(count, at, length), flat_slice(n, to, length))
        copy_values(flat_slice(mean, at, length), flat_slice(group_mean, to, length))
        copy_values(flat_slice(rest, at, length), flat_slice(group_rest, to, length))
        copy_values(flat_slice(m2, at, length), flat_slice(group_m2, to, length))


@inline
def _add_means(moments, firsts, step, n, group_mean, group_rest):
    """Add counts and means of pieces to the groups of a statistic, all of which are 0.

    The sums are taken around a shift, the mean of one of the pieces, which is written to
    group_rest: as in a piece, it bounds the cancellation.
    """
    (count, mean, _, rest), zero = unstack(moments, 4), splat(0.0)
    length = count.size // max(firsts.size, 1)
    for j in range(firsts.size):
        first, at, group = firsts[j], j * length, (firsts[j], step)
        if step == 0 and n[first] == 0.0:
            group_rest[first] = first_value(
                flat_slice(mean, at, length), flat_slice(count, at, length)
            )
        for i in range(0, length, LANES):
            n_valid = min(LANES, length - i)
            counts, means = load(count, at + i, n_valid), load(mean, at + i, n_valid)
            shift = _gather(group_rest, group, i, n_valid)
            if step != 0:
                shift = where(load(n, first + i, n_valid) > zero, shift, means)
                store(shift, group_rest, first + i, n_valid)
            d = (means - shift) + load(rest, at + i, n_valid)
            sums = where(counts > zero, counts * d, zero)
            _scatter_add(counts, n, group, i, n_valid)
            _scatter_add(sums, group_mean, group, i, n_valid)


@inline
def _add_squares(moments, firsts, step, group_mean, group_rest, group_m2):
    """Add m2 of pieces, and the squares of their means around the group's, to group_m2."""
    (count, mean, m2, rest), zero = unstack(moments, 4), splat(0.0)
    length = count.size // max(firsts.size, 1)
    for j in range(firsts.size):
        at, group = j * length, (firsts[j], step)
        for i in range(0, length, LANES):
            n_valid = min(LANES, length - i)
            counts, means = load(count, at + i, n_valid), load(mean, at + i, n_valid)
            shift = _gather(group_rest, group, i, n_valid)
            shifted_mean = _gather(group_mean, group, i, n_valid)
            d = ((means - shift) + load(rest, at + i, n_valid)) - shifted_mean
            squares = load(m2, at + i, n_valid) + counts * d * d
            _scatter_add(where(counts > zero, squares, zero), group_m2, group, i, n_valid)


@kernel
def merge_pieces(threads, moments, first, step, bounds, center, ddof, merged):
    """Merge count, mean, m2, rest (4, P) into count, mean, variance, m2, rest of groups (5, G).

    As Chan et al. 1983, eq. 2.1, for many at once. If not ``center``, the variance is the mean
    square, and the mean is 0.
    """
    n_pieces, n_segments = moments.shape[1], first.shape[1]
    begin, end = thread_range(threads, first.shape[0])
    n, group_mean, var, group_m2, group_rest = unstack(merged, 5)
    for k in range(begin, end):
        firsts = flat_slice(first, k * n_segments, n_segments)
        lo, n_groups = bounds[k], bounds[k + 1] - bounds[k]
        if n_groups == n_pieces:
            _copy_segments(moments, firsts, n, group_mean, group_rest, group_m2)
        else:
            for values in (n, group_mean, group_rest, group_m2):
                clear(flat_slice(values, lo, n_groups))
            _add_means(moments, firsts, step[k], n, group_mean, group_rest)
            for g in range(lo, lo + n_groups):
                group_mean[g] /= max(n[g], 1.0)
            _add_squares(moments, firsts, step[k], group_mean, group_rest, group_m2)
            for g in range(lo, lo + n_groups):
                group_mean[g], group_rest[g] = two_sum(group_rest[g], group_mean[g])
        for i in range(0, n_groups, LANES):
            g, n_valid = lo + i, min(LANES, n_groups - i)
            value = load(group_m2, g, n_valid) / not_below_one(
                load(n, g, n_valid) - splat(np.float64(ddof))
            )
            if not center:
                mu = load(group_mean, g, n_valid)
                value += mu * mu
                store(splat(0.0), group_mean, g, n_valid)
            store(value, var, g, n_valid)


@inline
def _pieces_of_task(task, n_pieces, first):
    """Return the segment of a task, its first piece, and the task's range of pieces in it."""
    length = n_pieces // max(first.shape[1], 1)
    n_parts = (length + PIECES - 1) // PIECES
    j, lo = task // n_parts, task % n_parts * PIECES
    return j, j * length, lo, min(lo + PIECES, length)


@inline
def _n_tasks(n_pieces, first):
    """Return the number of tasks, which are segments or parts of them."""
    length = n_pieces // max(first.shape[1], 1)
    return first.shape[1] * ((length + PIECES - 1) // PIECES)


@kernel
def coefficients(threads, first, step, group_stats, mixture, eps, parameters, piece_stats, coef):
    """Mix statistics; write mean, var and rstd (3, P) of pieces, and m, s and t of ScaleShift.

    ``parameters`` (2, F) are weight and bias of each feature.
    """
    n_pieces, n_statistics = coef.shape[1], mixture.shape[1]
    begin, end = thread_range(threads, _n_tasks(n_pieces, first))
    n, mean, var = unstack(group_stats, 3)
    p, q = unstack(mixture, 2)
    weight, bias = unstack(parameters, 2)
    piece_mean, piece_var, rstd = unstack(piece_stats, 3)
    m, s, t = unstack(coef, 3)
    for task in range(begin, end):
        j, at, lo, hi = _pieces_of_task(task, n_pieces, first)
        for i in range(lo, hi, LANES):
            n_valid, group = min(LANES, hi - i), (first[0, j], step[0])
            n_elements = _gather(n, group, i, n_valid)
            mean_0, var_0 = (
                _gather(mean, group, i, n_valid),
                _gather(var, group, i, n_valid),
            )
            mu, v = mean_0, var_0
            # Softmax weights need not sum to 1 in floating point: mix the differences. Not by +=,
            # which changes mean_0 where kernels are Python functions and vectors are arrays.
            for k in range(1, n_statistics):
                group = first[k, j], step[k]
                n_elements += _gather(n, group, i, n_valid)
                mu = mu + splat(p[k]) * (_gather(mean, group, i, n_valid) - mean_0)
                v = v + splat(q[k]) * (_gather(var, group, i, n_valid) - var_0)
            store(mu, piece_mean, at + i, n_valid)
            store(v, piece_var, at + i, n_valid)
            store(n_elements, rstd, at + i, n_valid)
        invert_roots(
            flat_slice(piece_var, at + lo, hi - lo), eps, flat_slice(rstd, at + lo, hi - lo)
        )
        feature = first[n_statistics, j], step[n_statistics]
        for i in range(lo, hi, LANES):
            n_valid = min(LANES, hi - i)
            store_scale_shift(
                load(piece_mean, at + i, n_valid), load(rstd, at + i, n_valid),
                _gather(weight, feature, i, n_valid), _gather(bias, feature, i, n_valid),
                m, s, t, at + i, n_valid,
            )  # fmt: skip


@kernel
def add_parts(parts, sums):
    """Sum an axis of sums (2, A, K, B) -> (2, A, B), which start at 0."""
    n_outer, n_parts, n_columns = parts.shape[1:]
    values, sums = flat_slice(parts, 0, parts.size), flat_slice(sums, 0, sums.size)
    for a in range(2 * n_outer):
        for k in range(a * n_parts, (a + 1) * n_parts):
            for i in range(0, n_columns, LANES):
                n_valid, to = min(LANES, n_columns - i), a * n_columns + i
                part = load(values, k * n_columns + i, n_valid)
                store(load(sums, to, n_valid) + part, sums, to, n_valid)


@kernel
def group_gradients(
    threads, sums, first, step, bounds, group_stats, ddof, mixture, parameters, piece_stats,
    dgroup_stats, dmixture, dparameters,
):  # fmt: skip
    """Sum gradients of groups (2, G), logits (2, S) and features (2, F), which start at 0.

    ``sums`` (2, P) are those of dy and dy * (x - mean) over each piece. The gradients of a group's
    mean and variance are divided as these were: by n, and by n - ddof.
    """
    n_statistics, n_segments = mixture.shape[1], first.shape[1]
    begin, end = thread_range(threads, n_statistics)
    s0, s1 = unstack(sums, 2)
    n, mean, var = unstack(group_stats, 3)
    p, q = unstack(mixture, 2)
    (weight,) = unstack(parameters, 1)
    piece_mean, piece_var, rstd = unstack(piece_stats, 3)
    dmean, dvar = unstack(dgroup_stats, 2)
    dp, dq = unstack(dmixture, 2)
    dweight, dbias = unstack(dparameters, 2)
    length = s0.size // max(n_segments, 1)
    for k in range(begin, end):
        sum_p, sum_q = splat(0.0), splat(0.0)
        for j in range(n_segments):
            at, group = j * length, (first[k, j], step[k])
            feature = first[n_statistics, j], step[n_statistics]
            for i in range(0, length, LANES):
                n_valid = min(LANES, length - i)
                sum_0, sum_1 = load(s0, at + i, n_valid), load(s1, at + i, n_valid)
                root = load(rstd, at + i, n_valid)
                if k == 0:
                    _scatter_add(sum_0, dbias, feature, i, n_valid)
                    _scatter_add(root * sum_1, dweight, feature, i, n_valid)
                scale = root * _gather(weight, feature, i, n_valid)
                dmu = splat(-p[k]) * scale * sum_0
                dv = splat(-0.5 * q[k]) * scale * root * root * sum_1
                _scatter_add(dmu, dmean, group, i, n_valid)
                _scatter_add(dv, dvar, group, i, n_valid)
                # Backward of the softmax: the gradient of each weight times (statistic - mixture).
                mu, v = load(piece_mean, at + i, n_valid), load(piece_var, at + i, n_valid)
                sum_p += dmu * (_gather(mean, group, i, n_valid) - mu)
                sum_q += dv * (_gather(var, group, i, n_valid) - v)
        dp[k], dq[k] = total(sum_p), total(sum_q)
        for g in range(bounds[k], bounds[k + 1], LANES):
            n_valid = min(LANES, bounds[k + 1] - g)
            count = load(n, g, n_valid)
            divisor = not_below_one(count - splat(np.float64(ddof)))
            store(load(dmean, g, n_valid) / not_below_one(count), dmean, g, n_valid)
            store(load(dvar, g, n_valid) / divisor, dvar, g, n_valid)


@kernel
def gradient_coefficients(
    threads,
    first,
    step,
    group_stats,
    dgroup_stats,
    center,
    given,
    instances,
    parameters,
    piece_stats,
    coef,
):
    """Write a, r, m, b, c (5, P), the fields of Gradient, from the sums of group_gradients.

    The groups of statistic ``given`` do not come from x. ``instances`` (2, I) are count and mean of
    each instance where those have sample variances, else None.
    """
    n_pieces, n_statistics = coef.shape[1], first.shape[0] - 2
    begin, end = thread_range(threads, _n_tasks(n_pieces, first))
    _, mean, _ = unstack(group_stats, 3)
    dmean, dvar = unstack(dgroup_stats, 2)
    instance_counts, instance_means = unstack(instances, 2)
    (weight,) = unstack(parameters, 1)
    piece_mean, _, rstd = unstack(piece_stats, 3)
    a, r, m, b, c = unstack(coef, 5)
    zero, one = splat(0.0), splat(1.0)
    for task in range(begin, end):
        j, at, lo, hi = _pieces_of_task(task, n_pieces, first)
        feature = first[n_statistics, j], step[n_statistics]
        instance = first[n_statistics + 1, j], step[n_statistics + 1]
        for i in range(lo, hi, LANES):
            n_valid = min(LANES, hi - i)
            mu, root = load(piece_mean, at + i, n_valid), load(rstd, at + i, n_valid)
            # m is the mean of the statistics' means, weighted by their slopes, so that x - m and c
            # are small. The mixture itself may be far from x, where one statistic is given.
            slopes, shift = splat(0.0), splat(0.0)
            for k in range(n_statistics):
                if k != given:
                    group = first[k, j], step[k]
                    slope = _gather(dvar, group, i, n_valid)
                    slope = where(slope > zero, slope, zero - slope)
                    if instances is None:
                        mean_k = _gather(mean, group, i, n_valid)
                    else:
                        mean_k = _gather(instance_means, instance, i, n_valid)
                    slopes += slope
                    shift += slope * (mean_k - mu)
            has_slope = slopes > zero
            narrowed = narrow(mu + where(has_slope, shift, zero) / where(has_slope, slopes, one), m)
            rounded = widen(narrowed)
            slope, offset = splat(0.0), splat(0.0)
            for k in range(n_statistics):
                if k == given:
                    continue
                group = first[k, j], step[k]
                if center:
                    offset += _gather(dmean, group, i, n_valid)
                dsquare = splat(2.0) * _gather(dvar, group, i, n_valid)
                group_mean = _gather(mean, group, i, n_valid)
                if instances is None:
                    slope += dsquare
                    offset += dsquare * (rounded - group_mean)
                else:
                    # var is the mean of factor * (x - mean_i)**2 + (mean_i - mean)**2, i: instance.
                    n_instance = _gather(instance_counts, instance, i, n_valid)
                    instance_mean = _gather(instance_means, instance, i, n_valid)
                    factor = n_instance / not_below_one(n_instance - one)
                    slope += dsquare * factor
                    offset += dsquare * (
                        factor * (rounded - instance_mean) + (instance_mean - group_mean)
                    )
            # r keeps b and c in range: where rstd is 0, any number will do.
            scale = where(root > zero, root, one)
            slope, offset = slope / scale, offset / scale
            direct = root * _gather(weight, feature, i, n_valid)
            store(narrow(direct, a), a, at + i, n_valid)
            store(narrow(scale, r), r, at + i, n_valid)
            store(narrowed, m, at + i, n_valid)
            store(narrow(slope, b), b, at + i, n_valid)
            store(narrow(offset, c), c, at + i, n_valid)


@kernel
def feature_gradients(feature, sums, dparameters):
    """Add sums of dy and dy * x_hat (2, P) to dweight and dbias of their features (2, F)."""
    (s0, s1), (dweight, dbias) = unstack(sums, 2), unstack(dparameters, 2)
    for p in range(len(feature)):
        dbias[feature[p]] += s0[p]
        dweight[feature[p]] += s1[p]


@kernel
def track(
    group_stats, first, last, ddof, batch_ddof, momentum, skip_nonfinite,
    running_mean, running_var, n_batches, n_missed,
):  # fmt: skip
    """Move running statistics (R,) towards those of N samples, groups ``first`` to ``last``.

    Count a batch that gave something to any of them, and in ``n_missed`` (R,) what it gave nothing
    to: a negative momentum means the average over all others. Return whether the statistics are
    left alone, as something is not finite. A variance was divided by n - batch_ddof, a running one
    is by n - ddof.
    """
    n, mean, var = unstack(group_stats, 3)
    if skip_nonfinite:
        for g in range(first, last):
            if not (np.isfinite(mean[g]) and np.isfinite(var[g])):
                return True
    size, n_moved, n_before, unbiased = len(running_mean), 0, 0.0, 1.0
    for i in range(size):
        n_samples, mean_sum, var_sum = 0, 0.0, 0.0
        g = first + i
        while g < last:
            if n[g] > 0:
                if n[g] != n_before:  # a division takes as long as all the rest
                    n_before = n[g]
                    unbiased = max(n[g] - batch_ddof, 1.0) / max(n[g] - ddof, 1.0)
                n_samples += 1
                mean_sum += mean[g]
                var_sum += var[g] * unbiased
            g += size
        if n_samples > 1:
            mean_sum, var_sum = mean_sum / n_samples, var_sum / n_samples
        if n_samples > 0:
            n_moved += 1
            weight = momentum
            if momentum < 0:
                weight = 1.0 / max(n_batches[()] + 1 - n_missed[i], 1)
            decay = 1.0 - weight
            running_mean[i] = decay * running_mean[i] + weight * mean_sum
            running_var[i] = decay * running_var[i] + weight * var_sum
        else:
            n_missed[i] += 1
    if n_moved > 0:
        n_batches[()] += 1
    else:
        n_missed -= 1
    return False
