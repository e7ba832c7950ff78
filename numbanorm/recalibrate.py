"""Exact running statistics: the batch average of the SwitchableNorm paper."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from numbanorm._running import Pool

Batch = TypeVar("Batch")


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
            raise TypeError(f"layers: a layer with running statistics is needed, got {layer!r}")
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
