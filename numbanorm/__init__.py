"""Normalisation layers for training neural networks on CPUs, at the speed that memory allows.

A layer takes and returns NumPy arrays: ``y = layer(x)``, then ``dx = layer.backward(dy)``. All
layers are a :class:`Norm` over axes of their own. :mod:`numbanorm.functional` has the same
without state; :func:`moments` are the statistics alone.
"""

from numbanorm import functional
from numbanorm._threads import get_num_threads, set_num_threads
from numbanorm.inference import fold_conv, fold_linear
from numbanorm.layers import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from numbanorm.moments import Moments, moments
from numbanorm.norm import Norm
from numbanorm.plot import plot_importance
from numbanorm.recalibrate import recalibrate
from numbanorm.switchable import (
    SwitchableNorm,
    SwitchableNorm1d,
    SwitchableNorm2d,
    SwitchableNorm3d,
)

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "Moments",
    "Norm",
    "RMSNorm",
    "SwitchableNorm",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
    "fold_conv",
    "fold_linear",
    "functional",
    "get_num_threads",
    "moments",
    "plot_importance",
    "recalibrate",
    "set_num_threads",
]
