"""Folding: the layer before a BatchNorm, folded, gives what both of them gave in evaluation."""

import math

import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, assert_close, fill, normal
from numpy.lib.stride_tricks import sliding_window_view

import numbanorm as nn

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
biases = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])

NORMS = {
    "affine": {},
    "no bias": {"bias": False},
    "not affine": {"affine": False},
    "eps": {"eps": 0.3},
    "no eps": {"eps": 0.0},
}
norms = pytest.mark.parametrize("options", NORMS.values(), ids=NORMS.keys())


def norm_layer(channels, dtype=np.float64, **options):
    return fill(nn.BatchNorm(channels, dtype=dtype, **options), seed=7).eval()


def linear(x, weight, bias):
    """Apply a dense layer, by its definition."""
    y = np.einsum("ni,oi->no", x, weight)
    return y if bias is None else y + bias


def convolve(x, weight, bias, groups=1):
    """Convolve without padding over any number of spatial axes, by the definition."""
    spatial = tuple(range(2, x.ndim))
    windows = sliding_window_view(x, weight.shape[2:], axis=spatial)
    parts = [
        np.tensordot(part, w, axes=((1, *range(x.ndim, part.ndim)), (1, *spatial)))
        for part, w in zip(
            np.split(windows, groups, axis=1), np.split(weight, groups, axis=0), strict=True
        )
    ]
    y = np.moveaxis(np.concatenate(parts, axis=-1), -1, 1)
    return y if bias is None else y + bias.reshape(-1, *[1] * len(spatial))


def convolve_transposed(x, weight, bias, groups=1):
    """Add each input, times the kernel, to the output: the transpose of `convolve`."""
    sizes = [n + k - 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    parts = []
    for part, w in zip(np.split(x, groups, axis=1), np.split(weight, groups, axis=0), strict=True):
        y = np.zeros((len(x), w.shape[1], *sizes))
        for place in np.ndindex(w.shape[2:]):
            at = tuple(slice(p, p + n) for p, n in zip(place, x.shape[2:], strict=True))
            y[:, :, *at] += np.einsum("ni...,io->no...", part, w[:, :, *place])
        parts.append(y)
    y = np.concatenate(parts, axis=1)
    return y if bias is None else y + bias.reshape(-1, *[1] * (x.ndim - 2))


# kernel, groups, input channels, output channels
CONVOLUTIONS = {
    "1d": ((3,), 1, 4, 6),
    "2d": ((3, 2), 1, 4, 6),
    "3d": ((2, 1, 3), 1, 4, 6),
    "1x1": ((1, 1), 1, 3, 5),
    "one output channel": ((3, 3), 1, 4, 1),
    "1d, two groups": ((3,), 2, 4, 6),
    "2d, two groups": ((3, 2), 2, 4, 6),
    "3d, two groups": ((2, 1, 3), 2, 4, 6),
    "depthwise": ((3, 3), 4, 4, 4),
    "depthwise, three outputs each": ((3, 3), 4, 4, 12),
    "one output in each group": ((3, 3), 2, 8, 2),
}
convolutions = pytest.mark.parametrize(
    ("kernel", "groups", "inputs", "outputs"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys()
)


def convolution(kernel, groups, inputs, outputs, transposed, with_bias, dtype):
    """Draw x, weight and bias."""
    x = normal(3, inputs, *(k + 3 for k in kernel), dtype=dtype)
    channels = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight = normal(*channels, *kernel, seed=1, dtype=dtype)
    return x, weight, normal(outputs, seed=2, dtype=dtype) if with_bias else None


@norms
@biases
@dtypes
def test_linear(dtype, with_bias, options):
    x, weight = normal(7, 4, dtype=dtype), normal(6, 4, seed=1, dtype=dtype)
    bias = normal(6, seed=2, dtype=dtype) if with_bias else None
    norm = norm_layer(6, dtype, **options)
    expected = norm(linear(x, weight, bias))
    folded = nn.fold_linear(weight, bias, norm)
    assert [a.dtype for a in folded] == [dtype, dtype]
    assert [a.shape for a in folded] == [(6, 4), (6,)]
    assert_close(linear(x, *folded), expected, scale=np.abs(folded[0]).sum(1).max())


@norms
@biases
@dtypes
@convolutions
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_conv(kernel, groups, inputs, outputs, transposed, dtype, with_bias, options):
    given = convolution(kernel, groups, inputs, outputs, transposed, with_bias, dtype)
    x, weight, bias = given
    norm = norm_layer(outputs, dtype, **options)
    apply = convolve_transposed if transposed else convolve
    # The transposed definition adds up in float64.
    expected = norm(apply(x, weight, bias, groups)).astype(dtype)
    folded = nn.fold_conv(weight, bias, norm, transposed=transposed)
    assert [a.dtype for a in folded] == [dtype, dtype]
    assert [a.shape for a in folded] == [weight.shape, (outputs,)]
    got = apply(x, *folded, groups).astype(dtype)
    assert_close(got, expected, scale=np.abs(folded[0]).max() * math.prod(weight.shape[1:]))


@biases
@dtypes
@convolutions
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_conv_of_pytorch(kernel, groups, inputs, outputs, transposed, dtype, with_bias):
    torch = pytest.importorskip("torch")
    given = convolution(kernel, groups, inputs, outputs, transposed, with_bias, dtype)
    x, weight, bias = given
    name = f"conv{'_transpose' if transposed else ''}{len(kernel)}d"

    def apply(weight, bias):
        tensors = (a if a is None else torch.from_numpy(a) for a in (x, weight, bias))
        more = {"stride": 2, "padding": 1, "groups": groups}
        return getattr(torch.nn.functional, name)(*tensors, **more).numpy()

    norm = norm_layer(outputs, dtype)
    folded = nn.fold_conv(weight, bias, norm, transposed=transposed)
    scale = np.abs(folded[0]).max() * math.prod(weight.shape[1:])
    assert_close(apply(*folded), norm(apply(weight, bias)), scale=scale)


@biases
@dtypes
def test_linear_of_pytorch(dtype, with_bias):
    torch = pytest.importorskip("torch")
    x, weight = normal(7, 4, dtype=dtype), normal(6, 4, seed=1, dtype=dtype)
    bias = normal(6, seed=2, dtype=dtype) if with_bias else None
    norm = norm_layer(6, dtype)

    def apply(weight, bias):
        tensors = (a if a is None else torch.from_numpy(a) for a in (x, weight, bias))
        return torch.nn.functional.linear(*tensors).numpy()

    folded = nn.fold_linear(weight, bias, norm)
    assert_close(apply(*folded), norm(apply(weight, bias)), scale=np.abs(folded[0]).sum(1).max())


def torch_norm(torch, norm):
    """Make PyTorch's BatchNorm of the same parameters and statistics."""
    twin = torch.nn.BatchNorm2d(norm.num_features, norm.eps, dtype=torch.float64).eval()
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in norm.state_dict().items()})
    return twin


