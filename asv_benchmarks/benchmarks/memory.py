"""Peak memory; what a pass needs is the difference to the reference, which has the arrays only."""

from typing import Any

import cases
import numpy as np

from . import prepared

CASES = {
    "batch": cases.Case("batch", cases.IMAGES["resnet 56x56"]),
    "switchable": cases.Case("switchable", cases.IMAGES["resnet 56x56"]),
    "layer": cases.Case("layer", cases.ROWS["bert"], "last"),
}


class Peak:
    """x and dy, and into out= y and dx as well, are there from the start."""

    param_names = ("layer", "into")
    params = (tuple(CASES), ("out=", "fresh memory"))
    timeout = 120

    def setup(self, layer: str, into: str) -> None:
        """Compile and compare on a slice, which leaves no trace in the peak, then allocate."""
        case = CASES[layer]
        part = case._replace(shape=(max(1, case.shape[0] // 16), *case.shape[1:]))
        prepared.runner(part, fresh=into != "out=")
        prepared.runner.cache_clear()
        self.layer = cases.numbanorm_layer(part)
        # In place, unlike case.data(), whose own peak would hide what follows.
        rng = np.random.default_rng(0)
        self.x, self.dy = (rng.standard_normal(case.shape, dtype="float32") for _ in range(2))
        self.y, self.dx = (
            (np.ones_like(self.x), np.ones_like(self.x)) if into == "out=" else (None, None)
        )

    # Counted up where what is measured changes.
    version = "1"

    def peakmem_reference(self, *_: Any) -> None:
        """Do nothing."""

    def peakmem_forward(self, *_: Any) -> None:
        """Forward in training."""
        self.kept = self.layer.forward(self.x, out=self.y)

    def peakmem_forward_and_backward(self, *_: Any) -> None:
        """Forward in training, then backward."""
        self.kept = self.layer.forward(self.x, out=self.y)
        self.layer.backward(self.dy, out=self.dx)

    peakmem_reference.pretty_name = "Peak memory: the arrays alone"
    peakmem_forward.pretty_name = "Peak memory: forward"
    peakmem_forward_and_backward.pretty_name = "Peak memory: forward, backward"
