"""Models of timm, torchvision and transformers, made from configurations: nothing is downloaded."""

import copy
import io
import pickle

import pytest
from libraries import library

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
ours = pytest.importorskip("numbanorm.torch")
nn = torch.nn

# Tiny ones: fewer blocks and channels, but all of the classes.
TIMM = {
    "test_efficientnet": {},
    "test_efficientnet_ln": {},
    "test_efficientnet_gn": {},
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "densenet121": {"growth_rate": 4, "block_config": (2, 2, 2, 2)},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32), "stem_chs": 8},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)},
    "convnext_atto_ols": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "conv_mlp": True},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
    },
    "test_mambaout": {},
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 20, "max_position_embeddings": 16,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 20,
    "decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
IMAGE = {**TEXT, "image_size": 16, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16}
HUGGING_FACE = {
    "Llama": ("LlamaModel", TEXT),
    "Mistral": ("MistralModel", TEXT),
    "Qwen2": ("Qwen2Model", TEXT),
    "Bert": ("BertModel", {**TEXT, "pad_token_id": 0}),
    "T5": ("T5EncoderModel", T5),
    "ViT": ("ViTModel", IMAGE),
    "ConvNext": ("ConvNextModel", STAGES),
}


def make(name):
    """Return a tiny model in evaluation mode, and an input for it."""
    torch.manual_seed(0)
    if name in TIMM:
        timm = library("timm")
        return timm.create_model(name, num_classes=3, **TIMM[name]), torch.rand(2, 3, 32, 32)
    library("torchvision")
    transformers = library("transformers")
    cls, options = HUGGING_FACE[name]
    model = getattr(transformers, cls)(getattr(transformers, f"{name}Config")(**options))
    if "image_size" in options:
        return model, torch.rand(2, 3, options["image_size"], options["image_size"])
    return model, torch.randint(20, (2, 7))


def norms(model):
    """Return the norm layers by what they are called."""
    return [
        layer
        for layer in model.modules()
        if "norm" in type(layer).__name__.lower() and any(True for _ in layer.parameters(False))
    ]


def step(model, x):
    """Return the output and all gradients of one step."""
    torch.manual_seed(1)  # of dropout
    model.zero_grad()
    y = model(x)
    y = y if isinstance(y, torch.Tensor) else y.last_hidden_state
    (y**2).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("name", [*TIMM, *HUGGING_FACE])
def test_model(name):
    reference, x = make(name)
    model = copy.deepcopy(reference)
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    classes = [type(layer) for layer in model.modules()]
    random = torch.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    assert ours.convert(model) is model
    # Nothing is left of the trials.
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters

    layers = norms(model)
    taken = [layer for layer in layers if type(layer).__module__.startswith("numbanorm")]
    assert len(taken) >= 0.95 * len(layers) > 0
    assert all(f"numbanorm.{type(layer).__name__}(" in repr(layer) for layer in taken)
    total = ours.summary(model).splitlines()[-1]
    assert total == f"numbanorm runs {len(taken)} of {len(layers)} norm layers"
    for layer, cls in zip(model.modules(), classes, strict=True):
        assert isinstance(layer, cls)

    model.double(), reference.double()
    x = x.double() if x.is_floating_point() else x
    for training in (True, False):
        found, expected = (step(m.train(training), x) for m in (model, reference))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # Hugging Face's RMSNorm calculates in float32.
            tolerance = 1e-4 if name in ("Llama", "Mistral", "Qwen2", "T5") else 1e-8
            size = max(value.abs().max().item(), 0.1) if value.numel() else 1
            bound = {"rtol": tolerance, "atol": tolerance * size}
            torch.testing.assert_close(found[key], value, **bound, msg=f"{key}: {{}}".format)
    reference.load_state_dict(model.state_dict(), strict=True)

    again = pickle.loads(pickle.dumps(model))
    assert [type(layer) for layer in again.modules()] == [type(m) for m in model.modules()]
    ours.revert(model)
    assert [type(layer) for layer in model.modules()] == classes


def test_what_cannot_agree_is_left():
    library("torchvision")
    transformers = library("transformers")
    config = transformers.GemmaConfig(**TEXT, head_dim=8)
    model = ours.convert(transformers.GemmaModel(config))  # its weights are 1 + weight
    assert not any(type(m).__module__.startswith("numbanorm") for m in model.modules())
    lines = ours.summary(model).splitlines()[1:-1]
    assert len(lines) == 5
    assert all("GemmaRMSNorm  no " in line for line in lines)
    assert all(line.endswith("its output is not numbanorm's") for line in lines)


def test_layers_that_carry_more():
    layers = library("timm").layers
    x = torch.rand(2, 8, 5, 5)
    for layer in (
        layers.BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout),
        layers.GroupNormAct(8, 2, act_layer=nn.LeakyReLU),
        layers.GroupNorm(8, 2),
        layers.LayerNormAct2d(8),
        layers.LayerNormAct(5, apply_act=False),
        layers.RmsNorm(5),
        layers.RmsNorm2d(8),
        layers.RmsNormAct(5, act_layer=nn.GELU),
        layers.LayerNorm2d(8, affine=False),
        layers.FrozenBatchNormAct2d(8),
    ):
        reference = copy.deepcopy(layer)
        cls = type(layer)
        assert ours.convert(layer) is layer
        assert type(layer).__module__.startswith("numbanorm"), cls
        assert repr(layer) == f"numbanorm.{reference!r}"
        for training in (True, False):
            torch.manual_seed(2)
            y = layer.train(training)(x)
            torch.manual_seed(2)
            torch.testing.assert_close(y, reference.train(training)(x), rtol=1e-4, atol=1e-5)


def test_torchvision():
    models, ops = library("torchvision.models"), library("torchvision.ops")
    layer = models.convnext.LayerNorm2d(6)
    model = ours.convert(nn.Sequential(layer, ops.FrozenBatchNorm2d(6)))
    assert ours.summary(model).splitlines()[-1] == "numbanorm runs 2 of 2 norm layers"
    assert repr(model[1]).startswith("numbanorm.FrozenBatchNorm2d(6, eps=1e-05")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.rand(2, 6, 5, 5).contiguous(memory_format=torch.channels_last)
    assert torch.equal(again(x), model(x))
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert type(ours.revert(again)[0]) is models.convnext.LayerNorm2d


def test_16_bit_models_are_as_before():
    model, x = make("Llama")
    model, reference = model.bfloat16().eval(), copy.deepcopy(model).bfloat16().eval()
    ours.convert(model)
    assert torch.equal(model(x).last_hidden_state, reference(x).last_hidden_state)
