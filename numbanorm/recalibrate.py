"""Exact running statistics: the batch average of the SwitchableNorm paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from numbanorm.core.layouts import Saved, Statistic
from numbanorm.core.running import ddof_of_running, sample_sums
from numbanorm.core.types import Float64
from numbanorm.moments import Moments

Batch = TypeVar("Batch")


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
        self.n_forwards = self.n_skipped = 0
        # How many of them gave something at all, and how many of these nothing to which channel.
        self.n_tracked = 0
        self.n_missed: Any = 0
        self._moments: Moments | None = None
        self._samples: Float64 | None = None
        self._mean = self._var = np.zeros(())
        self._ddof = 1

    def add(self, saved: Saved) -> None:
        """Add the tracked statistic of one forward."""
        if saved.samples is not None:
            n, mean, var = saved.samples.reshape(3, *saved.layout.geometry.running_shape)
            self._count(n > 0)
            self._add_samples(n, n * mean, n * var)
            return
        self.add_statistic(
            saved.batch,
            saved.layout.geometry.running_shape,
            ddof_of_running(saved),
            saved.layout.ddof(saved.recipe.sample_variance),
        )

    @np.errstate(all="ignore")
    def add_statistic(
        self, batch: Statistic, shape: tuple[int, ...], ddof: int = 1, ddof_of_batch: int = 0
    ) -> None:
        """Add a statistic of one forward, whose running one is of this shape.

        Its variance was divided by n - ``ddof_of_batch``, what is stored by n - ``ddof``.
        """
        axes, n, mean, var = batch
        assert n is not None
        self._ddof = ddof
        known = n > 0
        self._count((known if 0 in axes else known.any(0)).reshape(shape))
        if 0 in axes:
            m2 = var * np.maximum(n - ddof_of_batch, 1)
            moments = Moments(n.reshape(shape), mean.reshape(shape), m2.reshape(shape))
            self._moments = moments if self._moments is None else self._moments + moments
            return
        sums = sample_sums(batch, ddof, ddof_of_batch)
        self._add_samples(*sums.reshape(3, *shape))

    def _count(self, given: NDArray[np.bool_]) -> None:
        """Count a forward that gave something to some of the running statistics."""
        self.n_forwards += 1
        if given.any():
            self.n_tracked += 1
            self.n_missed = self.n_missed + ~given

    def _add_samples(self, n: Float64, mean: Float64, var: Float64) -> None:
        """Add the number of samples, and sums of their means and variances."""
        self._samples = n if self._samples is None else self._samples + n
        self._mean, self._var = self._mean + mean, self._var + var

    def statistics(self) -> Running:
        """Return means and unbiased variances of all forwards, of which there is at least one."""
        if self._samples is not None:
            n = np.maximum(self._samples, 1)
            return Running(self._mean / n, self._var / n, self._samples > 0)
        assert self._moments is not None
        known = np.asarray(np.asarray(self._moments.count) > 0)
        return Running(self._moments.mean, self._moments.var(self._ddof), known)


def recalibrate(
    forward: Callable[[Batch], Any], batches: Iterable[Batch], layers: Iterable[Any]
) -> None:
    """Replace running averages by the exact pooled statistics of some batches.

    Runs ``forward(batch)`` on each batch with ``layers`` in training mode, so that a layer sees
    what the layers before it make of the batch. The statistics of all batches are merged as if
    they had been one batch; batches may differ in size. Then the layers are in their mode as
    before. Runs of over two seconds show a progress bar where tqdm is installed.

    Parameters
    ----------
    forward : callable
        Calls every one of ``layers``; what it returns is not used.
    batches : iterable
        At least one; may be a generator.
    layers : iterable of Norm
        Layers with running statistics: BatchNorm, SwitchableNorm, and others that track.

    Raises
    ------
    TypeError, ValueError
        If a layer has no running statistics, if there is no batch, or if a layer was never
        called. The layers then have their old statistics, as after any error in ``forward``.

    References
    ----------
    Luo et al., arXiv:1806.10779, section 3 ("batch average").

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> layer = numbanorm.BatchNorm1d(1)
    >>> batches = [np.array([[1.0], [2.0]]), np.array([[3.0], [4.0], [5.0]])]
    >>> numbanorm.recalibrate(layer, batches, [layer])
    >>> layer.running_mean, layer.running_var
    (array([3.], dtype=float32), array([2.5], dtype=float32))
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: an iterable of layers is needed, got {layers!r}")
    # A layer that the model uses twice is in the list twice, but has one pool.
    tracking = list({id(layer): layer for layer in layers}.values())
    if not tracking:
        raise ValueError("layers: at least one layer with running statistics is needed, got none")
    for layer in tracking:
        if not getattr(layer, "tracks", False):
            needed = "a layer with running statistics is needed"
            classes = () if hasattr(layer, "begin_pooling") else type(layer).__mro__
            if any(cls.__module__.startswith("torch.nn") for cls in classes):
                needed += (
                    "; numbanorm.torch.convert(model) makes them of PyTorch's and has to be first"
                )
            raise TypeError(f"layers: {needed}, got {layer!r}")
    pools = [Pool() for _ in tracking]
    before = [layer.begin_pooling(pool) for layer, pool in zip(tracking, pools, strict=True)]
    try:
        for batch in _progress(batches):
            forward(batch)
    finally:
        for layer, state in zip(tracking, before, strict=True):
            layer.end_pooling(state)
    for layer, pool in zip(tracking, pools, strict=True):
        if pool.n_forwards == pool.n_skipped:
            raise ValueError(
                f"batches: forward has to call each layer in training mode, on a batch with finite "
                f"statistics where it skips others; {pool.n_forwards} calls and {pool.n_skipped} "
                f"skipped for {layer!r}"
            )
    for layer, pool in zip(tracking, pools, strict=True):
        layer.adopt_pool(pool)


def _progress(batches: Iterable[Batch]) -> Iterable[Batch]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    bar: Iterable[Batch] = tqdm(batches, desc="recalibrate", unit="batch", delay=2, leave=False)
    return bar
