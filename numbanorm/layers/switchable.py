"""SwitchableNorm: learns how much of which statistics to use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike

from numbanorm import methods
from numbanorm.core.checks import (
    ActivationLike,
    check_channel_axis,
    check_count,
    check_over,
)
from numbanorm.core.geometry import AllBut, Geometry
from numbanorm.core.types import Array, Float64
from numbanorm.layers.norm import Norm
from numbanorm.layers.state import array_property, to_array


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
        The number of groups for "gn", a divisor of C; needed only there.
    zero_init : bool
        Whether the weight starts at 0 instead of 1.
    sample_variance : bool
        Whether the variance of an instance is divided by n - 1 instead of n, see
        :meth:`from_official`.
    bias, axis, skip_nonfinite, activation, device, dtype, comm
        As in :class:`~numbanorm.BatchNorm`.

    Attributes
    ----------
    mean_weight : array (K,)
        A logit for each statistic in the mean, initially 1.
    var_weight : array (K,)
        A logit for each statistic in the variance, initially 1.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Notes
    -----
    In training, a NaN or Inf in x makes y NaN wherever it is in one of the statistics: with "bn" in
    its channel, with "ln" in its sample. dx is NaN for all that shares a statistic with one of
    those, and so are the gradients of the logits. Running statistics of its channel stay NaN,
    unless ``skip_nonfinite``.

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

    has_default_eps = False

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
        sample_variance: bool = False,
        activation: ActivationLike = None,
        device: object = None,
        dtype: DTypeLike | None = np.float32,
        comm: Any = None,
    ) -> None:
        self.num_features = check_count(num_features, "num_features")
        self.over = check_over(over, num_groups)
        if "gn" in self.over and self.num_features % (num_groups or 1):
            raise ValueError(
                f"num_groups: a divisor of num_features={num_features} is needed, got {num_groups}"
            )
        self.num_groups = num_groups
        self.zero_init = bool(zero_init)
        self.axis = check_channel_axis(axis)
        self.track_running_stats = bool(track_running_stats)
        self.sample_variance = bool(sample_variance)
        super().__init__(
            AllBut((self.axis,)),
            affine,
            self.track_running_stats and "bn" in self.over,
            feature_axes=self.axis,
            shape=self.num_features,
            bias=bias,
            eps=eps,
            momentum=momentum,
            skip_nonfinite=skip_nonfinite,
            activation=activation,
            device=device,
            dtype=dtype,
            comm=comm,
        )
        if self.zero_init and self.weight is not None:
            self.weight.fill(0)
        logits = np.ones(len(self.over), self.dtype)
        self._adopt({"mean_weight": logits, "var_weight": logits.copy()})

    def _geometry(self, x: Array) -> Geometry:
        self._check_rank(x)
        channel = methods.channel_axis(x, self.axis)
        self._check_sizes(x, (channel,))
        return methods.channel_geometry(
            x.shape, channel, self.over, self.num_groups, by_instance=self.sample_variance
        )

    def _may_share(self) -> bool:
        return "bn" in self.over

    def _mixture(self) -> Float64:
        return methods.mix(self._parameters["mean_weight"], self._parameters["var_weight"])

    mean_weight = array_property("_parameters", "mean_weight", "Logits of the means.")
    var_weight = array_property("_parameters", "var_weight", "Logits of the variances.")

    def importance(self) -> dict[str, dict[str, float]]:
        """Return the softmax weights of means and variances by the statistic's name.

        Examples
        --------
        >>> import numbanorm
        >>> numbanorm.SwitchableNorm(4, over=("ln", "bn")).importance()
        {'mean': {'ln': 0.5, 'bn': 0.5}, 'var': {'ln': 0.5, 'bn': 0.5}}
        """
        mean, var = self._mixture().tolist()
        return {
            "mean": dict(zip(self.over, mean, strict=True)),
            "var": dict(zip(self.over, var, strict=True)),
        }

    # Of the authors' code: the statistics that 3 and 2 logits stand for, and the weight of the
    # new value in the running statistics.
    _official_over: ClassVar[dict[int, tuple[str, ...]]] = {3: ("in", "ln", "bn"), 2: ("in", "ln")}
    _official_momentum = 0.1

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Any],
        *,
        eps: float = 1e-5,
        momentum: float | None = None,
        dtype: DTypeLike | None = None,
    ) -> Self:
        """Load a checkpoint of the authors' own code, and reproduce that code's outputs.

        That code takes the *sample* variance of an instance. With t = var_in + mean_in**2, its
        var_ln is the mean of t over channels minus mean_ln**2, its var_bn the mean of t over
        samples minus mean_bn**2. Here they come from merged moments, without the cancellation.
        In (N, C), "ln" and "bn" have sample variances. Running variances are those of "bn".

        Parameters
        ----------
        state_dict : mapping of str to array
            ``weight, bias`` (1, C, 1, ...), ``mean_weight, var_weight`` (3,) for IN, LN, BN or
            (2,) for IN, LN (in 1d: LN, BN), and with BN ``running_mean, running_var`` (1, C, 1).
            Arrays or CPU tensors.
        eps : float
            Added to the variance; a checkpoint does not hold it.
        momentum : float, optional
            Weight of the *new* value; by default that of the authors' class: 0.1 in 2d (they
            write 0.9, the weight of the old value), 0.003 in 1d and 3d.
        dtype : dtype, optional
            Of parameters and running statistics, float32 or float64; by default that of the
            checkpoint.

        Raises
        ------
        TypeError, ValueError
            If an entry is missing, unknown or of another shape.

        References
        ----------
        github.com/switchablenorms/Switchable-Normalization, devkit/ops/switchable_norm.py.

        Examples
        --------
        >>> import numpy as np
        >>> import numbanorm
        >>> state = {"weight": np.ones((1, 4, 1, 1)), "bias": np.zeros((1, 4, 1, 1))}
        >>> state |= {"mean_weight": np.ones(2), "var_weight": np.ones(2)}
        >>> numbanorm.SwitchableNorm2d.from_official(state)
        SwitchableNorm2d(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=False,
            over=('in', 'ln'), sample_variance=True, dtype=float64)
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: a mapping is needed, got {type(state_dict).__name__}")
        state = {name: to_array(value) for name, value in state_dict.items()}
        missing = [name for name in ("weight", "mean_weight", "var_weight") if name not in state]
        if missing:
            raise ValueError(f"state_dict: {missing} are needed, got {sorted(state)}")
        over = cls._official_over.get(state["mean_weight"].size)
        if over is None:
            raise ValueError(
                f"state_dict: {sorted(cls._official_over)} logits are needed in 'mean_weight', "
                f"got {state['mean_weight'].size}"
            )
        channels = max(state["weight"].shape, default=0)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if name in state:
                shape = state[name].shape
                if shape[:2] != (1, channels) or state[name].size != channels:
                    raise ValueError(
                        f"state_dict: shape (1, C, 1, ...) with C of 'weight' is needed for "
                        f"{name!r}, got {shape}"
                    )
                state[name] = state[name].reshape(channels)
        if dtype is None:
            floats = [array.dtype for array in state.values() if array.dtype.kind == "f"]
            dtype = np.result_type(np.float32, *floats)
        layer = cls(
            channels,
            eps,
            cls._official_momentum if momentum is None else momentum,
            track_running_stats="running_mean" in state,
            over=over,
            sample_variance=True,
            dtype=dtype,
        )
        layer.load_state_dict(state)
        return layer


