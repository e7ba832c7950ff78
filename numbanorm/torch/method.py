"""What a layer normalises over and how, and the sizes that follow from it."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# LayerNorm's and RMSNorm's statistics, those of rows: one alone, over trailing axes.
ROWS = ("rows", "rms")


class Method(NamedTuple):
    """The names of the statistics, and how x is normalised with them."""

    # Any of "in", "ln", "bn" and "gn", or one of ROWS.
    statistics: tuple[str, ...]
    eps: float
    num_groups: int = 1  # of "gn"
    row_axes: int = 0  # how many trailing axes a row has
    sample_variance: bool = False  # of the instances
    process_group: str = ""  # the name of the one that shares the statistics

    def arguments(self) -> tuple[str, int, float, bool, str]:
        """Return what the operators take for it: their schemas have plain values only."""
        number = self.row_axes if of_rows(self) else self.num_groups
        names = ",".join(self.statistics)
        return names, number, self.eps, self.sample_variance, self.process_group


def method_of(
    over: str, number: int, eps: float, sample_variance: bool, process_group: str
) -> Method:
    """Return the method of these arguments of an operator."""
    if over in ROWS:
        return Method((over,), eps, 1, number, sample_variance, process_group)
    return Method(tuple(over.split(",")), eps, number, 0, sample_variance, process_group)


def of_rows(method: Method) -> bool:
    """Tell whether statistics are those of rows."""
    return method.statistics[0] in ROWS


def feature_shape(x: Tensor, method: Method) -> torch.Size:
    """Return the shape of weight and bias."""
    return x.shape[x.dim() - method.row_axes :] if of_rows(method) else x.shape[1:2]


def group_counts(x: Tensor, method: Method) -> list[int]:
    """Return how many groups each statistic of x has."""
    if of_rows(method):
        return [math.prod(x.shape[: x.dim() - method.row_axes])]
    n, c = x.shape[:2]
    counts = {"in": n * c, "ln": n, "bn": c, "gn": n * method.num_groups}
    return [counts[name] for name in method.statistics]


def tracked(method: Method) -> int:
    """Return which of the statistics has running averages."""
    names = method.statistics
    return names.index("bn") if "bn" in names else 0


def tracked_part(statistics: Tensor, x: Tensor, method: Method) -> Any:
    """Return the packed statistic that has running averages, (4, groups)."""
    counts, k = group_counts(x, method), tracked(method)
    return statistics.narrow(1, sum(counts[:k]), counts[k])


def has_instances(x: Any, method: Method) -> bool:
    """Tell whether the instances' own statistics are packed with the others."""
    return method.sample_variance and math.prod(x.shape[2:]) > 1
