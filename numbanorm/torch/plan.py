"""How tensors of one shape, type and order in memory are normalised, and are seen as arrays."""

import functools
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from numbanorm import methods
from numbanorm.core.geometry import Geometry, geometry, normalize_axes
from numbanorm.core.layouts import Recipe
from numbanorm.core.normalize import find_recipe
from numbanorm.core.types import Array, Axes, stored
from numbanorm.torch import distributed
from numbanorm.torch.memory import HALVES, as_array, borrow, form_of, outline
from numbanorm.torch.method import Inputs, Method, activation_of


def wide_array(tensor: Tensor) -> Array:
    """Return a parameter or a running statistic, in float32 if it has 16 bits."""
    return as_array(tensor.float() if tensor.dtype in HALVES else tensor)


def parameter_array(tensor: Tensor | None) -> Array | None:
    """Return a parameter that may be None."""
    return None if tensor is None else wide_array(tensor)


@functools.lru_cache(maxsize=4096)
def _geometry(shape: Axes, method: Method) -> Geometry:
    """Return over which axes of an x of this shape statistics and parameters are."""
    if not method.axes:
        return methods.channel_geometry(
            shape, 1, method.statistics, method.num_groups, method.sample_variance
        )
    n = len(shape)
    axes, features = (normalize_axes(a, n) for a in (method.axes, method.feature_axes))
    return geometry(
        shape, (axes,), features, groups=method.num_groups, group_axis=method.group_axis % n
    )


def parameter_dtype(inputs: Inputs) -> torch.dtype:
    """Return the type of the parameters, which is one for all."""
    for parameter in inputs[1:5]:
        if parameter is not None:
            return parameter.dtype
    return inputs.x.dtype


class Plan(NamedTuple):
    """How tensors like x are normalised: what follows from shapes, types and strides alone.

    Attributes
    ----------
    method : Method
        What the layer does.
    recipe : Recipe
        How that is done.
    strides : tuple of int
        Those of x and y where kernels see their memory as it is, else of no tensor.
    shape, dtype
        Of the arrays that kernels see.
    form : torch.memory_format
        Of y and dx.
    is_small : bool
        Whether one thread does all of it, however many there may be.
    """

    method: Method
    recipe: Recipe
    strides: Axes
    shape: Axes
    dtype: np.dtype[Any]
    form: torch.memory_format
    is_small: bool

    @classmethod
    def of(cls, inputs: Inputs, method: Method, has_bias: bool, use_batch_stats: bool) -> Self:
        """Return the plan for inputs like these."""
        x, array, form = inputs.x, as_array(inputs.x), form_of(method)
        y = outline(x, form)
        recipe = find_recipe(
            array,
            y,
            _geometry(array.shape, method),
            method.eps,
            has_weight=inputs.weight is not None,
            has_bias=has_bias,
            masked=inputs.mask is not None,
            use_batch_stats=use_batch_stats,
            center=method.center,
            sample_variance=method.sample_variance,
            activation=activation_of(method.activation, method.slope),
            exchange=distributed.exchange(method.process_group, array),
            gradient_dtype=np.float32 if parameter_dtype(inputs) is torch.float32 else np.float64,
        )
        layout = recipe.layout
        in_memory = y.reshape(recipe.geometry.shape).transpose(layout.order)
        as_it_is = array.strides == y.strides and in_memory.flags.c_contiguous
        strides = x.stride() if as_it_is else (-1,)
        is_small = array.size * layout.tuning.piece_work < layout.tuning.parallel_from
        return cls(method, recipe, strides, layout.view, stored(array.dtype), form, is_small)

    def view(self, tensor: Tensor) -> Array:
        """Return a tensor like x as kernels see it, as long as it lives."""
        if tensor.stride() == self.strides:
            return borrow(tensor, self.shape, self.dtype)
        return self.recipe.layout.to_view(as_array(tensor))

    def target(self, tensor: Tensor) -> tuple[Array, Array | None]:
        """Return what kernels write of a tensor like y, see Layout.to_target."""
        if tensor.stride() == self.strides:
            return borrow(tensor, self.shape, self.dtype, writable=True), None
        return self.recipe.layout.to_target(as_array(tensor))


class Call(NamedTuple):
    """What a forward takes beside x, logits and a residual.

    Attributes
    ----------
    plan : Plan
        How it is done.
    weight, bias : array or None
        The parameters.
    running : (mean, var) or None
        Running statistics in the place of those of x.
    mask : Tensor or None
        Which elements count.
    """

    plan: Plan
    weight: Array | None
    bias: Array | None
    running: tuple[Array, Array] | None
    mask: Tensor | None


def prepare(inputs: Inputs, method: Method) -> Call:
    """Return the call for these inputs."""
    mean, var = inputs.running_mean, inputs.running_var
    running = None if mean is None or var is None else (wide_array(mean), wide_array(var))
    plan = Plan.of(inputs, method, inputs.bias is not None, running is None)
    return Call(
        plan, parameter_array(inputs.weight), parameter_array(inputs.bias), running, inputs.mask
    )
