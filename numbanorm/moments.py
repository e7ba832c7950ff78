"""Count, mean and second central moment of data, in one pass, and how they merge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numbanorm.core.checks import as_array, bool_mask, float_array
from numbanorm.core.exchange import FORWARD_ROWS, Exchange, check_comm
from numbanorm.core.geometry import geometry, memory_order, normalize_axes
from numbanorm.core.layouts import find_layout
from numbanorm.core.layouts.pieces import Pieces, merge_stacked
from numbanorm.core.mapped import give_back, mapping_of
from numbanorm.core.types import Array, Axes, Float64
from numbanorm.kernels import algebra
from numbanorm.numba_ext.threads import call
from numbanorm.tuning import tuning


class Moments:
    """Count, mean and second central moment of data, for one or for many groups.

    ``m2`` is the sum of squared deviations from the mean; ``a + b`` are the moments of both data
    together, as if they had been one array (Chan, Golub, LeVeque 1983).

    Parameters
    ----------
    count : int or array of int64
        How many elements each group has; an array of the shape of ``mean`` where groups differ.
    mean, m2 : array of float64
        Of equal shape, one value for each group; 0 where a group is empty.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> a = numbanorm.moments(np.array([1.0, 2.0]))
    >>> b = numbanorm.moments(np.array([3.0, 4.0, 5.0]))
    >>> (a + b).count, float((a + b).mean), float((a + b).var(ddof=1))
    (5, 3.0, 2.5)
    """

    __slots__ = ("_rest", "count", "m2", "mean")

    def __init__(self, count: int | NDArray[np.int64], mean: ArrayLike, m2: ArrayLike) -> None:
        self.mean = np.asarray(mean, np.float64)
        self.m2 = np.asarray(m2, np.float64)
        # What float64 has rounded away of the mean; merging needs it where deviations are small.
        self._rest: NDArray[np.float64] = np.zeros(self.mean.shape)
        counts = np.asarray(count)
        if counts.dtype.kind not in "iu" or (counts < 0).any():
            raise ValueError(f"count: integers of at least 0 are needed, got {count!r}")
        self.count = counts if counts.ndim else int(counts)
        if self.m2.shape != self.mean.shape:
            raise ValueError(
                f"m2: the shape of mean, {self.mean.shape}, is needed, got {self.m2.shape}"
            )
        if isinstance(self.count, np.ndarray) and self.count.shape != self.mean.shape:
            raise ValueError(
                f"count: an int or the shape of mean, {self.mean.shape}, is needed, "
                f"got {self.count.shape}"
            )

    def __repr__(self) -> str:
        """Return the call that makes these moments."""
        return f"Moments(count={self.count!r}, mean={self.mean!r}, m2={self.m2!r})"

    def var(self, ddof: int = 0) -> NDArray[np.float64]:
        """Return the variance, m2 / max(count - ddof, 1).

        Parameters
        ----------
        ddof : int
            0 for the biased variance, which normalises; 1 for the sample variance.

        Examples
        --------
        >>> import numbanorm
        >>> float(numbanorm.moments([2.0, 3.0, 5.0, 1.0, 4.0]).var(ddof=1))
        2.5
        """
        return np.asarray(self.m2 / np.maximum(np.subtract(self.count, ddof), 1))

    def std(self, ddof: int = 0) -> NDArray[np.float64]:
        """Return the standard deviation, the root of :meth:`var`.

        Parameters
        ----------
        ddof : int
            As in :meth:`var`.

        Examples
        --------
        >>> import numbanorm
        >>> float(numbanorm.moments([1.0, 3.0]).std())
        1.0
        """
        return np.asarray(np.sqrt(self.var(ddof)))

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both data together."""
        if not isinstance(other, Moments):
            return NotImplemented
        return Moments.merge((self, other))

    @classmethod
    def empty(cls, shape: int | tuple[int, ...] = ()) -> Moments:
        """Return the moments of no data, the neutral element of ``+``.

        Parameters
        ----------
        shape : int or tuple of int
            The shape of ``mean``.

        Examples
        --------
        >>> import numbanorm
        >>> numbanorm.Moments.empty(3).mean
        array([0., 0., 0.])
        """
        return cls(0, np.zeros(shape), np.zeros(shape))

    @classmethod
    def merge(cls, moments: Iterable[Moments]) -> Moments:
        """Return the moments of all data together.

        Parameters
        ----------
        moments : iterable of Moments
            At least one, all of the same shape; it may be a generator.

        Raises
        ------
        ValueError
            If there is none, or if the shapes differ.

        Examples
        --------
        >>> import numpy as np
        >>> import numbanorm
        >>> pieces = (numbanorm.moments(np.full(n, n + 0.5)) for n in (1, 2, 3))
        >>> numbanorm.Moments.merge(pieces).count
        6
        """
        shape: tuple[int, ...] | None = None
        total: int | NDArray[np.int64] = 0
        for one in moments:
            if not isinstance(one, Moments):
                raise TypeError(f"moments: Moments are needed, got {type(one).__name__}")
            if shape is None:
                shape = one.mean.shape
                merged = np.zeros((4, 1, one.mean.size))
            elif one.mean.shape != shape:
                raise ValueError(
                    f"moments: all of one shape are needed, got {shape} and {one.mean.shape}"
                )
            parts = np.empty((4, 1, 1, one.mean.size))
            for part, values in zip(parts, (one.count, one.mean, one.m2, one._rest), strict=True):
                part.reshape(shape)[...] = values
            call(algebra.merge, parts, merged)
            total = total + one.count
        if shape is None:
            raise ValueError("moments: at least one is needed, got none")
        return cls._of(total, *merged[1:].reshape(3, *shape))

    @classmethod
    def _of(
        cls, count: int | NDArray[np.int64], mean: Float64, m2: Float64, rest: Float64
    ) -> Moments:
        new = cls(count, mean, m2)
        new._rest = rest
        return new


