"""Types of arguments."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Axes = tuple[int, ...]
Float64 = NDArray[np.float64]
