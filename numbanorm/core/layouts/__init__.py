"""Layouts: small frozen objects that say whether they fit, how they see x, and how they run.

=============== ============ ========================================= ==========================
layout          view         what is reduced                           for example
=============== ============ ========================================= ==========================
ElementParts    (M, D)       parts of long rows; each element has a weight  LayerNorm of images
ElementRows     (M, D)       a row; each element has a weight          LayerNorm, RMSNorm
ElementColumns  (A, D, B)    a column; each row has a weight           LayerNorm over channels
GroupRows       (A, R, B, L) R rows, each with a weight, in a cache    GroupNorm, small BatchNorm
GroupColumns    (A, L, C)    some columns, in a cache                  the same, channels last
PieceRows       (P, L)       pieces, which merge into groups           SwitchableNorm, BatchNorm
PieceColumns    (A, L, C)    the same                                  the same, channels last
=============== ============ ========================================= ==========================

The first that fits is taken.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable

from numbanorm.core.geometry import Geometry
from numbanorm.core.layouts.base import (
    Arrangement,
    Gradients,
    Instances,
    Job,
    Layout,
    Recipe,
    Saved,
    Statistic,
    Statistics,
    finish_target,
)
from numbanorm.core.layouts.elements import ElementColumns, ElementParts, ElementRows
from numbanorm.core.layouts.groups import GroupColumns, GroupRows
from numbanorm.core.layouts.pieces import PieceColumns, PieceRows
from numbanorm.core.types import Axes
from numbanorm.numba_ext.threads import hold_while_forking
from numbanorm.tuning import tuning

__all__ = [
    "LAYOUTS",
    "Gradients",
    "Instances",
    "Job",
    "Layout",
    "Recipe",
    "Saved",
    "Statistic",
    "Statistics",
    "find_layout",
    "finish_target",
]

LAYOUTS: tuple[type[Layout], ...] = (
    ElementParts, ElementRows, ElementColumns, GroupRows, GroupColumns, PieceRows, PieceColumns,
)  # fmt: skip

# Bytes of a layout without its tables, and of its geometry.
LAYOUT_BYTES = 4096


class _Kept:
    """Layouts that were found before, in a bounded number of bytes; the oldest go first."""

    def __init__(self) -> None:
        self.layouts: OrderedDict[Hashable, Layout] = OrderedDict()
        self.n_bytes = 0
        self.lock = threading.Lock()

    def add(self, key: Hashable, layout: Layout, most: int) -> None:
        """Keep one more, and no more than so many bytes unless it is alone."""
        n_bytes = layout.n_bytes + LAYOUT_BYTES  # now, as tables take long to make
        with self.lock:
            if key in self.layouts:  # another thread was faster
                return
            self.layouts[key] = layout
            self.n_bytes += n_bytes
            while self.n_bytes > most and len(self.layouts) > 1:
                _, oldest = self.layouts.popitem(last=False)
                self.n_bytes -= oldest.n_bytes + LAYOUT_BYTES


kept = _Kept()
hold_while_forking(kept.lock)


def find_layout(
    geometry: Geometry,
    order: Axes,
    affine: bool,
    masked: bool = False,
    whole_groups: bool = True,
) -> Layout:
    """Return the layout for axes of this order in memory, with or without parameters and mask.

    If not ``whole_groups``, it is one of pieces, also where whole groups could be handled at once.
    What is found is kept, in as many bytes as ``tuning.layouts_bytes`` says.
    """
    in_force = tuning()
    key = geometry, order, affine, masked, whole_groups, in_force
    layout = kept.layouts.get(key)
    if layout is None:
        axes = Arrangement(geometry, order, affine, masked, whole_groups, in_force)
        layout = next(fit for layout in LAYOUTS if (fit := layout.fit(axes)) is not None)
        kept.add(key, layout, in_force.layouts_bytes)
    return layout
