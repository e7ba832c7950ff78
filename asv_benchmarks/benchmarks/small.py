"""What is over in microseconds: the way to the kernels, a hundred times."""

from typing import Any

import cases

from . import by

CASES = {case.name: case for case in cases.SMALL}
CALLS = 100


class Small(by.Prepared):
    """A hundred calls, since asv times a single one after each setup."""

    param_names: Any = ("case",)
    params: Any = (tuple(CASES),)

    def setup(self, case: str, library: str = "numbanorm") -> None:
        """Make the case ready."""
        self.ready(CASES[case], library)

    time_evaluate_100 = by.timed("Small arrays, 100 evaluations", *("evaluate",) * CALLS)
    time_train_and_backward_100 = by.timed(
        "Small arrays, 100 steps", *("train", "backward") * CALLS
    )
