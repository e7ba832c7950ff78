"""Ratios of times that compare.py measures in turns, so that a machine that drifts does so for all.

More is better; asv.conf.json keeps them out of the regressions.
"""

import os
from typing import Any

import cases
import compare

from . import prepared

CASES = {
    "batch": cases.Case("batch", cases.IMAGES["resnet 56x56"]),
    "switchable": cases.Case("switchable", cases.IMAGES["resnet 56x56"]),
    "layer": cases.Case("layer", cases.ROWS["bert"], "last"),
}
ROUNDS = 1 if os.environ.get("NUMBANORM_BENCH_SMALL") else 3


class _Measured:
    timeout = 300
    # Counted up where what is measured changes.
    version = "1"

    def setup_cache(self) -> dict[str, Any]:
        try:
            prepared.need("numbanorm", "Norm")
        except NotImplementedError:  # asv takes it in setup only, which raises it again
            return {}
        names = [name for name in ("numbanorm", "torch") if compare.installed(name)]
        libraries = compare.start(names)
        rows = {name: compare.measure(case, libraries, ROUNDS) for name, case in CASES.items()}
        for library in libraries:
            library.process.communicate()
        return rows

    setup_cache.timeout = 300

    def setup(self, rows: dict[str, Any], layer: str, _: str) -> None:
        if layer not in rows:
            raise NotImplementedError("this commit has no layers")


class Bound(_Measured):
    """The fewest passes over memory at the speed of a copy, over the time taken into out=."""

    param_names = ("layer", "phase")
    params = (tuple(CASES), compare.PHASES)
    unit = "of the bound"
    version = "2"

    def track_share(self, rows: dict[str, Any], layer: str, phase: str) -> float:
        """Return the median share."""
        return round(float(rows[layer]["bound"][phase]), 3)

    track_share.pretty_name = "Share of memory's speed (more: better)"


class PyTorch(_Measured):
    """PyTorch's time over ours: forward and backward in training, or evaluation into out=."""

    param_names = ("layer", "into")
    params = (tuple(CASES), ("out", "fresh", "evaluate"))
    unit = "times faster"

    def setup(self, rows: dict[str, Any], layer: str, into: str) -> None:
        """Leave it out where PyTorch is missing."""
        super().setup(rows, layer, into)
        if "torch" not in rows[layer]["ratios"]:
            raise NotImplementedError("PyTorch is not installed")

    def track_ratio(self, rows: dict[str, Any], layer: str, into: str) -> float:
        """Return the median of the ratios of pairs."""
        return round(float(rows[layer]["ratios"]["torch"][into]), 2)

    track_ratio.pretty_name = "Times PyTorch's speed (more: better)"
