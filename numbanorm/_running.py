"""Running statistics: what a batch gives to them, moving averages, and exact pools of batches."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from numbanorm import _kernels
from numbanorm._axes import Array
from numbanorm._normalize import Float64, Saved, Statistic
from numbanorm.moments import Moments


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
    skipped: bool = _kernels.track(
        *saved.tracked, _ddof(saved), saved.ddof, momentum, skip_nonfinite, *flat, n_batches
    )
    for array, values in zip((running_mean, running_var), flat, strict=True):
        if values is not array:
            array[...] = values.reshape(array.shape)
    return skipped


def _flat(array: Array) -> Array:
    """Return an array (R,) for the kernel, the same one where it can be."""
    one_run = array.ndim == 1 and array.flags.c_contiguous
    return array if one_run else np.ascontiguousarray(array).reshape(-1)


def is_finite(saved: Saved) -> bool:
    """Tell whether the tracked statistic of a forward has neither NaN nor Inf."""
    return bool(np.isfinite(saved.batch.mean).all() and np.isfinite(saved.batch.var).all())


def _ddof(saved: Saved) -> int:
    # The variance that sample variances of instances make is stored as it is.
    return 0 if saved.instances is not None else 1


class Running(NamedTuple):
    """Means and variances of the shape of running statistics; ``known`` is False where empty."""

    mean: Float64
    var: Float64
    known: NDArray[np.bool_]


class Pool:
    """The exact statistics of all forwards of a layer, as if they had been one batch.

    Where axis 0 is kept, each sample has statistics of its own; then their averages.
    """

    def __init__(self) -> None:
        self.n_forwards = 0
        self.n_skipped = 0
        self._moments: Moments | None = None
        self._samples: NDArray[np.int64] | None = None
        self._mean = self._var = np.zeros(())
        self._ddof = 1

    def add(self, saved: Saved) -> None:
        """Add the tracked statistic of one forward."""
        self.add_statistic(saved.batch, saved.geometry.running_shape, _ddof(saved), saved.ddof)

    @np.errstate(all="ignore")
    def add_statistic(
        self, batch: Statistic, shape: tuple[int, ...], ddof: int = 1, ddof_of_batch: int = 0
    ) -> None:
        """Add a statistic of one forward, whose running one is of this shape.

        Its variance was divided by n - ``ddof_of_batch``, what is stored by n - ``ddof``.
        """
        axes, n, mean, var = batch
        assert n is not None
        self.n_forwards += 1
        self._ddof = ddof
        if 0 in axes:
            m2 = var * np.maximum(n - ddof_of_batch, 1)
            moments = Moments(n.reshape(shape), mean.reshape(shape), m2.reshape(shape))
            self._moments = moments if self._moments is None else self._moments + moments
            return
        known = n > 0
        unbiased = var * (np.maximum(n - ddof_of_batch, 1) / np.maximum(n - ddof, 1))
        sums = (np.where(known, values, 0).sum(0).reshape(shape) for values in (mean, unbiased))
        mean_sum, var_sum = sums
        samples = known.sum(0).reshape(shape)
        self._samples = samples if self._samples is None else self._samples + samples
        self._mean, self._var = self._mean + mean_sum, self._var + var_sum

    def statistics(self) -> Running:
        """Return means and unbiased variances of all forwards, of which there is at least one."""
        if self._samples is not None:
            n = np.maximum(self._samples, 1)
            return Running(self._mean / n, self._var / n, self._samples > 0)
        assert self._moments is not None
        known = np.asarray(np.asarray(self._moments.count) > 0)
        return Running(self._moments.mean, self._moments.var(self._ddof), known)