class SwitchableNorm1d(SwitchableNorm):
    """:class:`SwitchableNorm`, same parameters, for x of shape (N, C) or (N, C, L).

    By default it is over LN and BN, as in (N, C) an instance is a single value: its
    mean is that value, its variance is 0.

    Examples
    --------
    >>> import numbanorm
    >>> numbanorm.SwitchableNorm1d(4).importance()["mean"]
    {'ln': 0.5, 'bn': 0.5}
    """

    ranks = (2, 3)
    _official_over: ClassVar[dict[int, tuple[str, ...]]] = {2: ("ln", "bn")}
    _official_momentum = 0.003

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
        sample_variance: bool = False,
        activation: ActivationLike = None,
        device: object = None,
        dtype: DTypeLike | None = np.float32,
        comm: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats,
            over=over, num_groups=num_groups, zero_init=zero_init, bias=bias, axis=axis,
            skip_nonfinite=skip_nonfinite, sample_variance=sample_variance, activation=activation,
            device=device, dtype=dtype, comm=comm,
        )  # fmt: skip


class SwitchableNorm2d(SwitchableNorm):
    """:class:`SwitchableNorm`, same parameters, for x of shape (N, C, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> layer = numbanorm.SwitchableNorm2d(4)
    >>> layer(np.ones((8, 4, 3, 3), np.float32)).shape
    (8, 4, 3, 3)
    >>> [round(share, 2) for share in layer.importance()["mean"].values()]
    [0.33, 0.33, 0.33]
    """

    ranks = (4,)


class SwitchableNorm3d(SwitchableNorm):
    """:class:`SwitchableNorm`, same parameters, for x of shape (N, C, D, H, W).

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> layer = numbanorm.SwitchableNorm3d(4)
    >>> layer(np.ones((8, 4, 2, 3, 3), np.float32)).shape
    (8, 4, 2, 3, 3)
    >>> [round(share, 2) for share in layer.importance()["mean"].values()]
    [0.33, 0.33, 0.33]
    """

    ranks = (5,)
    _official_momentum = 0.003
