"""Whole models: what convert takes and leaves, and the way back."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")
nn = torch.nn
NAMES = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d",
    "InstanceNorm3d", "LayerNorm", "GroupNorm", "RMSNorm", "SyncBatchNorm",
]  # fmt: skip


# -- The way back --------------------------------------------------------------------------------


def everything(layer):
    """Return all that a layer has in itself, and its class."""
    return type(layer), {key: copy.copy(value) for key, value in vars(layer).items()}


@pytest.mark.parametrize("name", NAMES)
def test_revert_leaves_nothing_behind(name):
    layer = getattr(nn, name)(*{"GroupNorm": [2, 6]}.get(name, [6])).eval()
    layer.register_forward_hook(lambda *_: None)
    before = everything(layer)
    assert ours.revert(ours.convert(layer)) is layer
    assert everything(layer) == before
    assert pickle.loads(pickle.dumps(type(layer))) is getattr(nn, name)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_revert_after_use():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    before = [everything(layer) for layer in model]
    x = torch.rand(2, 3, 8, 8)
    ours.convert(model)(x).sum().backward()
    ours.revert(model)
    assert [(cls, list(has)) for cls, has in before] == [
        (type(layer), list(vars(layer))) for layer in model
    ]
    torch.jit.script(model)


def test_revert_of_lazy_layers():
    lazy, used = nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d()
    before = list(vars(lazy))
    assert list(vars(ours.revert(ours.convert(lazy)))) == before
    ours.convert(used)(torch.rand(2, 3, 4, 4))
    lazy(torch.rand(2, 3, 4, 4))
    assert type(used) is ours.BatchNorm2d
    ours.revert(used)
    assert (type(used), list(vars(used))) == (nn.BatchNorm2d, list(vars(lazy)))


def test_revert_leaves_what_convert_did_not_make():
    class Own(ours.BatchNorm2d):
        """A subclass of ours."""

    model = nn.Sequential(Own(4), ours.SwitchableNorm2d(4), nn.Linear(2, 2), ours.LayerNorm(4))
    ours.revert(model)
    assert [type(layer) for layer in model] == [
        Own, ours.SwitchableNorm2d, nn.Linear, nn.LayerNorm,
    ]  # fmt: skip


@pytest.mark.parametrize("change", [ours.convert, ours.revert, ours.convert_switchable])
def test_a_module_is_needed(change):
    with pytest.raises(TypeError, match=r"module: a torch\.nn\.Module is needed, got list"):
        change([nn.BatchNorm2d(4)])
