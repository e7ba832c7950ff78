"""What every layout has: how it sees x, and what backward needs of a forward."""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from numbanorm.core.exchange import Exchange
from numbanorm.core.geometry import Geometry
from numbanorm.core.types import Array, Axes, Float64, stored
from numbanorm.kernels.activations import LINES, Activation
from numbanorm.kernels.modes import Mode
from numbanorm.tuning import Tuning


class Statistic(NamedTuple):
    """One mean and variance over ``axes``, with size 1 there and the other axes of x.

    ``n`` has the number of elements of each, or is None where they do not come from x.
    """

    axes: Axes
    n: NDArray[np.int64] | None
    mean: Float64
    var: Float64


class Instances(NamedTuple):
    """Moments of the instances, which sample variances were made of."""

    n: NDArray[np.int64]
    mean: Float64
    m2: Float64


class Recipe(NamedTuple):
    """How x of one shape, type and order in memory is normalised: found once, for all such x.

    Attributes
    ----------
    layout : Layout
        How the kernels see x.
    shape, dtype
        Of x, before an axis was split into groups.
    arithmetic : dtype
        With which it is calculated.
    mode : Mode
        ``use_batch_stats`` is about the tracked statistic, others always come from x.
    has_weight, has_bias : bool
        Which parameters there are.
    sample_variance : bool
        Whether the variance of an instance (or, where those are single values, of each group)
        is divided by n - 1 instead of n.
    activation : Activation or None
        What follows.
    is_streamed : bool
        Whether outputs in memory of their own are written by streaming stores.
    gradient_dtype : dtype
        Of the gradients of weight and bias where these may be as large as x; elsewhere float64.
    """

    layout: "Layout"
    shape: Axes
    dtype: np.dtype[Any]
    arithmetic: np.dtype[Any]
    mode: Mode
    has_weight: bool
    has_bias: bool
    sample_variance: bool
    activation: Activation | None
    is_streamed: bool
    gradient_dtype: Any = np.float64

    @property
    def geometry(self) -> Geometry:
        """Over which axes of x."""
        return self.layout.geometry

    @property
    def keeps_dy(self) -> bool:
        """Whether backward makes the gradient of norm(x) + residual once, and keeps it.

        Only where the slope is a curve, which takes long to make, and not in an output of 16 bits,
        which would round it.
        """
        is_curve = self.activation is not None and self.activation.kind != LINES
        return is_curve and self.layout.has_room_for_dy and self.dtype == self.arithmetic


class Job(NamedTuple):
    """What a forward is to do, beside x and y.

    Attributes
    ----------
    recipe : Recipe
        How.
    weight, bias : array or None
        Of shape ``geometry.param_shape``.
    running : (mean, var) or None
        Given statistics in the place of the tracked one.
    mixture : array (2, S) or None
        Weights of the means and of the variances of several statistics.
    fused : tuple or None
        What :mod:`numbanorm.kernels.access` calls ``fused``, of views.
    exchange : Exchange or None
        With the processes that share the tracked statistic.
    """

    recipe: Recipe
    weight: Array | None = None
    bias: Array | None = None
    running: tuple[Array, Array] | None = None
    mixture: Float64 | None = None
    fused: Any = None
    exchange: Exchange | None = None

    @property
    def mode(self) -> Mode:
        """How statistics are taken and used."""
        return self.recipe.mode


class Statistics(NamedTuple):
    """What a forward found, and with which parameters it wrote y.

    Attributes
    ----------
    parameters : array (2, ...) or tuple of arrays
        Copies of weight and bias as the kernels see them, as both may change before backward.
    groups : array (3 or more, G)
        Count, mean and variance of each group, in the layout's order.
    pieces : array (3, P) or None
        Mean, variance and rstd that normalise each piece, where there are pieces.
    instances : Instances or None
        What sample variances were made of.
    """

    parameters: Any
    groups: Float64
    pieces: Float64 | None = None
    instances: Instances | None = None


