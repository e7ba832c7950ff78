"""The state of a layer: live arrays, checked attributes, state dicts with PyTorch's keys."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numbanorm.core.checks import check_device, check_eps, check_flag, check_momentum
from numbanorm.core.layouts import Recipe
from numbanorm.core.types import Array


def array_property(group: str, name: str, doc: str) -> Any:
    """Return a property for an array of the layer, which stays the same array when it is set."""

    def get(layer: State) -> Array | None:
        array: Array | None = getattr(layer, group).get(name)
        return array

    def replace(layer: State, value: ArrayLike) -> None:
        array = get(layer)
        if array is None:
            raise AttributeError(f"{name}: this layer has none")
        if np.shape(value) != array.shape:
            raise ValueError(f"{name}: shape {array.shape} is needed, got {np.shape(value)}")
        array[...] = value

    return property(get, replace, doc=doc)


class State:
    """What a layer keeps: parameters, running statistics, and attributes that are checked."""

    affine: bool
    track_stats: bool
    dtype: np.dtype[Any]
    _has_bias: bool
    _parameters: dict[str, Array]
    _gradients: dict[str, Array]
    _buffers: dict[str, Array]
    # How many of the batches that were tracked gave nothing to which running statistic.
    _n_missed: NDArray[np.int64] | None = None
    device: object = None
    # What the last forwards were called with, and how that is done, unless a setting changed since.
    _known: dict[Any, Recipe] | None = None
    # Whether eps may be None.
    has_default_eps = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute as the constructor would, or refuse what all others depend on."""
        if name[0] != "_":
            layer: Any = type(self)
            if name in ("training", "skip_nonfinite"):
                value = check_flag(value, name)
            elif name == "momentum":
                value = check_momentum(value)
            elif name == "eps":
                value = None if value is None and self.has_default_eps else check_eps(value)
            elif name == "device":
                check_device(value)
                value = None
            elif name in self.__dict__ and name in _arguments(layer):
                raise AttributeError(
                    f"{name}: it is fixed once a layer is made; make a new one, and give it "
                    f"the state_dict() of this one where the shapes are the same"
                )
            if name != "training":  # which is part of what was called
                self.__dict__["_known"] = None
        object.__setattr__(self, name, value)

    def _new_parameters(self, shape: tuple[int, ...]) -> dict[str, Array]:
        new = {"weight": np.ones(shape, self.dtype)}
        if self._has_bias:
            new["bias"] = np.zeros(shape, self.dtype)
        return new

    def _adopt(self, parameters: dict[str, Array]) -> None:
        for name, value in parameters.items():
            self._parameters[name] = value
            self._gradients[name] = np.zeros_like(value)

    weight = array_property("_parameters", "weight", "Scale, or None.")
    bias = array_property("_parameters", "bias", "Shift, or None.")
    running_mean = array_property("_buffers", "running_mean", "Running mean, or None.")
    running_var = array_property("_buffers", "running_var", "Running unbiased variance, or None.")
    num_batches_tracked = array_property(
        "_buffers", "num_batches_tracked", "Training forwards, or None."
    )

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters and running statistics, with PyTorch's keys and shapes.

        Examples
        --------
        >>> import numbanorm
        >>> list(numbanorm.BatchNorm2d(2).state_dict())
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
        """
        state = {**self._parameters, **self._buffers}
        return {name: value.copy() for name, value in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy parameters and running statistics from a state dict, also one of PyTorch.

        Parameters
        ----------
        state_dict : mapping of str to array
            Arrays or CPU tensors. ``num_batches_tracked`` may be missing, as it is in old
            checkpoints.

        Raises
        ------
        TypeError, ValueError
            If an entry is missing, unknown or of another shape; the layer is then as before.

        Examples
        --------
        >>> import numbanorm
        >>> layer = numbanorm.BatchNorm2d(2)
        >>> layer.load_state_dict(numbanorm.BatchNorm2d(2).state_dict())
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: a mapping is needed, got {type(state_dict).__name__}")
        # What the first x has yet to bring takes its shape from the state dict.
        names = [*self._parameters, *self._buffers]
        if self.affine and self.weight is None:
            names += ["weight", *(["bias"] if self._has_bias else [])]
        if self.track_stats and self.running_mean is None:
            names += ["running_mean", "running_var"]
        missing = set(names) - set(state_dict) - {"num_batches_tracked"}
        unknown = set(state_dict) - set(names)
        if missing or unknown:
            raise ValueError(
                f"state_dict: the entries {names} are needed; "
                f"missing {sorted(missing)}, unknown {sorted(map(str, unknown))}"
            )
        self._known = None
        values = {name: _entry(name, value, self.dtype) for name, value in state_dict.items()}
        current = {**self._parameters, **self._buffers}
        for name, value in values.items():
            if name in current and current[name].shape != value.shape:
                raise ValueError(
                    f"state_dict: shape {current[name].shape} is needed for {name!r}, "
                    f"got {value.shape}"
                )
        for name, value in values.items():
            if name in current:
                current[name][...] = value
            elif name in ("weight", "bias"):
                self._adopt({name: value})
            else:
                self._buffers[name] = value
        if "num_batches_tracked" in values:
            self._n_missed = None


@functools.cache
def _arguments(layer: Any) -> frozenset[str]:
    """Return the names of what the constructors of a class and of its bases take."""
    constructors = (vars(base).get("__init__") for base in layer.__mro__[:-1])
    return frozenset(n for c in constructors if c for n in inspect.signature(c).parameters)


def to_array(value: Any) -> Array:
    """Return an entry of a state dict, which may be a tensor, as an array."""
    return np.asarray(value.detach() if hasattr(value, "detach") else value)


def _entry(name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    """Return a copy of an entry of a state dict, in the type that the layer has for it."""
    array = to_array(value)
    kind = "iu" if name == "num_batches_tracked" else "f"
    if array.dtype.kind not in kind:
        needed = "integers" if kind == "iu" else "floats"
        raise TypeError(f"state_dict: {needed} are needed for {name!r}, got {array.dtype}")
    return array.astype(np.int64 if kind == "iu" else dtype)
