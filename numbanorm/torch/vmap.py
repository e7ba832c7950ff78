"""What torch.func.vmap makes of the operators, as in :func:`torch.func.jacrev`: one call.

The mapped axis is one more of x, and statistics are those of axes. The parameters' gradients for
each part of the map are left to PyTorch. What cannot be one call is the definition, mapped. A layer
inside a map is PyTorch's own: see :func:`numbanorm.torch.private.is_mapped`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from numbanorm.torch.definition import definition, gradient_function
from numbanorm.torch.method import BY_AXES, N_GRADIENTS, N_INPUTS, Inputs, Method, method_of
from numbanorm.torch.ops import backward_arguments

_RUNNING = Inputs._fields.index("running_mean")


def map_forward(normalize: Any, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Map ``normalize``: return its results, and which of their axes are mapped."""
    inputs, method, size = Inputs(*args[:N_INPUTS]), method_of(*args[N_INPUTS:]), info.batch_size
    mapped = Inputs(*_in_front(inputs, in_dims, size))
    is_given = inputs.running_mean is not None
    folded = _fold(mapped, method, is_given, in_dims[_RUNNING])
    if folded is None or inputs.weight is not None or inputs.bias is not None:
        return _map(lambda *tensors: definition(Inputs(*tensors), method), mapped), (0, 0)
    plain = Inputs(mapped.x, running_mean=inputs.running_mean, running_var=inputs.running_var)
    y, statistics = normalize(*plain, *folded.arguments())
    if is_given:
        return (y, statistics), (0, None)
    return (y, statistics.reshape(4, size, -1)), (0, 1)


def map_backward(
    normalize: Any, differentiate: Any, info: Any, in_dims: Sequence[Any], dy: Tensor, *args: Any
) -> tuple[Any, Any]:
    """Map ``normalize_backward``: return its results, and which of their axes are mapped."""
    inputs, (statistics, has_bias, use_batch_stats), method = backward_arguments(args)
    dy, each, *tensors = _in_front(
        (dy, statistics, *inputs),
        (in_dims[0], in_dims[N_INPUTS + 1], *in_dims[1:]),
        info.batch_size,
    )
    mapped, nothing = Inputs(*tensors), dy.new_empty(0)
    folded = _fold(mapped, method, not use_batch_stats, in_dims[N_INPUTS + 1])
    if folded is None:
        given = [t is not None for t in inputs[:N_GRADIENTS]]
        given[2] = has_bias

        def gradients(dy: Tensor, statistics: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
            gradient, primals = gradient_function(
                Inputs(*tensors), statistics, use_batch_stats, method
            )
            pairs = zip(gradient(dy, *primals), given, strict=True)
            return tuple(found if is_given else nothing for found, is_given in pairs)

        return _map(gradients, (dy, each, *mapped)), (0,) * N_GRADIENTS
    plain, arguments = Inputs(mapped.x), folded.arguments()
    if use_batch_stats:
        statistics = each.transpose(0, 1).reshape(4, -1)
    grid, others = _axes_of_features(dy, folded)
    dweight = dbias = nothing
    if has_bias:
        dbias = dy.sum(others) if others else dy.clone()
    if mapped.weight is not None:
        if not use_batch_stats:
            mean, _, var, _ = statistics.to(dy.dtype)
            plain = plain._replace(running_mean=mean, running_var=var)
        normalized, _ = normalize(*plain, *arguments)
        dweight = dy * normalized
        dweight = dweight.sum(others) if others else dweight
        dy = dy * mapped.weight.reshape(grid)
    dx, *_ = differentiate(dy, *Inputs(mapped.x), statistics, False, use_batch_stats, *arguments)
    results = dx, dweight, dbias, *[nothing] * (N_GRADIENTS - 3)
    return results, tuple(None if result is nothing else 0 for result in results)


def _in_front(tensors: Iterable[Any], dims: Sequence[Any], size: int) -> Iterable[Any]:
    """Yield tensors with the mapped axis in front, made where there is none."""
    for tensor, dim in zip(tensors, dims, strict=False):
        if tensor is None or isinstance(dim, int):
            yield tensor if tensor is None else tensor.movedim(dim, 0)
        else:
            yield tensor.expand(size, *tensor.shape)


def _map(function: Callable[..., Any], tensors: Sequence[Any]) -> Any:
    in_dims = tuple(None if tensor is None else 0 for tensor in tensors)
    return torch.func.vmap(function, in_dims)(*tensors)


def _fold(inputs: Inputs, method: Method, is_given: bool, dim: object) -> Method | None:
    """Return the method with a mapped axis in front, or None if that takes more than one call.

    ``is_given`` says whether statistics are, and ``dim`` whether they are mapped.
    """
    is_other = inputs.mean_weight is not None or method.sample_variance or method.process_group
    is_fused = method.activation or inputs.residual is not None
    if (
        is_other
        or is_fused
        or inputs.mask is not None
        or (is_given and (method.axes or dim is not None))
    ):
        return None
    if method.axes:
        axes, features, (group_axis,) = (
            tuple(axis if axis < 0 else axis + 1 for axis in each)
            for each in (method.axes, method.feature_axes, (method.group_axis,))
        )
        return method._replace(axes=axes, feature_axes=features, group_axis=group_axis)
    (name,) = method.statistics
    # Given statistics are those of a channel, whatever the sample.
    axes = {"in": (), "bn": (0, 1) if is_given else (1,), "ln": (2,), "gn": (2,)}[name]
    axes += tuple(range(3, inputs.x.dim()))
    groups = method.num_groups if name == "gn" else 1
    return Method(BY_AXES, method.eps, groups, axes, (2,), 2) if axes else None


def _axes_of_features(x: Tensor, method: Method) -> tuple[list[int], list[int]]:
    """Return the shape that parameters have beside x, and the other axes of a sample."""
    features = {0, *(axis % x.dim() for axis in method.feature_axes)}
    grid = [n if axis in features else 1 for axis, n in enumerate(x.shape)]
    return grid, [axis for axis in range(x.dim()) if axis not in features]
