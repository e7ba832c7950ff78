"""SwitchableNorm: learns how much of which statistics to use."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import DTypeLike

from numbanorm import functional
from numbanorm._axes import AllBut, Array, Geometry
from numbanorm.functional import Mixture
from numbanorm.norm import Norm


class SwitchableNorm(Norm):
    """Normalise with learned mixtures of instance, layer, batch and group statistics.

    mean = sum of softmax(mean_weight)[k] * mean_k and var = sum of softmax(var_weight)[k] * var_k
    over the statistics k in ``over``; y = (x - mean) / sqrt(var + eps) * weight + bias. All of
    them come from one pass over x.

    Evaluation uses running averages for "bn" and the statistics of x for the others.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the new value in the running statistics; None means the cumulative average.
    affine : bool
        Whether there are a weight and a bias, of shape (C,).
    track_running_stats : bool
        Whether "bn" has running statistics, of shape (C,).
    over : sequence of str
        Any choice of "in", "ln", "bn" and "gn", in any order, without repetition.
    num_groups : int, optional
        The number of groups for "gn", a divisor of C.
    zero_init : bool
        Whether the weight starts at 0 instead of 1.
    bias, axis, skip_nonfinite, dtype
        As in :class:`~numbanorm.BatchNorm`.

    Attributes
    ----------
    mean_weight, var_weight : array (K,)
        A logit for each statistic, initially 1.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    References
    ----------
    Luo, Ren, Peng, Zhang, Li, "Differentiable Learning-to-Normalize via Switchable
    Normalization", arXiv:1806.10779.

    Examples
    --------
    >>> import numbanorm
    >>> numbanorm.SwitchableNorm(4, over=("in", "bn")).importance()["mean"]
    {'in': 0.5, 'bn': 0.5}
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        over: Iterable[str] = ("in", "ln", "bn"),
        num_groups: int | None = None,
        zero_init: bool = False,
        bias: bool = True,
        axis: int = 1,
        skip_nonfinite: bool = False,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = functional.check_count(num_features, "num_features")
        self.over = functional.check_over(over, num_groups)
        if num_groups is not None and self.num_features % num_groups:
            raise ValueError(
                f"num_groups: a divisor of num_features={num_features} is needed, got {num_groups}"
            )
        self.num_groups = num_groups
        self.zero_init = bool(zero_init)
        self.axis = functional.check_channel_axis(axis)
        self.track_running_stats = bool(track_running_stats)
        super().__init__(
            AllBut((self.axis,)),
            affine,
            self.track_running_stats and "bn" in self.over,
            feature_axes=self.axis,
            shape=self.num_features,
            bias=bias,
            eps=functional.check_eps(eps),
            momentum=momentum,
            skip_nonfinite=skip_nonfinite,
            dtype=dtype,
        )
        if self.zero_init and self.weight is not None:
            self.weight.fill(0)
        logits = np.ones(len(self.over), self.dtype)
        self._adopt({"mean_weight": logits, "var_weight": logits.copy()})

    def _geometry(self, x: Array) -> Geometry:
        self._check_rank(x)
        channel = functional.channel_axis(x, self.axis)
        return functional.channel_geometry(x, channel, self.over, self.num_groups)

    def _mixture(self) -> Mixture:
        return functional.mix(self.mean_weight, self.var_weight, len(self.over))

    @property
    def mean_weight(self) -> Array:
        """Logits of the means."""
        return self._parameters["mean_weight"]

    @property
    def var_weight(self) -> Array:
        """Logits of the variances."""
        return self._parameters["var_weight"]

    def importance(self) -> dict[str, dict[str, float]]:
        """Return the softmax weights of means and variances by the statistic's name.

        Examples
        --------
        >>> import numbanorm
        >>> numbanorm.SwitchableNorm(4, over=("ln", "bn")).importance()
        {'mean': {'ln': 0.5, 'bn': 0.5}, 'var': {'ln': 0.5, 'bn': 0.5}}
        """
        mixture = self._mixture()
        return {
            "mean": dict(zip(self.over, mixture.mean.tolist(), strict=True)),
            "var": dict(zip(self.over, mixture.var.tolist(), strict=True)),
        }


class SwitchableNorm1d(SwitchableNorm):
    """:class:`SwitchableNorm` for x of shape (N, C) or (N, C, L), by default over LN and BN.

    In (N, C) an instance is a single value: its mean is that value, its variance is 0.
    """

    ranks = (2, 3)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        over: Iterable[str] = ("ln", "bn"),
        num_groups: int | None = None,
        zero_init: bool = False,
        bias: bool = True,
        axis: int = 1,
        skip_nonfinite: bool = False,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats,
            over=over, num_groups=num_groups, zero_init=zero_init, bias=bias, axis=axis,
            skip_nonfinite=skip_nonfinite, dtype=dtype,
        )  # fmt: skip


class SwitchableNorm2d(SwitchableNorm):
    """:class:`SwitchableNorm` for x of shape (N, C, H, W)."""

    ranks = (4,)


class SwitchableNorm3d(SwitchableNorm):
    """:class:`SwitchableNorm` for x of shape (N, C, D, H, W)."""

    ranks = (5,)