@biases
def test_as_pytorch_folds(with_bias):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import fusion

    norm = norm_layer(6)
    buffers = norm.running_mean, norm.running_var
    mean, var, w, b = (torch.from_numpy(a) for a in (*buffers, norm.weight, norm.bias))
    bias = torch.from_numpy(normal(6, seed=2)) if with_bias else None
    for shape, transposed in (((6, 4, 3, 3), False), ((4, 6, 3, 3), True), ((6, 4), None)):
        weight = torch.from_numpy(normal(*shape, seed=1))
        if transposed is None:
            expected = fusion.fuse_linear_bn_weights(weight, bias, mean, var, norm.eps, w, b)
            fold = nn.fold_linear
        else:
            expected = fusion.fuse_conv_bn_weights(
                weight, bias, mean, var, norm.eps, w, b, transpose=transposed
            )
            fold = nn.fold_conv
        options = {"transposed": True} if transposed else {}
        array = None if bias is None else bias.numpy()
        # PyTorch's own layer will do as well.
        for given in (norm, torch_norm(torch, norm)):
            got = fold(weight.numpy(), array, given, **options)
            for actual, value in zip(got, expected, strict=True):
                assert_close(actual, value.detach().numpy())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_of_the_weight(layout):
    weight, norm = normal(6, 4, 3, 2), norm_layer(6)
    expected = nn.fold_conv(weight, None, norm)
    got = nn.fold_conv(layout(weight), None, norm)
    np.testing.assert_array_equal(got[0], expected[0])
    got = nn.fold_linear(layout(weight.reshape(6, -1)), None, norm)
    np.testing.assert_array_equal(got[0], expected[0].reshape(6, -1))


def test_lists_are_arrays():
    norm = nn.BatchNorm1d(2, eps=0.0)
    norm.running_var[:] = [4.0, 0.25]
    weight, bias = nn.fold_linear([[1.0], [2.0]], [3.0, 4.0], norm)
    np.testing.assert_array_equal(weight, [[0.5], [4.0]])
    np.testing.assert_array_equal(bias, [1.5, 8.0])


def test_what_is_given_is_left_alone():
    """Also where nothing changes: the results are new arrays."""
    weight, bias = normal(6, 4, 3), normal(6)
    before = weight.copy(), bias.copy()
    for norm in (norm_layer(6), nn.BatchNorm1d(6, eps=0.0, dtype=np.float64)):
        state = norm.state_dict()
        folded = nn.fold_conv(weight, bias, norm)
        np.testing.assert_array_equal(weight, before[0])
        np.testing.assert_array_equal(bias, before[1])
        for name, value in norm.state_dict().items():
            np.testing.assert_array_equal(value, state[name])
        memory = (weight, bias, norm.running_mean, norm.weight, norm.bias)
        assert not any(np.shares_memory(a, b) for a in folded for b in memory)
        assert all(a.flags.c_contiguous and a.flags.writeable for a in folded)


