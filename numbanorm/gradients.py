"""Gradients of several processes, added up."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from numbanorm.core.exchange import Exchange, check_comm
from numbanorm.core.types import Array

# A row of all gradients, one after the other.
ROWS = 1


def sum_gradients(layers: Iterable[Any], comm: Any) -> None:
    """Add the gradients of parameters up over processes, in place.

    Each process then has the gradients of the sum of all processes' losses, with the same bits, so
    that equal optimisers keep the parameters equal. All layers go in one exchange.

    Parameters
    ----------
    layers : iterable
        Layers, the same ones in the same order in each process: :class:`Norm`, or anything whose
        ``gradients()`` returns a dict of arrays. One that is in it twice counts once.
    comm : mpi4py communicator
        Of the processes; each of them calls this. None stands for this process alone.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or if the gradients' names or shapes differ between processes;
        in all processes alike, and the gradients are then as before.

    Examples
    --------
    >>> import numbanorm
    >>> layers = [numbanorm.BatchNorm2d(8), numbanorm.LayerNorm(8)]
    >>> numbanorm.sum_gradients(layers, comm=None)  # MPI.COMM_WORLD where there are processes
    """
    processes = check_comm(comm)
    if processes is None:
        _gradients(layers)
        return
    # What is told first is whether all have the same, which may be much.
    exchange = Exchange(processes, (0,))
    exchange.needed = "layers: equal names and shapes of gradients"
    with exchange.turn(ROWS):
        named = _gradients(layers)
        own = np.concatenate([np.zeros(0), *(array.ravel() for _, array in named)])
        shapes = tuple((name, array.shape) for name, array in named)
        _, gathered = exchange.gather(own[None], shapes, 0)
    total, first = gathered.sum(0)[0], 0
    with np.errstate(over="ignore", invalid="ignore"):
        for _, array in named:
            array[...] = total[first : first + array.size].reshape(array.shape)
            first += array.size


def _gradients(layers: Iterable[Any]) -> list[tuple[str, Array]]:
    """Return names and arrays of all gradients, each array once."""
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: an iterable of layers is needed, got {layers!r}")
    named: dict[int, tuple[str, Array]] = {}
    for layer in layers:
        if not hasattr(layer, "gradients"):
            raise TypeError(f"layers: layers with gradients() are needed, got {layer!r}")
        for name, array in layer.gradients().items():
            named.setdefault(id(array), (name, array))
    return list(named.values())
