"""The same layers for PyTorch on the CPU: ``model = numbanorm.torch.convert(model)``.

Each layer is a subclass of PyTorch's of the same name with a ``forward`` of its own, so that
state dicts, checkpoints, hooks and ``isinstance`` are as before. All of them call one operator,
``numbanorm::normalize``, whose derivative is another, ``numbanorm::normalize_backward``. Tensors
are seen as arrays, without a copy and in their own order in memory (``channels_last``). The
gradient of x is written over that of y where nobody else has it, by hook, name or memory. The
memory of outputs is kept for other outputs when nobody has it any more.

Kernels run on PyTorch's threads where it brings GNU OpenMP with it; Numba's threading layer is left
as it is.

Other devices and types, forward-mode and second derivatives are left to PyTorch's own code.
:func:`fuse` has norm, addition and activation done in one pass.
"""

from pathlib import Path

import torch

from numbanorm.numba_ext import threads
from numbanorm.torch.convert import convert, convert_switchable, revert
from numbanorm.torch.fuse import fuse
from numbanorm.torch.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    SyncBatchNorm,
)
from numbanorm.torch.norm import Norm
from numbanorm.torch.rows import LayerNorm, LayerNorm2d, RMSNorm
from numbanorm.torch.summary import summary
from numbanorm.torch.switchable import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "Norm",
    "RMSNorm",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
    "SyncBatchNorm",
    "convert",
    "convert_switchable",
    "fuse",
    "revert",
    "summary",
]

# Pickles and reprs name what is public by this module.
for _name in __all__:
    globals()[_name].__module__ = __name__

# PyTorch for Linux brings GNU OpenMP with it: the threads that wait for PyTorch's next operation,
# and keep the cores busy with it, are those that run ours.
threads.use_openmp(Path(torch.__file__).parent.glob("lib/libgomp*"))