class Saved(NamedTuple):
    """What backward needs of one forward; opaque to users.

    Attributes
    ----------
    recipe : Recipe
        How it was done.
    x, mask : array or None
        Views in the layout's order. A caller that keeps x, mask and residual itself gives them back
        by :meth:`with_inputs` before :func:`~numbanorm.core.normalize.differentiate`.
    residual : array or None
        What was added, as a view.
    lost : str
        Whether y was written over "x" or "residual"; else "".
    mixture
        As in the Job of forward.
    statistics : Statistics
        What forward found.
    exchange : Exchange or None
        With the processes that share the tracked statistic.
    samples : array (3, R) or None
        What is tracked where processes share averages over samples: their number, and the averages
        of their means and unbiased variances.
    scale : array of the shape of x, or None
        What x was multiplied by, see :mod:`numbanorm.core.extremes`.
    unscaled : array or None
        The statistics of all groups without that.
    """

    recipe: Recipe
    x: Array | None
    mask: Array | None
    residual: Array | None
    lost: str
    mixture: Float64 | None
    statistics: Statistics
    exchange: Exchange | None = None
    samples: Float64 | None = None
    scale: Float64 | None = None
    unscaled: Float64 | None = None

    def __eq__(self, other: object) -> bool:
        """Tell whether it is the same: arrays are not compared."""
        return self is other

    def __hash__(self) -> int:
        """Go by identity."""
        return id(self)

    def with_inputs(self, x: Array | None, mask: Array | None, residual: Array | None) -> "Saved":
        """Return the same with other inputs, for a caller that keeps them, or None."""
        x, mask, residual = (
            a if a is None else self.layout.to_view(a) for a in (x, mask, residual)
        )
        return self.with_views(x, mask, residual)

    def with_views(self, x: Array | None, mask: Array | None, residual: Array | None) -> "Saved":
        """Return the same with other views in the layout's order."""
        # In a quarter of the time that _replace() takes.
        return Saved._make((self.recipe, x, mask, residual, *self[4:]))

    @property
    def layout(self) -> "Layout":
        """How x, mask, dy and dx are seen."""
        return self.recipe.layout

    @property
    def mode(self) -> Mode:
        """How statistics were taken and used."""
        return self.recipe.mode

    def all_statistics(self) -> list[Statistic]:
        """Return all statistics."""
        return [self._statistic(k) for k in range(len(self.layout.geometry.reductions))]

    @property
    def batch(self) -> Statistic:
        """The statistic that has running averages."""
        return self._statistic(self.layout.geometry.tracked)

    @property
    def is_constant(self) -> bool:
        """Whether each element is a group of its own, so that y does not depend on x."""
        if not self.recipe.geometry.single_values:
            return False
        is_alone = self.mask is None and self.exchange is None
        uses_means = self.mode.center and self.mode.use_batch_stats
        return is_alone and uses_means

    @property
    def groups(self) -> Float64:
        """The statistics of all groups of x."""
        return self.statistics.groups if self.unscaled is None else self.unscaled

    def _statistic(self, k: int) -> Statistic:
        geometry = self.layout.geometry
        n, mean, var = self.layout.statistic(self.groups, k)
        given = not self.mode.use_batch_stats and k == geometry.tracked
        return Statistic(geometry.reductions[k], None if given else n.astype(np.int64), mean, var)


class Gradients(NamedTuple):
    """Gradients of weight and bias, and of a mixture's logits (2, S) if it has several parts."""

    weight: Float64
    bias: Float64
    mixture: Float64 | None = None


