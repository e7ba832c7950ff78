"""Whatever layout takes x, the results are those of the definition.

Which one takes it depends on sizes. Small arrays take them all here, by other limits of tuning.
"""

from dataclasses import replace

import numpy as np
import pytest
from cases import FORCED_VIEWS, SEVERAL_AXES, by_id, cases, normal

import numbanorm as nn
import numbanorm.functional as F
from numbanorm.core.geometry import geometry
from numbanorm.core.groups import number_groups, segments
from numbanorm.core.layouts import (
    LAYOUT_BYTES,
    LAYOUTS,
    ElementParts,
    ElementRows,
    GroupColumns,
    GroupRows,
    find_layout,
    kept,
)
from numbanorm.tuning import tuning, use

# With a mask they are rows.
WITH_MASK = {FORCED_VIEWS["columns with a weight for each row"][-1]: (260, 5)}


@pytest.fixture(params=FORCED_VIEWS)
def forced(request):
    """Set the limits that make a small array take a layout; return its case and view."""
    limits, case, shape, view = FORCED_VIEWS[request.param]
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
    return layer._saved.layout.view


masked = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])


@masked
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_view_is_taken(forced, masked, offset):
    case, view = forced
    assert check(case, masked, offset) == (WITH_MASK.get(view, view) if masked else view)


@pytest.mark.parametrize("width", [1, 7, 64, 1 << 20])
def test_evaluation_does_not_depend_on_how_it_is_cut(forced, width):
    case, _ = forced
    x = normal(*case.shape, dtype=np.float32)
    layer = case.layer(np.float32)
    layer(x)
    expected = layer.eval()(x)
    with use(apply_width=width):
        np.testing.assert_array_equal(layer(x), expected)


@pytest.mark.parametrize("width", [1, 20, 1 << 20])
def test_evaluation_of_short_rows_does_not_depend_on_how_it_is_cut(width):
    x, layer = normal(20, 6, 3, 3), nn.BatchNorm2d(6, dtype=np.float64)
    with use(column_width=9, column_block=9, apply_width=width):
        layer(x)
        layer.eval()
        mean, var = (
            layer.state_dict()[f"running_{name}"].reshape(6, 1, 1) for name in ("mean", "var")
        )
        np.testing.assert_allclose(layer(x), (x - mean) / np.sqrt(var + layer.eps), atol=1e-12)
        assert isinstance(layer._saved.layout, GroupColumns)


@pytest.mark.parametrize(
    ("shape", "groups", "pays"),
    [
        ((64, 512, 7, 7), 32, True),
        ((3, 512, 11, 11), 32, True),
        ((16, 1024, 7, 7), 1, True),
        ((15, 1024, 7, 7), 1, False),  # weights would take a seventh of the room that x takes
        ((3, 4096, 6, 6), 32, False),  # and here two thirds, where y is written by streaming stores
        ((2, 512, 7, 7), 32, False),
        ((64, 512, 12, 12), 32, False),
        ((64, 512, 7, 7), 512, False),
    ],
)
def test_weights_are_repeated_for_elements_where_that_takes_little_room(shape, groups, pays):
    geometry_of_x = geometry(shape, ((1, 2, 3),), (1,), groups=groups)
    layout = find_layout(geometry_of_x, tuple(range(len(geometry_of_x.shape))), affine=True)
    assert type(layout) is (ElementRows if pays else GroupRows)


@pytest.mark.parametrize(
    ("shape", "in_parts"),
    [
        ((1, 64, 56, 56), True),
        ((100, 1 << 15), True),
        ((3, 10**7), True),
        ((300, 1 << 15), False),  # four rows stay in a cache, all of them do not
        ((1, 4096), False),
    ],
)
def test_long_rows_are_in_parts_where_a_cache_holds_all_or_none(shape, in_parts):
    axes = tuple(range(1, len(shape)))
    layout = find_layout(geometry(shape, (axes,), axes), (0, *axes), affine=True)
    assert type(layout) is (ElementParts if in_parts else ElementRows)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_of_long_rows_has_the_parameters_of_forward(activation):
    x, dy = (normal(2, 40, seed=seed, dtype=np.float32) for seed in (0, 1))
    with use(long_row=1, element_part=16):
        layer = nn.LayerNorm(40, activation=activation, dtype=np.float32)
        layer.weight[:], layer.bias[:] = normal(2, 40, seed=2)
        layer(x)
        expected = layer.backward(dy)
        layer(x)
        layer.weight += 1
        layer.bias += 1
        np.testing.assert_array_equal(layer.backward(dy), expected)


