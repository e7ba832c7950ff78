"""Layers: :class:`Norm`, its declarations for each method, and SwitchableNorm."""

import sys

from numbanorm.core import geometry
from numbanorm.layers import norm, switchable
from numbanorm.layers.norm import Norm
from numbanorm.layers.standard import (
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
from numbanorm.layers.switchable import (
    SwitchableNorm,
    SwitchableNorm1d,
    SwitchableNorm2d,
    SwitchableNorm3d,
)

# Where pickles that version 0.1.0 made look for classes.
sys.modules["numbanorm.norm"] = norm
sys.modules["numbanorm.switchable"] = switchable
sys.modules["numbanorm._axes"] = geometry

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
    "Norm",
    "RMSNorm",
    "SwitchableNorm",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
]