class Arrangement:
    """The axes of a geometry in one order of memory, told apart by what is done along them.

    Attributes
    ----------
    order : tuple of int
        From the slowest to the fastest; axes of size 1 are left out of the lists below.
    wide, kept, reduced : list of int
        All axes, and those that the first statistic keeps and reduces.
    features : list of int
        The axes that the parameters span, if there are any parameters.
    single : bool
        Whether there is one statistic, whose groups may be handled at once.
    outer, run, columns : list of int
        The last run of axes that every statistic reduces and no parameter spans, and the axes
        before and after it.
    """

    def __init__(
        self,
        geometry: Geometry,
        order: Axes,
        affine: bool,
        masked: bool,
        whole_groups: bool,
        tuning: Tuning,
    ) -> None:
        self.geometry, self.order, self.affine = geometry, order, affine
        self.masked, self.tuning = masked, tuning
        shape, inner = geometry.shape, set(geometry.inner(affine))
        self.wide = [axis for axis in order if shape[axis] != 1]
        self.kept = [axis for axis in self.wide if axis not in geometry.reductions[0]]
        self.reduced = [axis for axis in self.wide if axis in geometry.reductions[0]]
        self.features = [a for a in geometry.features if shape[a] != 1] if affine else []
        single = len(geometry.reductions) == 1 and not geometry.instance_axes
        self.single = single and whole_groups and tuning.whole_groups
        end = len(self.wide)
        while end > 0 and self.wide[end - 1] not in inner:
            end -= 1
        start = end
        while start > 0 and self.wide[start - 1] in inner:
            start -= 1
        if start == end:  # nothing is inner: each element is a piece
            start = end = len(self.wide)
        self.outer, self.run, self.columns = (
            self.wide[:start], self.wide[start:end], self.wide[end:]
        )  # fmt: skip

    def size(self, axes: Iterable[int]) -> int:
        """Return the number of elements along some axes."""
        return math.prod(self.geometry.shape[axis] for axis in axes)

    def grid(self, within: Iterable[int]) -> Axes:
        """Return the shape of x with size 1 along axes within a piece."""
        inside = set(within)
        return tuple(1 if axis in inside else n for axis, n in enumerate(self.geometry.shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Layout(ABC):
    """How the kernels see x, and how forward and backward run, for one order of axes in memory.

    Attributes
    ----------
    geometry : Geometry
        Over which axes.
    order : tuple of int
        The axes from the slowest to the fastest in memory; kernels work in this order.
    affine : bool
        Whether there are parameters.
    view : tuple of int
        The two to four axes that a kernel sees.
    tiles : NamedTuple
        How a kernel cuts them.
    tuning : Tuning
        What decided that.
    """

    geometry: Geometry
    order: Axes
    affine: bool
    view: Axes
    tiles: Any
    tuning: Tuning

    # Whether kernels may keep the gradient of norm(x) + residual in dresidual, or in dx.
    has_room_for_dy: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def fit(cls, axes: Arrangement) -> Self | None:
        """Return the layout for these axes, or None if it is not one for them."""

    @abstractmethod
    def forward(
        self, x: Array, mask: Array | None, job: Job, streamed: bool, y: Array
    ) -> Statistics:
        """Write y; return what was found. All arrays are views."""

    @abstractmethod
    def backward(
        self, dy: Array, x: Array, saved: Saved, fused: Any, streamed: bool, dx: Array
    ) -> Gradients:
        """Write dx; return the parameters' gradients. All arrays are views; see Job on fused."""

    @abstractmethod
    def restore(self, statistics: list[Statistic], job: Job) -> Statistics:
        """Return what forward returned, from the statistics alone."""

    @abstractmethod
    def statistic(self, groups: Float64, k: int) -> Any:
        """Return count, mean and variance of statistic k, with the axes of x (reduced ones 1)."""

    @abstractmethod
    def tracked(self, groups: Float64) -> tuple[Float64, int, int]:
        """Return group statistics, and from where to where they are those of the tracked one.

        There they are in the C order of its kept axes.
        """

    def ddof(self, sample_variance: bool) -> int:
        """Return what is taken off n in the variances of groups."""
        return 0

    @functools.cached_property
    def n_bytes(self) -> int:
        """Bytes of the tables, which are made at once."""
        return 0

    def streams(self, use_batch_stats: bool = True) -> bool:
        """Tell whether what is written at once is a run of memory that is worth streaming."""
        return self.view[-1] >= self.tuning.stream_from

    @functools.cached_property
    def inverse_order(self) -> Axes:
        """Where each axis of x stands in memory."""
        return tuple(int(axis) for axis in np.argsort(self.order))

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether the axes of x stand in memory as they are numbered."""
        return self.order == tuple(range(len(self.order)))

    @functools.cached_property
    def parameter_view(self) -> Axes:
        """Shape of the weights as the kernels see them: (F,) of each feature."""
        return (math.prod(self.geometry.param_grid) if self.affine else 1,)

    def to_view(self, x: Array) -> Array:
        """Return x as the kernels see it: read-only, and copied only if its order differs."""
        if not x.flags.c_contiguous or not self.in_order:
            x = np.ascontiguousarray(x.reshape(self.geometry.shape).transpose(self.order))
        view = x.reshape(self.view)
        if view.itemsize == 2:
            view = view.view(stored(view.dtype))
        # Read-only arrays are a type of their own for Numba: with all inputs of that type,
        # there is one machine code for them and for those that the user may write to.
        view.setflags(write=False)
        return view

    def to_target(self, y: Array) -> tuple[Array, Array | None]:
        """Return where the kernels write y, and if that is not y itself, y as it is to be set."""
        if y.itemsize == 2:
            y = y.view(stored(y.dtype))
        if self.in_order and y.flags.c_contiguous and y.flags.aligned:
            return y.reshape(self.view), None
        in_memory = y.reshape(self.geometry.shape).transpose(self.order)
        if in_memory.flags.c_contiguous and in_memory.flags.aligned:
            return in_memory.reshape(self.view), None
        return np.empty(self.view, y.dtype), in_memory

    def weight_and_bias(self, job: Job, dtype: Any) -> Array:
        """Return copies of weight and bias, as both may change before backward, (2, ...)."""
        shape = self.geometry.param_shape if self.affine else (1,)
        both: Array = np.empty((2, *shape), dtype)
        both[0] = 1.0 if job.weight is None else job.weight
        both[1] = 0.0 if job.bias is None else job.bias
        return both

    def feature_parameters(self, job: Job) -> Float64:
        """Return weight and bias of each feature, (2, F)."""
        parameters = self.weight_and_bias(job, np.float64)
        return parameters if parameters.ndim == 2 else parameters.reshape(2, *self.parameter_view)

    def in_parameter_shape(self, gradients: Array, dmixture: Float64 | None = None) -> Gradients:
        """Return gradients of weight and bias (2, ...) in the parameters' shape."""
        dweight, dbias = gradients[0], gradients[1]
        shape = self.geometry.param_shape
        if self.affine and dweight.shape != shape:
            dweight, dbias = dweight.reshape(shape), dbias.reshape(shape)
        return Gradients(dweight, dbias, dmixture)


def finish_target(target: Array | None, whole: Array | None) -> None:
    """Set an output from what kernels wrote, unless they wrote to it; see Layout.to_target."""
    if target is not None and whole is not None:
        whole[...] = target.reshape(whole.shape)


def largest_divisor(n: int, most: int) -> int:
    """Return the largest divisor of n that is not above ``most``, or 1."""
    return max(k for k in range(1, max(min(n, most), 1) + 1) if n % k == 0)


def n_folded(length: int, n_columns: int, tuning: Tuning) -> int:
    """Return how many rows are seen as one: short ones cost more to start than to run."""
    # A folded row is one block.
    most = min(tuning.column_fold, tuning.column_block)
    return largest_divisor(length, min(most // max(n_columns, 1), length // 16))