def test_the_mode_of_the_norm_does_not_matter():
    weight, norm = normal(6, 4), norm_layer(6)
    expected = nn.fold_linear(weight, None, norm)
    got = nn.fold_linear(weight, None, norm.train())
    assert norm.training
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_float32_is_folded_in_float64():
    """Rounded once: a channel of great mean and small variance is as good as float32 allows."""
    norm = norm_layer(6, np.float32)
    norm.running_mean[:] = 1e4
    norm.running_var[:] = 1e-4
    weight, bias = normal(6, 4, dtype=np.float32), normal(6, dtype=np.float32)
    exact = nn.fold_linear(weight.astype(np.float64), bias.astype(np.float64), norm)
    for got, value in zip(nn.fold_linear(weight, bias, norm), exact, strict=True):
        np.testing.assert_array_equal(got, value.astype(np.float32))


def test_other_types_of_bias_and_norm():
    weight, bias, norm = normal(6, 4, dtype=np.float32), normal(6), norm_layer(6)
    folded = nn.fold_linear(weight, bias, norm)
    assert [a.dtype for a in folded] == [np.float32, np.float32]
    expected = nn.fold_linear(weight.astype(np.float64), bias, norm)[1]
    np.testing.assert_array_equal(folded[1], expected.astype(np.float32))


def test_a_channel_without_variance_gives_its_bias():
    """As the layer does where variance and eps both are 0."""
    norm = norm_layer(3, eps=0.0)
    norm.running_var[1] = 0
    x, weight = normal(5, 4), normal(3, 4, seed=1)
    expected = norm(linear(x, weight, None))
    np.testing.assert_array_equal(expected[:, 1], norm.bias[1])
    np.testing.assert_allclose(linear(x, *nn.fold_linear(weight, None, norm)), expected, rtol=1e-9)


def test_an_instance_norm_that_tracks_is_as_linear():
    norm = fill(nn.InstanceNorm1d(6, affine=True, track_running_stats=True, dtype=np.float64))
    x, weight = normal(3, 4, 9), normal(6, 4, 2, seed=1)
    expected = norm.eval()(convolve(x, weight, None))
    got = convolve(x, *nn.fold_conv(weight, None, norm))
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


W, V = np.ones((6, 4)), np.ones((6, 4, 3))
BN = nn.BatchNorm1d(6)

# fmt: off
BAD = [
    ("linear: weight of one axis", lambda: nn.fold_linear(W[0], None, BN),
     ValueError, ["weight", "(out, in)", "(4,)"]),
    ("linear: weight of a convolution", lambda: nn.fold_linear(V, None, BN),
     ValueError, ["weight", "(6, 4, 3)"]),
    ("conv: weight of a dense layer", lambda: nn.fold_conv(W, None, BN),
     ValueError, ["weight", "(6, 4)"]),
    ("conv, transposed: weight of a dense layer",
     lambda: nn.fold_conv(W, None, BN, transposed=True), ValueError, ["weight", "(in, out"]),
    ("integers", lambda: nn.fold_linear(W.astype(int), None, BN), TypeError, ["weight", "int64"]),
    ("bias of integers", lambda: nn.fold_linear(W, np.ones(6, int), BN), TypeError, ["bias"]),
    ("bias of another size", lambda: nn.fold_linear(W, np.ones(4), BN),
     ValueError, ["bias", "(6,)", "(4,)"]),
    ("bias of two axes", lambda: nn.fold_conv(V, np.ones((6, 1)), BN),
     ValueError, ["bias", "(6,)", "(6, 1)"]),
    ("outputs and channels differ", lambda: nn.fold_linear(W.T, None, BN),
     ValueError, ["weight", "6", "(4, 6)"]),
    ("outputs and channels of a convolution differ",
     lambda: nn.fold_conv(V.swapaxes(0, 1), None, BN), ValueError, ["weight", "6", "(4, 6, 3)"]),
    ("transposed: no number of groups fits",
     lambda: nn.fold_conv(V, None, BN, transposed=True), ValueError, ["weight", "6", "(6, 4, 3)"]),
    ("transposed: inputs are no multiple of the groups",
     lambda: nn.fold_conv(np.ones((4, 2, 3)), None, BN, transposed=True),
     ValueError, ["weight", "(4, 2, 3)"]),
    ("transposed: no outputs", lambda: nn.fold_conv(np.ones((4, 0, 3)), None, BN, transposed=True),
     ValueError, ["weight"]),
    ("norm without running statistics",
     lambda: nn.fold_linear(W, None, nn.BatchNorm1d(6, track_running_stats=False)),
     TypeError, ["norm", "track_running_stats=False"]),
    ("LayerNorm", lambda: nn.fold_linear(W, None, nn.LayerNorm(6)),
     TypeError, ["norm", "LayerNorm"]),
    ("SwitchableNorm", lambda: nn.fold_conv(V, None, nn.SwitchableNorm1d(6)),
     TypeError, ["norm", "SwitchableNorm1d"]),
    ("no norm", lambda: nn.fold_linear(W, None, None), TypeError, ["norm", "None"]),
    ("norm in place of the bias", lambda: nn.fold_linear(W, BN, None), TypeError, ["norm"]),
]
# fmt: on


@pytest.mark.parametrize(
    ("call", "error", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
