"""The memory of outputs under PyTorch: used again, and never while somebody has it."""

import copy
import gc
import io
import threading

import numpy as np
import pytest
from cases import normal
from children import run

from numbanorm.core.memory import USED_WITHIN
from numbanorm.tuning import tuning, use

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")
from numbanorm.torch import memory  # noqa: E402

SHAPE = 8, 4, 128, 96
LAYERS = {
    "BatchNorm2d": lambda: ours.BatchNorm2d(4),
    "InstanceNorm2d": lambda: ours.InstanceNorm2d(4),
    "GroupNorm": lambda: ours.GroupNorm(2, 4),
    "LayerNorm": lambda: ours.LayerNorm(96),
    "RMSNorm": lambda: ours.RMSNorm(96),
    "SwitchableNorm2d": lambda: ours.SwitchableNorm2d(4),
}
FORMS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda x: torch.cat([x, x], 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def tensor(*shape, seed=0, dtype=torch.float32):
    return torch.tensor(normal(*shape, seed=seed)).to(dtype)


@pytest.fixture(autouse=True)
def outputs():
    """Nothing is kept before a test, nor after it."""
    gc.collect()  # layers of other tests, which would keep it
    memory.outputs.clear()
    yield memory.outputs
    memory.outputs.clear()


def n_kept(outputs):
    return sum(kept.n_bytes for kept in outputs._kept)


@pytest.fixture
def layer():
    return ours.BatchNorm2d(4)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_output_takes_the_memory_of_one_that_is_gone(name, grad):
    layer, x = LAYERS[name](), tensor(*SHAPE)
    with torch.set_grad_enabled(grad):
        y = layer(x)
        expected, address = y.clone(), y.data_ptr()
        del y
        again = layer(x)
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


HOLD = {
    "tensor": lambda y: y,
    "detached": lambda y: y.detach(),
    "view": lambda y: y[1:, ::2],
    "array": lambda y: y.detach().numpy(),
    "DLPack": lambda y: np.from_dlpack(y.detach()),
    "memory": lambda y: y.untyped_storage(),
    "graph": lambda y: (y * y).grad_fn,
    "loss": lambda y: (y * y).sum(),
}


def values(held):
    """Return what is in memory that somebody has."""
    if isinstance(held, torch.UntypedStorage):
        held = torch.empty(0).set_(held)
    elif not isinstance(held, (torch.Tensor, np.ndarray)):
        held = held._saved_self
    return torch.as_tensor(held).detach().clone()


@pytest.mark.parametrize("how", HOLD)
def test_what_somebody_has_stays_as_it_is(layer, how):
    y = layer(tensor(*SHAPE))
    address = y.data_ptr()
    held = HOLD[how](y)
    before = values(held)
    del y
    for seed in (1, 2):
        assert layer(tensor(*SHAPE, seed=seed)).data_ptr() != address
    assert torch.equal(values(held), before)
    del held
    both = [layer(tensor(*SHAPE)) for _ in range(2)]
    # NumPy marks memory as not resizable, for good.
    assert (address in [y.data_ptr() for y in both]) == (how != "array")
    assert all(y.untyped_storage().resizable() for y in both)


def test_memory_that_processes_share_is_not_kept(layer, outputs):
    y = layer(tensor(*SHAPE))
    y.detach().share_memory_()
    del y
    assert not layer(tensor(*SHAPE)).is_shared()
    assert not any(kept.tensor.is_shared() for kept in outputs._kept)


@pytest.mark.parametrize("name", ["BatchNorm2d", "LayerNorm"])
@pytest.mark.parametrize("form", FORMS)
def test_an_output_has_the_form_that_it_would_have(name, form, outputs):
    layer = LAYERS[name]()
    x = FORMS[form](tensor(*SHAPE))
    theirs = torch.nn.BatchNorm2d(4) if name == "BatchNorm2d" else torch.nn.LayerNorm(96)
    expected = theirs(x)
    for _ in range(2):
        y = layer(x)
        assert torch.allclose(y, expected, atol=1e-5)
        assert y.stride() == torch.empty_like(x).stride() or name == "LayerNorm"
        assert y.is_contiguous() or name == "BatchNorm2d"
        assert not y._is_view() and y._version == 0 and y.storage_offset() == 0
        del y


def test_an_output_may_be_changed_in_place(layer):
    reference = torch.nn.BatchNorm2d(4)
    for seed in range(3):
        x, expected_x = (tensor(*SHAPE, seed=seed).requires_grad_() for _ in range(2))
        torch.relu_(layer(x)).square().sum().backward()
        torch.relu_(reference(expected_x)).square().sum().backward()
        assert torch.allclose(x.grad, expected_x.grad, atol=1e-4)


def test_types_do_not_share_memory(layer):
    for dtype in (torch.float64, torch.float32, torch.float64):
        y = layer.to(dtype)(tensor(*SHAPE, dtype=dtype))
        assert y.dtype == dtype
        del y


def test_another_shape_of_the_same_size_takes_the_memory(layer):
    address = layer(tensor(*SHAPE)).data_ptr()
    x = tensor(4, 4, 96, 256)
    y = layer(x)
    assert y.data_ptr() == address and y.shape == x.shape and y.is_contiguous()
    assert torch.allclose(y, torch.nn.BatchNorm2d(4)(x), atol=1e-5)


@pytest.mark.parametrize("n", [7, 9])
def test_an_output_holds_no_more_than_its_own_size(layer, n):
    layer(tensor(*SHAPE))
    y = layer(tensor(n, 4, 128, 96))
    assert y.untyped_storage().nbytes() == y.nbytes
    buffer = io.BytesIO()
    torch.save(y.detach(), buffer)
    assert buffer.tell() < y.nbytes + 4096


def test_small_outputs_are_left_to_malloc(layer, outputs):
    layer(tensor(2, 4, 8, 8))
    assert n_kept(outputs) == 0


def test_no_more_is_kept_than_was_in_use_at_one_time(layer, outputs):
    sizes = np.random.default_rng(0).integers(90, 150, (20, 5))
    most = 0
    for step in sizes:
        held = [layer(tensor(8, 4, 96, n)) for n in step]
        most = max(most, sum(y.nbytes for y in held))
        assert sum(y.nbytes for y in held) <= n_kept(outputs) <= most
        del held
    assert n_kept(outputs) <= outputs._most_in_use


def test_what_is_not_used_any_more_goes_back(layer, outputs):
    held = [layer(tensor(*SHAPE)) for _ in range(4)]
    del held
    assert len(outputs._kept) == 4
    x = tensor(*SHAPE)
    for _ in range(5 * USED_WITHIN):
        layer(x)
    assert len(outputs._kept) == 1
    assert outputs._most_in_use == n_kept(outputs)
    held = [layer(x) for _ in range(3)]
    assert n_kept(outputs) == sum(y.nbytes for y in held)


@pytest.mark.parametrize("how", ["made", "converted", "copied"])
def test_the_last_model_takes_its_memory_with_it(how, outputs):
    model = torch.nn.Sequential(ours.BatchNorm2d(4), ours.LayerNorm(96))
    if how == "converted":
        model = ours.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.LayerNorm(96)))
    elif how == "copied":
        model = copy.deepcopy(model)
    y = model(tensor(*SHAPE))
    before = y.detach().clone()
    assert n_kept(outputs) > 0
    del model
    gc.collect()
    assert n_kept(outputs) == 0
    assert torch.equal(y, before)


