"""What is over in microseconds: the way to the kernels, a hundred times."""

from typing import Any

import cases

from . import by

CASES = {case.name: case for case in cases.SMALL}


class Small(by.Prepared):
    """A hundred calls, since asv times a single one after each setup."""

    param_names = ("case", "library")
    params = (tuple(CASES), ("numbanorm", "torch"))

    def setup(self, case: str, library: str) -> None:
        """Make the case ready."""
        self.ready(CASES[case], library)

    def time_evaluate_100(self, *_: Any) -> None:
        """Time forwards in evaluation."""
        for _call in range(100):
            self.runner.evaluate()

    def time_train_and_backward_100(self, *_: Any) -> None:
        """Time forwards in training, each with its backward."""
        for _call in range(100):
            self.runner.train()
            self.runner.backward()
