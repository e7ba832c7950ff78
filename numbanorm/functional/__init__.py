"""Every method as functions of arrays, without state; ``import numbanorm.functional as F``.

Each method has three functions: ``batch_norm(...)`` returns y, ``batch_norm_forward(...)``
returns y and what backward needs, ``batch_norm_backward(dy, saved)`` returns the gradients.
They differ in nothing but the axes that they reduce.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from numbanorm.functional.channels import (
    batch_norm,
    batch_norm_forward,
    group_norm,
    group_norm_forward,
    instance_norm,
    instance_norm_forward,
)
from numbanorm.functional.common import (
    Gradients,
    GradientsWithResidual,
    SwitchableGradients,
    SwitchableGradientsWithResidual,
    norm_backward,
)
from numbanorm.functional.rows import layer_norm, layer_norm_forward, rms_norm, rms_norm_forward
from numbanorm.functional.switchable import (
    switchable_norm,
    switchable_norm_backward,
    switchable_norm_forward,
)

P = ParamSpec("P")
T = TypeVar("T")

__all__ = [
    "Gradients",
    "GradientsWithResidual",
    "SwitchableGradients",
    "SwitchableGradientsWithResidual",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "switchable_norm",
    "switchable_norm_backward",
    "switchable_norm_forward",
]


def _renamed(function: Callable[P, T], name: str) -> Callable[P, T]:
    """Return a function under another name, which ``help`` shows."""

    @functools.wraps(function)
    def renamed(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    renamed.__name__ = renamed.__qualname__ = name
    return renamed


batch_norm_backward = _renamed(norm_backward, "batch_norm_backward")
layer_norm_backward = _renamed(norm_backward, "layer_norm_backward")
instance_norm_backward = _renamed(norm_backward, "instance_norm_backward")
group_norm_backward = _renamed(norm_backward, "group_norm_backward")
rms_norm_backward = _renamed(norm_backward, "rms_norm_backward")

# Help, pickles and reprs name what is public by this module.
for _name in __all__:
    globals()[_name].__module__ = __name__
