"""Running statistics: what a batch gives to them."""

import numpy as np

from numbanorm.core.exchange import FORWARD_ROWS, Exchange
from numbanorm.core.layouts import Saved, Statistic
from numbanorm.core.types import Array, Float64, arithmetic
from numbanorm.kernels import algebra
from numbanorm.numba_ext.threads import call


def track(
    saved: Saved,
    running_mean: Array,
    running_var: Array,
    momentum: float | None,
    skip_nonfinite: bool = False,
    n_batches: Array | None = None,
    n_missed: Array | None = None,
) -> bool:
    """Move running statistics towards a forward's; return whether they are left alone instead.

    Means and unbiased variances are averaged over axis 0 where it is kept. ``momentum`` weights the
    batch; None means the average of all batches that gave something: there are ``n_batches``, of
    which ``n_missed`` (R,) gave nothing to one running statistic. Both are counted up. With
    ``skip_nonfinite``, NaN or Inf in the batch's leaves the statistics alone.
    """
    flat = [_flat(array) for array in (running_mean, running_var)]
    if saved.samples is None:
        tracked = saved.layout.tracked(saved.groups)
    else:
        n, mean, var = saved.samples
        tracked = np.array((n > 0, mean, var)), 0, len(n)
    ddof_of_batch = saved.layout.ddof(saved.recipe.sample_variance)
    skipped = call(
        algebra.track, *tracked, ddof_of_running(saved), ddof_of_batch,
        -1.0 if momentum is None else momentum, skip_nonfinite, *flat,
        np.zeros((), np.int64) if n_batches is None else n_batches,
        np.zeros(len(flat[0]), np.int64) if n_missed is None else n_missed,
    )  # fmt: skip
    for array, values in zip((running_mean, running_var), flat, strict=True):
        if values is not array:
            array[...] = values.reshape(array.shape)
    return bool(skipped)


def _flat(array: Array) -> Array:
    """Return an array (R,) for the kernel, the same one where it can be."""
    if array.ndim == 1 and array.flags.c_contiguous and array.itemsize > 2:
        return array
    return np.ascontiguousarray(array, arithmetic(array.dtype)).reshape(-1)


@np.errstate(all="ignore")
def sample_sums(batch: Statistic, ddof: int = 1, ddof_of_batch: int = 0) -> Float64:
    """Return the number of samples that have something, and sums of their means and variances.

    Variances were divided by n - ``ddof_of_batch``, and those that are summed by n - ``ddof``.
    """
    _, n, mean, var = batch
    assert n is not None
    known = n > 0
    unbiased = var * (np.maximum(n - ddof_of_batch, 1) / np.maximum(n - ddof, 1))
    return np.stack([np.where(known, values, 0).sum(0) for values in (1, mean, unbiased)])


@np.errstate(all="ignore")
def share_samples(saved: Saved, exchange: Exchange) -> Saved:
    """Return the same with averages over the samples of all processes, where axis 0 is kept."""
    shape = saved.layout.geometry.running_shape
    ddof_of_batch = saved.layout.ddof(saved.recipe.sample_variance)
    own = sample_sums(saved.batch, ddof_of_running(saved), ddof_of_batch).reshape(3, -1)
    rows = np.concatenate((own, np.zeros((FORWARD_ROWS - 3, own.shape[1]))))
    _, gathered = exchange.gather(rows, shape, 0)
    n, mean_sum, var_sum, _ = gathered.sum(0)
    n_samples = np.maximum(n, 1)
    return saved._replace(samples=np.stack((n, mean_sum / n_samples, var_sum / n_samples)))


def is_finite(saved: Saved) -> bool:
    """Tell whether the tracked statistic of a forward has neither NaN nor Inf."""
    if saved.samples is not None:
        return bool(np.isfinite(saved.samples).all())
    return bool(np.isfinite(saved.batch.mean).all() and np.isfinite(saved.batch.var).all())


def ddof_of_running(saved: Saved) -> int:
    """Return what is taken off n in a running variance."""
    # The variance that sample variances of instances make is stored as it is.
    return 0 if saved.statistics.instances is not None else 1