def moments(
    x: ArrayLike,
    axes: int | Iterable[int] | None = None,
    *,
    mask: ArrayLike | None = None,
    keepdims: bool = False,
    comm: Any = None,
) -> Moments:
    """Take count, mean and second central moment over some axes, in one pass over x.

    Parameters
    ----------
    x : array of floats, integers or booleans
        Any shape and strides; there is a copy only if x has gaps in memory. A ``numpy.memmap`` may
        be larger than memory: it is read in parts, which do not stay in the process.
    axes : int or tuple of int, optional
        The axes to reduce, negative allowed; by default all.
    mask : array of bool, optional
        Broadcasts to x; True where an element counts. Then ``count`` is an array.
    keepdims : bool
        Keep reduced axes with size 1.
    comm : mpi4py communicator, optional
        Of processes, each of which calls this with a part of the data: where axis 0 is reduced, the
        moments are those of all parts, with the same bits in every process. Parts may differ in
        size, and be empty; what does not fit in one process is an error in all.

    Returns
    -------
    Moments
        In float64; an empty group has count, mean and m2 of 0.

    Raises
    ------
    TypeError
        If x is of another type, or mask is not boolean.
    ValueError
        If an axis is out of range or stands twice, or mask does not broadcast to x.

    References
    ----------
    Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance", The American
    Statistician 37 (1983).

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> m = numbanorm.moments(np.arange(6.0).reshape(2, 3), axes=1)
    >>> m.count, m.mean, m.m2
    (3, array([1., 4.]), array([2., 2.]))
    """
    processes = check_comm(comm)
    if processes is None:
        return _moments(x, axes, mask, keepdims)
    with Exchange(processes).turn(FORWARD_ROWS) as exchange:
        return _moments(x, axes, mask, keepdims, exchange)


def _moments(
    x: ArrayLike,
    axes: int | Iterable[int] | None,
    mask: ArrayLike | None,
    keepdims: bool,
    exchange: Exchange | None = None,
) -> Moments:
    array = float_array(x, "x") if isinstance(x, np.ma.MaskedArray) else as_array(x, "x")
    in_parts = mapping_of(x) is not None
    if array.dtype.kind in "biu":
        in_parts = True  # each is converted
    elif not in_parts:
        array = float_array(x, "x")
    reduced = tuple(range(array.ndim)) if axes is None else normalize_axes(axes, array.ndim)
    counts = bool_mask(mask, array.shape)
    merged = _merged(array, reduced, counts, in_parts).reshape(5, -1)
    size = math.prod(array.shape[axis] for axis in reduced)
    masked = counts is not None
    if exchange is not None:
        shape = tuple(n for axis, n in enumerate(array.shape) if axis not in reduced)
        if 0 not in reduced:
            exchange.gather(np.empty((FORWARD_ROWS, 0)), (0,), 0)
        else:
            # A size below 0 says that there is a mask.
            sizes, gathered = exchange.gather(
                np.delete(merged, 2, axis=0), shape, -1 if masked else size
            )
            merged = merge_stacked(gathered)
            masked, size = bool((sizes < 0).any()), int(sizes.sum())
    shape = tuple(
        1 if axis in reduced else n
        for axis, n in enumerate(array.shape)
        if keepdims or axis not in reduced
    )
    count, mean, _, m2, rest = merged.reshape(5, *shape)
    return Moments._of(count.astype(np.int64) if masked else size, mean, m2, rest)


def _merged(array: Array, reduced: Axes, counts: Array | None, in_parts: bool = False) -> Float64:
    """Return count, mean, variance, m2 and rest with the axes of x, the reduced ones of size 1.

    What is mapped from a file is read, and given back, in parts along its slowest axis. So are
    integers converted, to a type of float that has them all.
    """
    most = tuning().mapped_part
    if in_parts and array.nbytes > most and array.size > 1:
        strides = [abs(s) if n > 1 else -1 for n, s in zip(array.shape, array.strides, strict=True)]
        axis = int(np.argmax(strides))
        n = array.shape[axis]
        n_parts = min(n, -(-array.nbytes // most))
        parts: list[Float64] = []
        for first, end in itertools.pairwise(n * k // n_parts for k in range(n_parts + 1)):
            here = (*[slice(None)] * axis, slice(first, end))
            x_part, mask_part = array[here], None if counts is None else counts[here]
            parts.append(_merged(x_part, reduced, mask_part, in_parts))
            give_back(x_part)
            give_back(mask_part)
            if axis in reduced and len(parts) == 2:
                parts = [_merge(*parts)]
        return np.concatenate(parts, axis + 1)
    if array.dtype.kind in "biu":
        array = array.astype(np.float32 if array.itemsize <= 2 else np.float64)
    x = float_array(array, "x")
    order = memory_order(x, x.shape) or tuple(range(x.ndim))
    layout = find_layout(geometry(x.shape, (reduced,), ()), order, False, whole_groups=False)
    assert isinstance(layout, Pieces)
    pieces = layout.reduce(layout.to_view(x), None if counts is None else layout.to_view(counts))
    merged = layout.merge(pieces, layout.groups, layout.part_segments)
    return merged.reshape(5, *(1 if a in reduced else n for a, n in enumerate(x.shape)))


def _merge(a: Float64, b: Float64) -> Float64:
    """Return the statistics of two parts together, all as :func:`_merged` returns them."""
    parts = np.delete(np.stack((a, b)), 2, axis=1)
    return merge_stacked(parts.reshape(2, 4, -1)).reshape(a.shape)
