"""The memory of outputs: used again, and never while somebody has it."""

import copy
import ctypes
import gc
import threading

import numpy as np
import pytest
from cases import normal
from children import run

import numbanorm as nn
from numbanorm import functional as F
from numbanorm.core import memory as _memory
from numbanorm.numba_ext.lines import LINE
from numbanorm.tuning import use

SHAPE = 8, 4, 128, 96
LAYERS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d-last": lambda: nn.BatchNorm2d(96, axis=-1),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm": lambda: nn.LayerNorm(96),
    "RMSNorm": lambda: nn.RMSNorm(96),
    "SwitchableNorm2d": lambda: nn.SwitchableNorm2d(4),
    "Norm": lambda: nn.Norm((0, 3)),
}


def array(*shape, seed=0, dtype=np.float32):
    return normal(*shape, seed=seed).astype(dtype)


def address(y):
    return y.ctypes.data


@pytest.fixture(autouse=True)
def arrays():
    """Nothing is kept before a test, nor after it."""
    gc.collect()  # layers of other tests, which would keep it
    _memory.arrays.clear()
    with use(recycle_arrays_from=1 << 20):
        yield _memory.arrays
    _memory.arrays.clear()


def n_kept(arrays):
    return sum(memory.n_bytes for memory in arrays._kept)


@pytest.fixture
def layer():
    return nn.BatchNorm2d(4)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_take_the_memory_of_those_that_are_gone(name):
    layer, x, dy = LAYERS[name](), array(*SHAPE), array(*SHAPE, seed=1)
    found = []
    for _ in range(2):
        y = layer(x)
        dx = layer.backward(dy)
        found.append((address(y), address(dx), y.copy(), dx.copy()))
        # In this order: what was used last is taken first.
        del dx
        del y
    (y_at, dx_at, y, dx), (y_again_at, dx_again_at, y_again, dx_again) = found
    assert {y_again_at, dx_again_at} == {y_at, dx_at}
    np.testing.assert_array_equal(y_again, y)
    np.testing.assert_array_equal(dx_again, dx)


HOLD = {
    "array": lambda y: y,
    "view": lambda y: y[1:, ::2],
    "reshaped": lambda y: y.reshape(-1)[1000:],
    "other type": lambda y: y.view(np.uint32),
    "memoryview": lambda y: memoryview(y),
    "DLPack": lambda y: np.from_dlpack(y),
    "buffer": lambda y: np.frombuffer(y, np.float32),
    "pointer": lambda y: y.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
    "base": lambda y: y.base,
}


def values(held):
    """Return a copy of what somebody has, of a pointer the first elements."""
    return np.array(held[:5] if isinstance(held, ctypes._Pointer) else held)


@pytest.mark.parametrize("how", HOLD)
def test_what_somebody_has_stays_as_it_is(layer, how):
    y = layer(array(*SHAPE))
    at, held = address(y), HOLD[how](y)
    before = values(held)
    del y
    for seed in (1, 2):
        assert address(layer(array(*SHAPE, seed=seed))) != at
    np.testing.assert_array_equal(values(held), before)
    del held
    both = [layer(array(*SHAPE)) for _ in range(2)]
    assert at in [address(y) for y in both]


def test_what_backward_needs_stays_as_it_is(layer):
    # The first layer's y is the second one's x, which nobody else has.
    second, dy = nn.LayerNorm(96), array(*SHAPE, seed=1)
    x, expected = array(*SHAPE), nn.LayerNorm(96)
    expected(layer(x).copy())
    second(layer(x))
    others = [layer(array(*SHAPE, seed=seed)) for seed in (2, 3)]
    np.testing.assert_array_equal(second.backward(dy), expected.backward(dy))
    assert len({address(y) for y in others}) == 2


def test_types_and_shapes_of_the_same_size_share_memory(layer, arrays):
    at = address(layer(array(*SHAPE)))
    assert address(layer(array(4, 4, 96, 256))) == at
    y = layer(array(4, 4, 128, 96, dtype=np.float64))
    assert address(y) == at
    assert y.dtype == np.float64
    assert y.flags.c_contiguous
    assert y.flags.aligned
    assert y.flags.writeable
    assert len(arrays._kept) == 1


@pytest.mark.parametrize("n", [7, 9])
def test_an_output_holds_no_more_than_its_own_size(layer, n):
    layer(array(*SHAPE))
    y = layer(array(n, 4, 128, 96))
    assert y.base.nbytes <= y.nbytes + _memory.PAGE


def test_outputs_begin_where_lines_do_and_elsewhere_in_a_page(layer):
    held = [layer(array(*SHAPE)) for _ in range(4)]
    places = [address(y) % _memory.PAGE for y in held]
    assert sorted(places) == [0, 1024, 2048, 3072]
    assert all(place % LINE == 0 for place in places)


