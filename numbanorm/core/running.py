"""Running statistics: what a batch gives to them."""

import numpy as np

from numbanorm.core.layouts import Saved
from numbanorm.core.types import Array
from numbanorm.kernels import algebra
from numbanorm.numba_ext.threads import call


def track(
    saved: Saved,
    running_mean: Array,
    running_var: Array,
    n_batches: Array,
    momentum: float,
    skip_nonfinite: bool = False,
) -> bool:
    """Move running statistics towards a forward's; return whether they are left alone instead.

    Means and unbiased variances are averaged over axis 0 where it is kept. ``n_batches`` is
    counted up, ``momentum`` weights the batch. With ``skip_nonfinite``, NaN or Inf in the batch's
    leaves the statistics alone.
    """
    flat = [_flat(array) for array in (running_mean, running_var)]
    skipped = call(
        algebra.track, *saved.layout.tracked(saved.statistics.groups), ddof_of_running(saved),
        saved.layout.ddof(saved.sample_variance), momentum, skip_nonfinite, *flat, n_batches,
    )  # fmt: skip
    for array, values in zip((running_mean, running_var), flat, strict=True):
        if values is not array:
            array[...] = values.reshape(array.shape)
    return bool(skipped)


def _flat(array: Array) -> Array:
    """Return an array (R,) for the kernel, the same one where it can be."""
    one_run = array.ndim == 1 and array.flags.c_contiguous
    return array if one_run else np.ascontiguousarray(array).reshape(-1)


def is_finite(saved: Saved) -> bool:
    """Tell whether the tracked statistic of a forward has neither NaN nor Inf."""
    return bool(np.isfinite(saved.batch.mean).all() and np.isfinite(saved.batch.var).all())


def ddof_of_running(saved: Saved) -> int:
    """Return what is taken off n in a running variance."""
    # The variance that sample variances of instances make is stored as it is.
    return 0 if saved.statistics.instances is not None else 1