def test_a_layer_that_goes_leaves_the_memory_of_others(layer, outputs):
    others = [make() for make in LAYERS.values()]
    address = layer(tensor(*SHAPE)).data_ptr()
    for other in others:
        other(tensor(*SHAPE))
    del other, others
    with pytest.raises(TypeError):
        ours.SwitchableNorm2d("four")
    with pytest.raises(TypeError):
        ours.LayerNorm()
    gc.collect()
    assert n_kept(outputs) > 0
    assert layer(tensor(*SHAPE)).data_ptr() == address


def test_inference_and_training_take_turns(layer):
    x = tensor(*SHAPE)
    for _ in range(2):
        with torch.inference_mode():
            y = layer(x)
            y.add_(1)
        del y
        z = layer(x.clone().requires_grad_())
        (z * z).sum().backward()
        del z


def network():
    torch.manual_seed(0)
    block = [torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()]
    layers = [copy.deepcopy(layer) for _ in range(3) for layer in block]
    return torch.nn.Sequential(*layers, torch.nn.LayerNorm(96), torch.nn.Sigmoid())


def train(model, steps, checkpoint=False):
    """Return the losses of some steps; batches differ in size."""
    optimiser, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for step in range(steps):
        x = tensor(10 - step % 3, 4, 128, 96, seed=step)
        if checkpoint:
            y = torch.utils.checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False)
        else:
            y = model(x)
        optimiser.zero_grad()
        loss = (y - x).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_is_the_same(checkpoint):
    expected = train(network(), 6)
    found = train(ours.convert(network()), 6, checkpoint)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_threads_do_not_take_each_others_memory():
    models = [ours.convert(network()) for _ in range(5)]
    alone, found = train(models.pop(), 6), {}

    def work(i):
        found[i] = train(models[i], 6)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_allclose(found[i], alone, rtol=1e-5)


def test_without_recycling(layer, outputs):
    with use(recycle=False):
        layer(tensor(*SHAPE))
        layer(tensor(*SHAPE))
    assert n_kept(outputs) == 0


@pytest.mark.parametrize("over", [True, False])
def test_dx_over_dy(layer, over):
    x, places = tensor(*SHAPE).requires_grad_(), []

    class Note(torch.autograd.Function):
        forward = staticmethod(lambda ctx, y: y.clone())

        @staticmethod
        def backward(ctx, dy):
            places.append((dx := 2 * dy).data_ptr())
            return dx

    with use(dx_over_dy=over):
        Note.apply(layer(x)).square().sum().backward()
    assert (x.grad.data_ptr() in places) == over


def print_dx_over_dy():
    print(tuning().recycle, tuning().dx_over_dy)


def test_the_switch():
    assert run(print_dx_over_dy, NUMBANORM_RECYCLE="0") == "False False\n"