def test_small_outputs_are_left_to_malloc(layer, arrays):
    y = layer(array(2, 4, 8, 8))
    assert n_kept(arrays) == 0
    assert y.base is None


def test_functions_keep_nothing(arrays):
    x = array(*SHAPE)
    y, saved = F.layer_norm_forward(x, 96)
    dx, *_ = F.layer_norm_backward(x, saved)
    assert n_kept(arrays) == 0
    assert y.base is None
    assert dx.base is None


def test_no_more_is_kept_than_was_in_use_at_one_time(layer, arrays):
    most = 0
    for step in np.random.default_rng(0).integers(90, 150, (20, 5)):
        held = [layer(array(8, 4, 96, n)) for n in step]
        most = max(most, sum(y.nbytes for y in held))
        assert sum(y.nbytes for y in held) <= n_kept(arrays) <= most
        del held
    assert n_kept(arrays) <= arrays._most_in_use


def test_what_is_not_used_any_more_goes_back(layer, arrays):
    held = [layer(array(*SHAPE)) for _ in range(4)]
    del held
    assert len(arrays._kept) == 4
    x = array(*SHAPE)
    for _ in range(5 * _memory.USED_WITHIN):
        layer(x)
    assert len(arrays._kept) == 1
    assert arrays._most_in_use == n_kept(arrays)


def test_the_last_network_takes_its_memory_with_it(arrays):
    network = [nn.BatchNorm2d(4), nn.LayerNorm(96)]
    y = network[1](network[0](array(*SHAPE)))
    before = y.copy()
    assert n_kept(arrays) > 0
    del network
    gc.collect()
    assert n_kept(arrays) == 0
    np.testing.assert_array_equal(y, before)


def test_a_layer_that_goes_leaves_the_memory_of_others(layer, arrays):
    others = [make() for make in LAYERS.values()]
    at = address(layer(array(*SHAPE)))
    for other in others:
        other(array(*SHAPE))
    del other, others
    with pytest.raises(TypeError):
        nn.BatchNorm2d("four")
    with pytest.raises(TypeError):
        nn.LayerNorm()
    gc.collect()
    assert n_kept(arrays) > 0
    assert address(layer(array(*SHAPE))) == at


def test_a_copy_of_a_layer_does_without_its_memory(layer):
    y = layer(array(*SHAPE))
    twin = copy.deepcopy(layer)
    assert not np.shares_memory(twin(array(*SHAPE)), y)


def test_bad_input_costs_no_memory(layer, arrays):
    at = address(layer(array(*SHAPE)))
    for wrong in ({"mask": np.zeros(3, int)}, {"out": np.zeros(3, np.float32)}):
        with pytest.raises((TypeError, ValueError)):
            layer(array(*SHAPE), **wrong)
    assert address(layer(array(*SHAPE))) == at
    assert len(arrays._kept) == 1


def test_of_two_that_find_the_same_memory_one_has_it(layer, arrays, monkeypatch):
    layer(array(*SHAPE))
    (memory,) = arrays._kept
    monkeypatch.setattr(arrays, "find", lambda *_: memory)
    first, second = (layer(array(*SHAPE, seed=seed)) for seed in (1, 2))
    assert np.shares_memory(first, memory.bytes)
    assert not np.shares_memory(first, second)


def steps(seed):
    """Return the sums of outputs and gradients of some steps; batches differ in size."""
    layers, found = [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(96)], []
    for step in range(12):
        x = array(10 - step % 3, 4, 128, 96, seed=seed + step)
        for layer in layers:
            x = layer(x)
        dy = np.sin(x)
        for layer in reversed(layers):
            dy = layer.backward(dy)
        found.append((float(x.sum(dtype=float)), float(np.abs(dy).sum(dtype=float))))
    return found


def test_threads_do_not_take_each_others_memory():
    expected, found = [steps(seed) for seed in range(4)], {}

    def work(seed):
        found[seed] = steps(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == expected


def test_without_recycling(layer, arrays):
    with use(recycle=False):
        y = layer(array(*SHAPE))
        assert y.base is None
        del y
        layer(array(*SHAPE))
    assert n_kept(arrays) == 0


def print_what_is_kept():
    layer = nn.BatchNorm2d(4)
    y = layer(array(8, 4, 256, 256))
    print(n_kept(_memory.arrays) == y.nbytes, y.base is None)


@pytest.mark.parametrize(
    ("value", "expected"), [("0", "False True"), ("1", "True False"), ("", "True False")]
)
def test_the_switch(value, expected):
    assert run(print_what_is_kept, NUMBANORM_RECYCLE=value).strip() == expected
