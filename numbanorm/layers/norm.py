"""Norm, the one generic layer: parameters, running statistics, modes, forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from numbanorm import methods
from numbanorm.core import extremes
from numbanorm.core.checks import (
    ActivationLike,
    bool_mask,
    check_activation,
    check_count,
    check_dtype,
    check_flag,
    check_shape,
    float_array,
    like_x,
    others,
    output_array,
)
from numbanorm.core.exchange import BACKWARD_ROWS, FORWARD_ROWS, Exchange, check_comm
from numbanorm.core.geometry import AllBut, Geometry, axis_tuple
from numbanorm.core.layouts import Saved
from numbanorm.core.memory import arrays
from numbanorm.core.normalize import ParameterGradients, backward, find_recipe, normalize
from numbanorm.core.running import is_finite, share_samples, track
from numbanorm.core.types import Array, Float64
from numbanorm.kernels.activations import Activation
from numbanorm.layers.axes import OverAxes
from numbanorm.layers.state import State
from numbanorm.recalibrate import Pool
from numbanorm.tuning import tuning

# For so many shapes of x, and modes, a layer knows how each is done.
N_KNOWN = 8


class Norm(State, OverAxes):
    """Normalise x over any axes: y = (x - mean) / sqrt(var + eps) * weight + bias.

    All other layers are a ``Norm`` with axes and shapes of their own.

    Parameters
    ----------
    axes : int or tuple of int
        The axes reduced over, negative allowed.
    affine : bool
        Whether there are a weight and a bias.
    track_stats : bool
        Whether running statistics are kept, and used in evaluation. They span the kept axes
        other than axis 0; where axis 0 is kept they are averaged over it.
    feature_axes : int or tuple of int, optional
        The axes that weight and bias span; by default the kept axes when axis 0 is reduced
        (BatchNorm's rule), else the reduced axes (LayerNorm's rule).
    shape : int or tuple of int, optional
        The parameters' shape; by default it comes from the first x.
    groups : int
        ``group_axis`` is split into that many groups, each with statistics of its own.
    group_axis : int
        The axis that is split.
    center : bool
        Whether the mean is subtracted; if not, the variance is the mean square (RMSNorm).
    bias : bool
        Whether an affine layer has a bias.
    eps : float or None
        Added to the variance, inside the root. Where variance and eps both are 0, y is the
        bias. None means the machine epsilon of x's type.
    momentum : float or None
        Weight of the new value in the running statistics; None means the cumulative average.
    skip_nonfinite : bool
        Whether a batch whose statistics are not finite leaves the running statistics alone; such
        batches are counted in ``num_batches_skipped``.
    activation : str or tuple, optional
        What follows in the same pass: "relu", "leaky_relu" (or with a slope,
        ``("leaky_relu", 0.2)``), "relu6", "silu", "gelu", "gelu_tanh", "sigmoid" or "tanh".
    device : optional
        As in PyTorch's signatures, None or "cpu": arrays are nowhere else.
    dtype : dtype, optional
        Of parameters and running statistics, float32 (as with None) or float64.
    comm : mpi4py communicator, optional
        Of processes that train together: statistics over axis 0 are those of all their x.

    Attributes
    ----------
    weight : array or None
        Scale, from 1; an optimiser updates it in place.
    bias : array or None
        Shift, from 0; likewise.
    running_mean : array or None
        Average of the batches' means.
    running_var : array or None
        Average of the batches' unbiased variances.
    num_batches_tracked : array of int64, 0-d, or None
        Training forwards so far that gave something to the running statistics.
    training : bool
        Whether the batch's own statistics are used; see :meth:`train` and :meth:`eval`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message says what would do.

    Notes
    -----
    Any order of the axes in memory is handled as it is, where ``out`` has the same; without
    ``out``, y is C-contiguous, and an x of another order is copied once. So is an x with gaps in
    memory, and one that has a parameter for each element of reduced axes that are not the last.

    An array of 4 MiB or more that was returned gives its memory to a later one of its size when
    nobody has it any more, as fresh memory takes as long as the work. No more is kept than was in
    use at one time, and none when all layers are gone.

    A NaN or Inf in x makes its own group of statistics NaN, in y and in dx, and no other. In
    evaluation with running statistics it stays the only one. Running statistics that take it in
    stay NaN, unless ``skip_nonfinite``.

    With ``comm``, a training forward and its backward wait once for those of the other processes,
    and so each process has to make equally many. Batches may differ in size, and be empty. The
    statistics have the same bits in every process, dx is that of all losses together, and gradients
    of parameters are the process's own: :func:`numbanorm.sum_gradients` adds them up. An argument
    that does not fit in one process is an error in all. Copies share the communicator; pickles
    keep COMM_WORLD and COMM_SELF, and None for others.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm
    >>> layer = numbanorm.Norm(axes=(0, 2), eps=0.0)
    >>> layer(np.array([[[1.0, 3.0]], [[5.0, 7.0]]]))[:, 0].round(4)
    array([[-1.3416, -0.4472],
           [ 0.4472,  1.3416]])
    >>> layer.weight.shape
    (1,)
    """

    # Whether training needs more than one value in each group.
    several_values = False
    # Layers that were pickled before there was such a thing have none.
    _exchange: Exchange | None = None

    def __init__(
        self,
        axes: int | Iterable[int] | AllBut,
        affine: bool = True,
        track_stats: bool = False,
        *,
        feature_axes: int | Iterable[int] | None = None,
        shape: int | Iterable[int] | None = None,
        groups: int = 1,
        group_axis: int = 1,
        center: bool = True,
        bias: bool = True,
        eps: float | None = 1e-5,
        momentum: float | None = 0.1,
        skip_nonfinite: bool = False,
        activation: ActivationLike = None,
        device: object = None,
        dtype: DTypeLike | None = np.float32,
        comm: Any = None,
    ) -> None:
        self.axes = axes if isinstance(axes, AllBut) else axis_tuple(axes, "axes")
        if not self.axes:
            raise ValueError("axes: at least one axis is needed, got none")
        self.feature_axes = (
            None if feature_axes is None else axis_tuple(feature_axes, "feature_axes")
        )
        self.shape = None if shape is None else check_shape(shape, "shape")
        self.groups = check_count(groups, "groups")
        (self.group_axis,) = axis_tuple(group_axis, "group_axis")
        self.center = bool(center)
        self.eps = eps
        self.momentum = momentum
        self.skip_nonfinite = skip_nonfinite
        self.device = device
        self.activation = activation
        self.dtype = check_dtype(dtype)
        self.affine = bool(affine)
        self.track_stats = bool(track_stats)
        self.training = True
        self.num_batches_skipped = 0
        self._parameters: dict[str, Array] = {}
        self._gradients: dict[str, Array] = {}
        self._buffers: dict[str, Array] = {}
        self._saved: Saved | None = None
        self._pool: Pool | None = None
        self._has_bias = bool(bias)
        self.comm = comm
        if self.affine and self.shape is not None:
            self._adopt(self._new_parameters(self.shape))
        if self.track_stats:
            if self.shape is not None and self._features_are_kept():
                mean, var = self._running_or_new(self.shape)
                self._buffers.update(running_mean=mean, running_var=var)
            self._buffers["num_batches_tracked"] = np.zeros((), np.int64)

    def _mixture(self) -> Float64 | None:
        """Return the weights of several statistics."""
        return None

    _activation: Activation | None = None

    @property
    def activation(self) -> ActivationLike:
        """What follows the norm, or None."""
        return self.__dict__.get("activation_name")

    @activation.setter
    def activation(self, activation: ActivationLike) -> None:
        self._activation = check_activation(activation)
        self.activation_name = activation

    # Whether instances have sample variances, see SwitchableNorm.from_official.
    sample_variance = False

    # -- Forward and backward -------------------------------------------------------------------

    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        out: Array | None = None,
    ) -> Array:
        """Return :meth:`forward` of x."""
        return self.forward(x, mask=mask, residual=residual, out=out)

    def forward(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalise x, and keep what backward needs.

        Parameters
        ----------
        x : array of floats
            Any strides. It must stay as it is until :meth:`backward`.
        mask : array of bool, optional
            Broadcasts to x; True where an element counts in the statistics.
        residual : array of the shape of x, optional
            Added before the activation; it must stay as it is until :meth:`backward`, too.
        out : array, optional
            Where y is written; it may be ``x`` or ``residual``, and :meth:`backward` is then not
            possible.

        Returns
        -------
        array
            y, of the shape and dtype of x.

        Raises
        ------
        TypeError, ValueError
            If x, mask or out does not fit; the layer is then as before.

        Examples
        --------
        >>> import numbanorm
        >>> numbanorm.LayerNorm(2, eps=0.0).forward([[1.0, 3.0]])
        array([[-1.,  1.]])
        """
        exchange = self._exchange
        if exchange is None or not (self.training and exchange.has_others and self._may_share()):
            return self._forward(x, mask, residual, out)
        with exchange.turn(FORWARD_ROWS):
            return self._forward(x, mask, residual, out, exchange)

    def _forward(
        self,
        x: ArrayLike,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
        out: Array | None,
        exchange: Exchange | None = None,
    ) -> Array:
        """Return y, with the statistics of all processes if there is an exchange."""
        array = float_array(x, "x")
        key = (
            array.shape, array.dtype, self.training, mask is None, exchange is None, tuning()
        )  # fmt: skip
        known = self._known or {}
        recipe = known.get(key)
        geometry = self._fitting_geometry(array, exchange) if recipe is None else recipe.geometry
        new = {}
        if self.affine and "weight" not in self._parameters:
            new = self._new_parameters(geometry.param_shape)
        parameters = new or self._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        running = self._running_or_new(geometry.running_shape) if self.track_stats else None
        use_batch_stats = self.training or running is None
        counts = None if mask is None else bool_mask(mask, array.shape)
        added = None if residual is None else like_x(residual, "residual", array)
        y, in_place = output_array(out, array, *others(added), empty=self._empty)
        # The order in memory is that of y.
        is_usual = out is None or out.flags.c_contiguous
        if recipe is None or not is_usual:
            recipe = find_recipe(
                array,
                y,
                geometry,
                self.eps,
                has_weight=weight is not None,
                has_bias=bias is not None,
                masked=counts is not None,
                use_batch_stats=use_batch_stats,
                center=self.center,
                sample_variance=self.sample_variance,
                activation=self._activation,
                exchange=exchange,
                gradient_dtype=self.dtype,
            )
        # Values of float32 are small enough, and a small layer takes no longer than their check.
        saved = (extremes.normalize if array.itemsize == 8 else normalize)(
            array,
            y,
            recipe,
            weight,
            bias,
            running=None if use_batch_stats else running,
            mixture=self._mixture(),
            mask=counts,
            residual=added,
            in_place=in_place,
            exchange=exchange,
        )
        if exchange is not None and saved.exchange is None:
            saved = share_samples(saved, exchange)
        # An error above has left the layer as it was; from here on nothing can fail.
        self._adopt(new)
        if self.training and running is not None:
            self._track(running, saved)
        # Not by setattr(): what users set is checked, which takes longer.
        self.__dict__["_saved"] = saved
        if is_usual and key not in known:
            self.__dict__["_known"] = {**(known if len(known) < N_KNOWN else {}), key: recipe}
        return y

    def _fitting_geometry(self, x: Array, exchange: Exchange | None) -> Geometry:
        """Return over which axes of x statistics and parameters are, if x fits."""
        geometry = self._geometry(x)
        self._check_running(x, geometry)
        if self.training and self.several_values and exchange is None:
            methods.require_several(geometry)
        return geometry

    def _empty(self, like: Array) -> Array:
        """Return an array for y or dx."""
        return arrays.empty_for(self, like)

    def backward(
        self, dy: ArrayLike, *, out: Array | None = None, out_residual: Array | None = None
    ) -> Any:
        """Return dx of the last forward, and add the parameters' gradients to ``gradients()``.

        Parameters
        ----------
        dy : array of the shape of x
            The gradient of the loss with respect to y.
        out, out_residual : array, optional
            Where dx and the residual's gradient are written; one of them may be ``dy``.

        Returns
        -------
        array, or (array, array)
            dx, of the shape and dtype of x; after a forward with a residual (dx, dresidual).

        Raises
        ------
        TypeError, ValueError
            If dy or out does not fit; the layer is then as before.
        RuntimeError
            If there was no forward since the last backward, or if it wrote y over x or residual.

        Examples
        --------
        >>> import numbanorm
        >>> layer = numbanorm.LayerNorm(2)
        >>> y = layer([[1.0, 3.0]])
        >>> layer.backward([[1.0, 1.0]])
        array([[0., 0.]])
        """
        if self._saved is None:
            raise RuntimeError(
                "backward: a forward is needed first, and each forward serves one backward; "
                "where a layer is used several times in between, the functions ..._forward and "
                "..._backward of numbanorm.functional keep what each use needs"
            )
        exchange = self._saved.exchange
        with nullcontext() if exchange is None else exchange.turn(BACKWARD_ROWS):
            dx, dresidual, gradients = backward(dy, self._saved, out, out_residual, self._empty)
        self._add_gradients(gradients)
        self.__dict__["_saved"] = None
        return dx if dresidual is None else (dx, dresidual)

    @np.errstate(over="ignore", invalid="ignore")
    def _add_gradients(self, gradients: ParameterGradients) -> None:
        names = ("weight", "bias", "mean_weight", "var_weight")
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None and name in self._gradients:
                self._gradients[name] += gradient.astype(self.dtype, copy=False)

    # -- Parameters and running statistics ------------------------------------------------------

    def _running_or_new(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        if "running_mean" in self._buffers:
            return self._buffers["running_mean"], self._buffers["running_var"]
        return np.zeros(shape, self.dtype), np.ones(shape, self.dtype)

    def _track(self, running: tuple[Array, Array], saved: Saved) -> None:
        if self._pool is not None:
            if self.skip_nonfinite and not is_finite(saved):
                self._pool.n_forwards += 1
                self._pool.n_skipped += 1
            else:
                self._pool.add(saved)
            return
        mean, var = running
        if "running_mean" not in self._buffers:
            self._buffers = {"running_mean": mean, "running_var": var, **self._buffers}
        if self._n_missed is None:
            self._n_missed = np.zeros(mean.size, np.int64)
        counts = self._buffers["num_batches_tracked"], self._n_missed
        if track(saved, mean, var, self.momentum, self.skip_nonfinite, *counts):
            self.num_batches_skipped += 1

    # -- What recalibrate asks of a layer -------------------------------------------------------

    @property
    def tracks(self) -> bool:
        """Whether the layer has running statistics."""
        return self.track_stats

    def begin_pooling(self, pool: Pool) -> tuple[bool, Saved | None]:
        """Go to training mode and collect statistics; return what :meth:`end_pooling` needs.

        Parameters
        ----------
        pool : Pool
            Where :func:`numbanorm.recalibrate` collects them.
        """
        state = self.training, self._saved
        self._pool = pool
        self.training = True
        return state

    def end_pooling(self, state: tuple[bool, Saved | None]) -> None:
        """Go back to the mode and the pending backward of before.

        Parameters
        ----------
        state : tuple
            What :meth:`begin_pooling` returned.
        """
        self._pool = None
        self.training, self._saved = state

    def adopt_pool(self, pool: Pool) -> None:
        """Take the pooled statistics as running statistics.

        Parameters
        ----------
        pool : Pool
            That of :meth:`begin_pooling`.
        """
        statistics = pool.statistics()
        mean, var = self._running_or_new(statistics.mean.shape)
        self._buffers = {"running_mean": mean, "running_var": var, **self._buffers}
        self.reset_running_stats()
        np.copyto(mean, statistics.mean, where=statistics.known, casting="same_kind")
        np.copyto(var, statistics.var, where=statistics.known, casting="same_kind")
        self._buffers["num_batches_tracked"][...] = pool.n_tracked
        self._n_missed = np.ravel(pool.n_missed).astype(np.int64)
        self.num_batches_skipped = pool.n_skipped

    @property
    def comm(self) -> Any:
        """The mpi4py communicator of the processes that share statistics over axis 0, or None."""
        return None if self._exchange is None else self._exchange.processes.comm

    @comm.setter
    def comm(self, comm: Any) -> None:
        processes = check_comm(comm)
        shape = self.shape if self._features_are_kept() else None
        self._exchange = None
        if processes is not None:
            self._exchange = Exchange(processes, shape, self.several_values)

    def parameters(self) -> dict[str, Array]:
        """Return the parameters by name; an optimiser updates the arrays in place.

        Examples
        --------
        >>> import numbanorm
        >>> numbanorm.BatchNorm2d(2).parameters()
        {'weight': array([1., 1.], dtype=float32), 'bias': array([0., 0.], dtype=float32)}
        """
        return dict(self._parameters)

    def gradients(self) -> dict[str, Array]:
        """Return the parameters' gradients by name, added up since the last :meth:`zero_grad`.

        Examples
        --------
        >>> import numbanorm
        >>> sorted(numbanorm.BatchNorm2d(2).gradients())
        ['bias', 'weight']
        """
        return dict(self._gradients)

    def zero_grad(self) -> None:
        """Set all gradients to 0.

        Examples
        --------
        >>> import numbanorm
        >>> numbanorm.BatchNorm2d(2).zero_grad()
        """
        for gradient in self._gradients.values():
            gradient.fill(0)

    def reset_running_stats(self) -> None:
        """Set running statistics and counts to their start: 0, 1 and 0.

        Examples
        --------
        >>> import numbanorm
        >>> numbanorm.BatchNorm2d(2).reset_running_stats()
        """
        for name, buffer in self._buffers.items():
            buffer.fill(1 if name == "running_var" else 0)
        self.num_batches_skipped = 0
        self._n_missed = None

    # -- Modes, state, copies -------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Use the batch's statistics and track them (or not, with False); return the layer.

        Parameters
        ----------
        mode : bool
            False is evaluation, as :meth:`eval`.

        Examples
        --------
        >>> import numbanorm
        >>> numbanorm.BatchNorm2d(2).train().training
        True
        """
        self.training = check_flag(mode, "mode")
        return self

    def eval(self) -> Self:
        """Use the running statistics, where the layer has them; return the layer.

        Examples
        --------
        >>> import numbanorm
        >>> numbanorm.BatchNorm2d(2).eval().training
        False
        """
        return self.train(False)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied: all but what the last forward kept."""
        return {**self.__dict__, "_saved": None, "_pool": None, "_known": None}

    def __repr__(self) -> str:
        """Return the call that makes the layer; bias and keyword-only arguments if unusual."""
        shown = []
        for name, argument in inspect.signature(type(self).__init__).parameters.items():
            if name == "self":
                continue
            value = self._has_bias if name == "bias" else getattr(self, name)
            if argument.kind is argument.KEYWORD_ONLY or name == "bias":
                default = np.dtype(argument.default) if name == "dtype" else argument.default
                if value != default:
                    shown.append(f"{name}={value!r}" if name == "activation" else f"{name}={value}")
            else:
                shown.append(
                    f"{value}" if argument.default is argument.empty else f"{name}={value}"
                )
        return f"{type(self).__name__}({', '.join(shown)})"
