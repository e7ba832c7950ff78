"""Whatever view of x a plan takes, the results are those of the definition.

Which one it takes depends on sizes. Small arrays take them all here, as the limits are others.
"""

from dataclasses import replace

import numpy as np
import pytest
from cases import CASES, by_id, cases, normal

import numbanorm as nn
from numbanorm.core.geometry import geometry, groups
from numbanorm.tuning import LONG_BUFFER_UP_TO, use

# For each, the limits, a case and a shape that then take the view.
PLANS = {
    "pieces": ({"slab": 0}, "BatchNorm2d", (3, 4, 5, 6), (12, 30)),
    "pieces in parts": ({"slab": 0, "row_part": 8}, "BatchNorm2d", (3, 4, 5, 6), (12, 30)),
    "long pieces": ({"slab": 0}, "BatchNorm2d", (2, 4, 40, 41), (8, 1640)),
    "pieces that are columns": ({"slab": 0}, "BatchNorm2d-last", (3, 5, 6, 4), (1, 18, 20)),
    "columns in parts": (
        {"slab": 0, "column_part": 4}, "BatchNorm2d-last", (3, 5, 6, 4), (1, 18, 20)
    ),
    "rows next to each other": (
        {"few_rows": 4, "group_block": 50}, "GroupNorm", (3, 6, 4, 5), (6, 3, 1, 20)
    ),
    "long rows next to each other": ({}, "GroupNorm", (3, 6, 16, 20), (6, 3, 1, 320)),
    "rows next to each other, one group at a time": (
        {"few_rows": 4, "group_block": 1, "overlap": 59}, "GroupNorm", (3, 6, 4, 5), (6, 3, 1, 20)
    ),
    "rows with a weight for each element": (
        {"group_block": 190}, "GroupNorm", (17, 6, 4, 5), (34, 60)
    ),
    "rows with a weight for each element, one at a time": (
        {"group_block": 1, "overlap": 59}, "GroupNorm", (17, 6, 4, 5), (34, 60)
    ),
    "rows with a weight for each element, those with the same ones in turn": (
        {"run": 1, "group_block": 1}, "GroupNorm", (17, 6, 4, 5), (34, 60)
    ),
    "rows with a weight for each element, two of each sample in turn": (
        {"run": 60, "group_block": 120}, "GroupNorm", (17, 6, 4, 5), (34, 60)
    ),
    "rows apart": (
        {"short_row": 0, "row_run": 60}, "BatchNorm2d", (3, 4, 5, 6), (1, 3, 4, 30)
    ),
    "rows apart, several times": (
        {"short_row": 0, "row_run": 60}, "Norm-apart", (3, 4, 5, 6), (3, 4, 5, 6)
    ),
    "across rows": (
        {"many_rows": 1, "column_width": 70}, "BatchNorm2d", (3, 4, 5, 6), (1, 3, 120)
    ),
    "columns": (
        {"column_fold": 1, "column_width": 2, "long_task": 1},
        "BatchNorm2d-last", (3, 5, 6, 4), (1, 90, 4),
    ),
    "columns, folded": ({"column_fold": 12}, "BatchNorm2d-last", (3, 5, 6, 4), (1, 30, 12)),
    "columns with a weight for each row": (
        {"column_run": 64}, "Norm-columns", (3, 6, 15, 13), (3, 6, 195)
    ),
    "groups of columns": ({"column_fold": 1}, "GroupNorm-last", (3, 8, 8, 6), (3, 64, 6)),
    "groups of columns, folded": ({}, "GroupNorm-last", (3, 8, 8, 6), (3, 16, 24)),
}  # fmt: skip
# With a mask they are rows.
WITH_MASK = {PLANS["columns with a weight for each row"][-1]: (585, 6)}
MASKABLE = [case.id for case in CASES if case.id != "LayerNorm-no-batch"]


@pytest.fixture(params=PLANS)
def plan(request):
    """Set the limits."""
    limits, case, shape, view = PLANS[request.param]
    with use(parallel_from=0, **limits):  # the tasks are shared out
        yield replace(by_id[case], shape=shape), view


def check(case, masked, offset=0.0):
    x = normal(*case.shape, dtype=np.float32, offset=offset)
    dy = normal(*case.shape, seed=1, dtype=np.float32)
    mask = None
    if masked:
        # Some groups have nothing, or nothing in their first rows or columns.
        mask = normal(*case.shape, seed=2) < 0.0
        mask[:, 0] = mask[..., 0] = False
    layer = case.layer(np.float32)
    case.check(layer, x, dy, mask)
    if not offset:
        case.check(layer.eval(), x, dy, mask)
    y = layer.train()(x, mask=mask)
    in_place = x.copy()
    np.testing.assert_array_equal(layer(in_place, mask=mask, out=in_place), y)
    return layer._saved.plan.view


