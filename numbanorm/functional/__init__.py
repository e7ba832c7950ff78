"""Every method as functions of arrays, without state; ``import numbanorm.functional as F``.

Each method has three functions: ``batch_norm(...)`` returns y, ``batch_norm_forward(...)``
returns y and what backward needs, ``batch_norm_backward(dy, saved)`` returns the gradients.
They differ in nothing but the axes that they reduce.
"""

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

batch_norm_backward = norm_backward
layer_norm_backward = norm_backward
instance_norm_backward = norm_backward
group_norm_backward = norm_backward
rms_norm_backward = norm_backward
