"""Normalisation layers for training neural networks on CPUs, at the speed that memory allows.

A layer takes and returns NumPy arrays of float32 or float64; ``backward`` returns the gradient of
its input and adds up those of its parameters:

>>> import numpy as np
>>> import numbanorm
>>> layer = numbanorm.BatchNorm1d(2, eps=0.0)
>>> layer(np.array([[1.0, 10.0], [3.0, 30.0]]))
array([[-1., -1.],
       [ 1.,  1.]])
>>> layer.backward(np.array([[1.0, 0.0], [0.0, 0.0]])).shape
(2, 2)
>>> layer.gradients()["bias"]
array([1., 0.], dtype=float32)

Layers; those with 1d, 2d and 3d at the end, as in PyTorch, check the rank of their input

- ``Norm``: over any axes; all other layers are one with axes of their own
- ``BatchNorm``, ``BatchNorm1d``, ``BatchNorm2d``, ``BatchNorm3d``: each channel over the batch
- ``InstanceNorm``, ``InstanceNorm1d``, ``InstanceNorm2d``, ``InstanceNorm3d``: each channel of
  each sample
- ``GroupNorm``: each sample over groups of channels
- ``LayerNorm``: each sample over its trailing axes, with a weight for each element
- ``RMSNorm``: the same without a mean
- ``SwitchableNorm``, ``SwitchableNorm1d``, ``SwitchableNorm2d``, ``SwitchableNorm3d``: learns how
  much of each statistic to use

Functions

- ``moments``: count, mean and second moment over any axes in one pass, as ``Moments``, which merge
- ``recalibrate``: exact pooled statistics of some batches instead of running averages
- ``fold_linear``, ``fold_conv``: a BatchNorm made part of the layer before it, for evaluation
- ``plot_importance``: draws what every SwitchableNorm of a model uses
- ``sum_gradients``: adds the gradients of processes up that train together, see ``comm=``
- ``set_num_threads``, ``get_num_threads``: how many threads; results do not depend on it

Modules

- ``numbanorm.functional``: the same methods without state
- ``numbanorm.dask``: ``moments`` of a Dask array
- ``numbanorm.jit``: functions that the user's own ``@njit`` code may call
- ``numbanorm.sklearn``: ``Standardizer``, a transformer for scikit-learn
- ``numbanorm.torch``: layers for PyTorch on the CPU; ``convert`` puts them into a model
"""

from numbanorm import functional, jit
from numbanorm.gradients import sum_gradients
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
    Norm,
    RMSNorm,
    SwitchableNorm,
    SwitchableNorm1d,
    SwitchableNorm2d,
    SwitchableNorm3d,
)
from numbanorm.moments import Moments, moments
from numbanorm.numba_ext.threads import get_num_threads, set_num_threads
from numbanorm.plot import plot_importance
from numbanorm.recalibrate import recalibrate

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
    "jit",
    "moments",
    "plot_importance",
    "recalibrate",
    "set_num_threads",
    "sum_gradients",
]