masked = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])


@masked
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_view_is_taken(plan, masked, offset):
    case, view = plan
    assert check(case, masked, offset) == (WITH_MASK.get(view, view) if masked else view)


@pytest.mark.parametrize(
    ("shape", "groups", "pays"),
    [
        ((64, 512, 7, 7), 32, True),
        ((3, 512, 11, 11), 32, True),
        ((16, 1024, 7, 7), 1, True),
        ((15, 1024, 7, 7), 1, False),  # weights would take a seventh of the room that x takes
        ((3, 4096, 6, 6), 32, False),  # and here two thirds, where y is written past the caches
        ((2, 512, 7, 7), 32, False),
        ((64, 512, 12, 12), 32, False),
        ((64, 512, 7, 7), 512, False),
    ],
)
def test_weights_are_repeated_for_elements_where_that_takes_little_room(shape, groups, pays):
    found = geometry(shape, ((1, 2, 3),), (1,), groups=groups)
    plan = found.plan(tuple(range(len(found.shape))), affine=True)
    assert plan.by_group
    assert plan.elements == pays


def results(layer, x, dy, mask, start):
    """Return y, dx and what else there is, the first two written where a line does not begin."""
    outputs = []
    calls = (
        (x, lambda out: layer(x, mask=mask, out=out)),
        (dy, lambda out: layer.backward(dy, out=out)),
    )
    for array, call in calls:
        memory = np.full(array.size + 99, 7, array.dtype)
        out = memory[start : start + array.size].reshape(array.shape)
        call(out)
        np.testing.assert_array_equal(memory[:start], 7)
        np.testing.assert_array_equal(memory[start + array.size :], 7)
        outputs.append(out)
    gradients = layer.gradients()
    layer.zero_grad()
    return outputs + [gradients[name] for name in gradients]


def check_streamed(layer, x, dy, mask):
    """Compare what is written by streaming stores, wherever a line begins, with what is not."""
    with use(cache_bytes=None):
        expected = results(layer, x, dy, mask, 0)
    with use(cache_bytes=0):
        for start in (0, 1, 13):
            for found, wanted in zip(results(layer, x, dy, mask, start), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


@masked
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_streaming_stores_give_the_same_bits(plan, masked, training, dtype):
    case, _ = plan
    x, dy = (normal(*case.shape, seed=seed, dtype=dtype) for seed in (0, 1))
    mask = normal(*case.shape, seed=2) < 0.5 if masked else None
    layer = case.layer(dtype).train(training)
    with use(stream_from=1, stream_parts_from=1):
        check_streamed(layer, x, dy, mask)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(3001, dtype=np.float32), (1400, 3001)),
        (nn.InstanceNorm1d(700, affine=True, dtype=np.float32), (2, 700, 3001)),
        (nn.BatchNorm1d(2, dtype=np.float32), (1400, 2, 1501)),
    ],
    ids=str,
)
def test_streaming_stores_of_large_arrays_give_the_same_bits(layer, shape):
    # They are written in shorter runs than small ones, see tuning.BUFFER.
    x, dy = (normal(*shape, seed=seed, dtype=np.float32) for seed in (0, 1))
    assert x.size >= LONG_BUFFER_UP_TO
    check_streamed(layer, x, dy, None)


@cases(*MASKABLE)
@masked
@pytest.mark.usefixtures("plan")
def test_definition(case, masked):
    check(case, masked)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (0, 3, 1, 2)])
@pytest.mark.parametrize(
    "grid", [(3, 4, 5, 2), (1, 6, 1, 2), (4, 1, 1, 1), (1, 1, 1, 1), (2, 0, 3, 1)]
)
@pytest.mark.parametrize(
    ("kept", "longest"),
    [
        # Everything, nothing, and the first axis alone: all of it is one segment, or each of the
        # first axis where that is in the order of memory.
        ([(0, 1, 2, 3)], 4),
        ([()], 4),
        ([(0, 1, 2, 3), (0,)], 3),
        ([(1, 2), (3,)], 1),
    ],
)
def test_segments_are_the_table(order, grid, kept, longest):
    sizes = [tuple(n if axis in axes else 1 for axis, n in enumerate(grid)) for axes in kept]
    found = groups(grid, order, sizes)
    first, step = found.segments
    table = found.of_piece
    length = table.shape[1] // max(first.shape[1], 1)
    whole = first[:, :, None] + step[:, None, None] * np.arange(length)
    np.testing.assert_array_equal(whole.reshape(table.shape), table)
    if order == (0, 1, 2, 3) and 0 not in grid:
        assert length >= np.prod(grid[4 - longest :])
