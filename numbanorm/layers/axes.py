"""Axes and shapes of a layer: what follows from them for an x, and whether x fits."""

from numbanorm.core.geometry import (
    AllBut,
    Geometry,
    geometry,
    normalize_axes,
    normalize_features,
)
from numbanorm.core.types import Array, Axes


class OverAxes:
    """What reduces ``axes`` of x, and has parameters for ``feature_axes``."""

    axes: Axes | AllBut
    feature_axes: Axes | None
    shape: Axes | None
    groups: int
    group_axis: int
    track_stats: bool
    weight: Array | None
    running_mean: Array | None

    # A layer of fixed rank says which number of axes x may have.
    ranks: tuple[int, ...] = ()

    def _features_are_kept(self) -> bool:
        """Tell whether parameters and running statistics have the same shape, whatever x is."""
        if isinstance(self.axes, AllBut):
            return set(self.axes.axes) - {0} == set(self.feature_axes or ())
        return 0 in self.axes and self.feature_axes is None

    def _geometry(self, x: Array) -> Geometry:
        """Return over which axes of x statistics and parameters are."""
        self._check_rank(x)
        axes = normalize_axes(self.axes, x.ndim)
        features = normalize_features(self.feature_axes, axes, x.ndim)
        self._check_sizes(x, features)
        group_axis = self.group_axis % x.ndim
        return geometry(x.shape, (axes,), features, groups=self.groups, group_axis=group_axis)

    def _may_share(self) -> bool:
        """Tell whether, for some x, anything is a mean over axis 0."""
        if isinstance(self.axes, AllBut):
            return self.track_stats or 0 not in self.axes.axes
        return self.track_stats or 0 in self.axes or min(self.axes) < 0

    def _check_rank(self, x: Array) -> None:
        if self.ranks:
            if x.ndim not in self.ranks:
                needed = " or ".join(map(str, self.ranks))
                raise ValueError(
                    f"x: {type(self).__name__} needs {needed} axes, got shape {x.shape}"
                )
            return
        given = self.axes.axes if isinstance(self.axes, AllBut) else self.axes
        given += self.feature_axes or ()
        if self.groups > 1:
            given += (self.group_axis,)
        least = max(axis + 1 if axis >= 0 else -axis for axis in given)
        if x.ndim < least:
            raise ValueError(
                f"x: {type(self).__name__} needs at least {least} axes, got shape {x.shape}"
            )

    def _check_sizes(self, x: Array, features: Axes) -> None:
        """Raise if parameters are there, or declared, but of other sizes."""
        expected = self.shape if self.weight is None else self.weight.shape
        sizes = tuple(x.shape[axis] for axis in features)
        if expected is not None and expected != sizes:
            raise ValueError(
                f"x: sizes {expected} are needed on the feature axes {features}, got {sizes} "
                f"in shape {x.shape}"
            )

    def _check_running(self, x: Array, shape: Geometry) -> None:
        mean = self.running_mean
        if mean is not None and mean.shape != shape.running_shape:
            raise ValueError(
                f"x: sizes {mean.shape} are needed on the kept axes, as running_mean "
                f"has them, got {shape.running_shape} in shape {x.shape}"
            )
