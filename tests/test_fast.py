"""The fast lane: every layer, layout and kernel against the definition, in seconds.

    NUMBA_DISABLE_JIT=1 pytest -m fast
    NUMBA_DISABLE_JIT=1 pytest -m fast --cov=numbanorm/kernels --cov-report=term-missing

Kernels are Python functions then, and nothing is compiled. Without the variable the same tests run
compiled kernels.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from cases import CASES, DTYPES, FORCED_VIEWS, LAYOUTS, SEVERAL_AXES, by_id, cases, normal
from runs import make_mask, place

from numbanorm.tuning import use

pytestmark = pytest.mark.fast

MASKS = ("none", "empty groups")
MODES = ("train", "eval")
STORES = {
    "cached": {"cache_bytes": None},
    "streamed": {"cache_bytes": 0, "stream_from": 1, "stream_parts_from": 1},
}
# All orders of axes, and two kinds of what is copied.
MEMORY = [
    "Fortran", "channels last in memory", "channels first in memory",
    "outer and inner axis swapped", "every second of each axis", "misaligned",
]  # fmt: skip
# Layouts that a layer takes where its sizes allow it.
FORCED = {
    "as usual": {},
    "pieces": {"slab": 0},
    "pieces in parts": {"slab": 0, "row_part": 8, "column_part": 4},
    "element rows": {"few_groups": 1, "few_samples": 1},
    "element parts": {"long_row": 1, "element_part": 5, "row_part": 7},
    "interleaved group rows": {"short_row": 0, "row_run": 60},
    "group columns": {"many_rows": 1, "column_width": 70},
    "columns, not folded": {"column_fold": 1, "column_width": 2, "long_task": 1},
    "one group at a time": {"run": 1, "group_block": 1, "overlap": 1},
}


def check(case, dtype, mask, mode="train", store="cached", layout="C", **limits):
    """Compare a forward and a backward with the definition."""
    x, dy = (normal(*case.shape, seed=seed, dtype=dtype) for seed in (0, 1))
    mask, start = make_mask(case.shape, mask), 13 if store == "streamed" else None

    def output(like):
        return place(like, start) if layout == "C" else LAYOUTS[layout](np.zeros_like(like))

    with use(**limits, **STORES[store]):
        case.check(
            getattr(case.layer(dtype), mode)(),
            LAYOUTS[layout](x),
            LAYOUTS[layout](dy),
            mask,
            lambda layer, x: layer(x, mask=mask, out=output(x)),
            lambda layer, dy: layer.backward(dy, out=output(dy)),
        )


def in_turn(layers, others, *axes):
    """Return each case with each of the others, and with some choices from all axes.

    With each case, and with each of the others, all choices have their turn.
    """
    choices = list(itertools.product(*axes))
    params = []
    for (i, case), (j, other) in itertools.product(enumerate(layers), enumerate(others)):
        chosen = choices[(i + j) % len(choices)]
        name = "-".join(getattr(c, "__name__", str(c)) for c in (case.id, other, *chosen))
        params.append(pytest.param(case, other, *chosen, id=name))
    return params


@pytest.mark.parametrize(
    ("case", "forced", "dtype", "mask", "store"),
    in_turn(CASES, FORCED, DTYPES, MASKS, STORES),
)
def test_layers(case, forced, dtype, mask, store):
    check(case, dtype, mask, store=store, **FORCED[forced])


@pytest.mark.parametrize(
    ("case", "layout", "dtype", "mask", "mode"),
    in_turn(map(by_id.get, SEVERAL_AXES), MEMORY, DTYPES, MASKS, MODES),
)
def test_memory_layouts(case, layout, dtype, mask, mode):
    check(case, dtype, mask, mode, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("mode", "store"), [("train", "cached"), ("train", "streamed"), ("eval", "streamed")]
)
@pytest.mark.parametrize("forced", FORCED_VIEWS)
def test_kernel_layouts(forced, store, mode, mask, dtype):
    limits, case, shape, _ = FORCED_VIEWS[forced]
    check(replace(by_id[case], shape=shape), dtype, mask, mode, store, **limits)


@pytest.mark.parametrize("dtype", DTYPES)
@cases()
def test_groups_of_all_sizes(case, dtype):
    x, dy = (normal(*case.shape, seed=seed, dtype=dtype) for seed in (0, 1))
    group = case.statistics(case.shape)[0].ids
    x *= 10.0 ** (group % 7 - 3)
    dy *= 10.0 ** (group % 5 - 2)
    case.check(case.layer(dtype), x, dy)
