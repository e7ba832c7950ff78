"""What a layer normalises over and how, and the sizes that follow from it."""

import functools
import itertools
import math
from typing import Any, NamedTuple, Self

from torch import Tensor

from numbanorm.core.checks import ActivationLike, check_activation
from numbanorm.core.types import Axes
from numbanorm.kernels.activations import Activation

# Statistics by the axes of the method: one alone.
BY_AXES = ("axes",)


class Inputs(NamedTuple):
    """The tensors of a forward, in the order in which the operators take them."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean_weight: Tensor | None = None
    var_weight: Tensor | None = None
    residual: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    mask: Tensor | None = None

    def floats(self) -> tuple[Tensor | None, ...]:
        """Return all but the mask."""
        return self[:-1]


N_INPUTS = len(Inputs._fields)
# How many of them, the first ones, have gradients.
N_GRADIENTS = Inputs._fields.index("running_mean")


class Method(NamedTuple):
    """The names of the statistics, and how x is normalised with them.

    The operators take the fields one by one, in this order, as their schemas have plain values
    only: see ``METHOD`` in :mod:`numbanorm.torch.ops`.
    """

    # Any of "in", "ln", "bn" and "gn", or BY_AXES.
    statistics: tuple[str, ...]
    eps: float = 0.0
    num_groups: int = 1  # of "gn", or those that the axis of the groups is split into
    axes: Axes = ()  # what BY_AXES reduces; those of rows count from the end
    feature_axes: Axes = ()  # what weight and bias span then
    group_axis: int = 1
    center: bool = True  # whether the mean is subtracted
    sample_variance: bool = False  # of the instances
    process_group: str = ""  # the name of the one that shares the statistics
    activation: str = ""  # what follows the norm and the addition of a residual
    slope: float = 0.0  # of "leaky_relu"

    def followed_by(self, activation: ActivationLike) -> Self:
        """Return the same with an activation."""
        if activation is None:
            return self
        name, slope = (activation, 0.01) if isinstance(activation, str) else activation
        return self._replace(activation=name, slope=float(slope))

    @classmethod
    def of_rows(cls, n_axes: int, eps: float, center: bool = True) -> Self:
        """Return that of LayerNorm and RMSNorm over so many trailing axes."""
        axes = (-1,) if n_axes == 1 else tuple(range(-n_axes, 0))
        return cls(BY_AXES, eps, 1, axes, axes, 1, center)

    def arguments(self) -> tuple[Any, ...]:
        """Return what the operators take for it."""
        return ",".join(self.statistics), *self[1:]


def method_of(over: str, *rest: Any) -> Method:
    """Return the method of these arguments of an operator."""
    values = (tuple(value) if isinstance(value, list) else value for value in rest)
    return Method._make((tuple(over.split(",")), *values))


@functools.lru_cache(maxsize=64)
def activation_of(name: str, slope: float) -> Activation | None:
    """Return the kernels' activation of a method."""
    return check_activation((name, slope) if name == "leaky_relu" else name or None)


def are_rows(method: Method) -> bool:
    """Tell whether statistics are those of rows: over trailing axes, with a weight for each."""
    axes = method.axes
    return bool(axes) and axes == method.feature_axes == tuple(range(-len(axes), 0))


def split_shape(x: Tensor, method: Method) -> tuple[Axes, Axes, Axes]:
    """Return the shape of x with the groups' axis split, and its axes reduced and of features.

    Sizes may be symbols. For BY_AXES only.
    """
    shape, n, groups = tuple(x.shape), x.dim(), method.num_groups
    axes = tuple(axis % n for axis in method.axes)
    features = tuple(axis % n for axis in method.feature_axes)
    if groups == 1:
        return shape, axes, features
    at = method.group_axis % n
    shape = (*shape[:at], groups, shape[at] // groups, *shape[at + 1 :])
    # What is reduced stays within a group; features are in all of them.
    split = ((at, at + 1) if axis == at else (axis + (axis > at),) for axis in features)
    return shape, tuple(axis + (axis >= at) for axis in axes), tuple(itertools.chain(*split))


def feature_shape(x: Tensor, method: Method) -> Axes:
    """Return the shape of weight and bias."""
    if method.axes:
        return tuple(x.shape[axis] for axis in sorted(a % x.dim() for a in method.feature_axes))
    return tuple(x.shape[1:2])


def group_counts(x: Tensor, method: Method) -> list[int]:
    """Return how many groups each statistic of x has."""
    if method.axes:
        shape, axes, _ = split_shape(x, method)
        return [math.prod(n for axis, n in enumerate(shape) if axis not in axes)]
    n, c = x.shape[:2]
    counts = {"in": n * c, "ln": n, "bn": c, "gn": n * method.num_groups}
    return [counts[name] for name in method.statistics]


def tracked(method: Method) -> int:
    """Return which of the statistics has running averages."""
    names = method.statistics
    return names.index("bn") if "bn" in names else 0


def tracked_part(statistics: Tensor, x: Tensor, method: Method) -> Any:
    """Return the packed statistic that has running averages, (4, groups)."""
    if len(method.statistics) == 1 and not method.sample_variance:
        return statistics
    counts, k = group_counts(x, method), tracked(method)
    return statistics.narrow(1, sum(counts[:k]), counts[k])


def has_instances(x: Any, method: Method) -> bool:
    """Tell whether the instances' own statistics are packed with the others."""
    return method.sample_variance and math.prod(x.shape[2:]) > 1