def test_gradients_of_long_rows_are_float64_in_functional_and_rounded_once_in_layers():
    x, dy = (normal(3, 40, seed=seed, dtype=np.float32) for seed in (0, 1))
    weight, bias = normal(2, 40, seed=2, dtype=np.float32)
    with use(long_row=1, element_part=16):
        _, saved = F.layer_norm_forward(x, 40, weight, bias)
        gradients = F.layer_norm_backward(dy, saved)
        layer = nn.LayerNorm(40, dtype=np.float32)
        layer.weight[:], layer.bias[:] = weight, bias
        layer(x)
        layer.backward(dy)
    assert gradients.dweight.dtype == gradients.dbias.dtype == np.float64
    for name, exact in (("weight", gradients.dweight), ("bias", gradients.dbias)):
        found = layer.gradients()[name]
        np.testing.assert_array_equal(found, exact.astype(np.float32))
        assert (found != exact).any()


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
    """Compare what is written by streaming stores, wherever a line begins, and by ordinary ones."""
    with use(cache_bytes=None):
        expected = results(layer, x, dy, mask, 0)
    with use(cache_bytes=0):
        for start in (0, 1, 13):
            for found, wanted in zip(results(layer, x, dy, mask, start), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


@masked
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_streaming_stores_give_the_same_bits(forced, masked, training, dtype):
    case, _ = forced
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
    x, dy = (normal(*shape, seed=seed, dtype=np.float32) for seed in (0, 1))
    check_streamed(layer, x, dy, None)


@cases(*SEVERAL_AXES)
@masked
@pytest.mark.usefixtures("forced")
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
    table = number_groups(sizes).table(grid, order)
    first, step = segments(table)
    length = table.shape[1] // max(first.shape[1], 1)
    whole = first[:, :, None] + step[:, None, None] * np.arange(length)
    np.testing.assert_array_equal(whole.reshape(table.shape), table)
    if order == (0, 1, 2, 3) and 0 not in grid:
        assert length >= np.prod(grid[4 - longest :])


def test_layouts_are_kept_in_a_bounded_number_of_bytes():
    layer, most = nn.SwitchableNorm1d(5), 1 << 17
    with use(layouts_bytes=most):
        for n in range(2, 200):
            geometry_of_n = layer._geometry(np.empty((n, 5)))
            layout = find_layout(geometry_of_n, (0, 1), affine=True)
            assert kept.n_bytes == sum(
                other.n_bytes + LAYOUT_BYTES for other in kept.layouts.values()
            )
            assert kept.n_bytes <= most
        assert 3 < len(kept.layouts) < 100
        assert find_layout(geometry_of_n, (0, 1), affine=True) is layout
    with use(layouts_bytes=0):  # one is always kept
        layout = find_layout(geometry_of_n, (1, 0), affine=True)
        assert list(kept.layouts.values()) == [layout]


def test_the_layouts_are_frozen():
    layer, x = nn.BatchNorm2d(4), normal(3, 4, 5, 6)
    layer(x)
    saved = layer._saved
    assert isinstance(saved.layout, LAYOUTS)
    for record, name in ((saved, "x"), (saved.layout, "view"), (saved.layout.tiles, "block")):
        with pytest.raises(AttributeError):
            setattr(record, name, None)


def test_tuning_is_as_before_in_whatever_order_others_end():
    before = tuning()
    a, b = use(slab=1), use(slab=2)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert tuning().slab == 2
    b.__exit__(None, None, None)
    assert tuning() is before
