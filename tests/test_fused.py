"""Activation and residual in the passes of the norm: against the definition and PyTorch's rules."""

import math

import numba
import numpy as np
import pytest
from cases import CASES, DTYPES, FORCED_VIEWS, assert_close, by_id, cases, normal, scale_of
from runs import make_mask, place
from scipy import special
from test_fast import FORCED, MASKS, MODES, STORES, in_turn

import numbanorm as nn
import numbanorm.functional as F
from numbanorm.kernels import activations
from numbanorm.tuning import use


def gelu(z):
    return z * special.ndtr(z)


def gelu_slope(z):
    return special.ndtr(z) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def gelu_tanh(z):
    return z * special.expit(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


def gelu_tanh_slope(z):
    k = 2 * math.sqrt(2 / math.pi)
    gate = special.expit(k * (z + 0.044715 * z**3))
    return gate + z * gate * (1 - gate) * k * (1 + 3 * 0.044715 * z * z)


def silu_slope(z):
    gate = special.expit(z)
    return gate * (1 + z * (1 - gate))


# What each is, and its slope.
ACTIVATIONS = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: 1.0 * (z > 0)),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda z: np.where(z > 0, 1, 0.01)),
    ("leaky_relu", 0.3): (lambda z: np.where(z > 0, z, 0.3 * z), lambda z: np.where(z > 0, 1, 0.3)),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: 1.0 * ((z > 0) & (z < 6))),
    "silu": (lambda z: z * special.expit(z), silu_slope),
    "gelu": (gelu, gelu_slope),
    "gelu_tanh": (gelu_tanh, gelu_tanh_slope),
    "sigmoid": (special.expit, lambda z: special.expit(z) * special.expit(-z)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    None: (lambda z: z, np.ones_like),
}
CURVES = ("silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
RESIDUALS = False, True
names = [str(name) for name in ACTIVATIONS]


def away_from_kinks(z, r):
    """Move a residual so that rounding does not decide on which side of a kink z is."""
    for kink in (0, 6):
        r = r + 1e-3 * (np.abs(z + r - kink) < 1e-3)
    return r


def check(
    case, dtype, activation, has_residual, mask="none", mode="train", store="cached", **limits
):
    """Compare a forward and a backward with the definition."""
    value, slope = ACTIVATIONS[activation]
    x, dy, r = (normal(*case.shape, seed=seed, dtype=dtype) for seed in (0, 1, 2))
    mask, start = make_mask(case.shape, mask), 13 if store == "streamed" else None
    layer = getattr(case.layer(dtype, activation=activation), mode)()
    naive = case.naive(layer, x, mask)
    if has_residual:
        r = away_from_kinks(naive.y, r).astype(dtype)
    elif activation in ("relu", "relu6", "leaky_relu", ("leaky_relu", 0.3)):
        keep = np.abs(naive.y) > 1e-4
        dy = dy * keep
    residual = r if has_residual else None
    with use(**limits, **STORES[store]):
        y = layer(x, mask=mask, residual=residual, out=place(np.zeros_like(x), start))
        outs = [place(np.zeros_like(x), start) for _ in range(2)]
        if has_residual:
            dx, dresidual = layer.backward(dy, out=outs[0], out_residual=outs[1])
        else:
            dx = layer.backward(dy, out=outs[0])
    z = naive.y + (r.astype(np.float64) if has_residual else 0)
    scale = np.maximum(scale_of(naive, "y", x), np.abs(z))
    assert_close(y, value(z), scale=scale, what="y")
    g = dy * slope(z)
    expected = naive.backward(g)
    # A slope is as wrong as z is.
    more = 4 * (1 + np.abs(scale).max(initial=0))
    assert_close(dx, expected.pop("dx"), scale=more * scale_of(naive, "dx", x), what="dx")
    if has_residual:
        assert_close(dresidual, g, scale=more * np.abs(dy).max(initial=0), what="dresidual")
    for name, gradient in expected.items():
        scale = more * scale_of(naive, name, x)
        assert_close(layer.gradients()[name], gradient, scale=scale, dtype=dtype, what=name)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("case", "activation", "dtype", "mask", "mode", "residual"),
    in_turn(CASES, ACTIVATIONS, DTYPES, MASKS, MODES, RESIDUALS),
)
def test_layers(case, activation, dtype, mask, mode, residual):
    check(case, dtype, activation, residual, mask, mode)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("case", "forced", "activation", "residual", "store"),
    in_turn(CASES, FORCED, ("relu", "gelu"), RESIDUALS, STORES),
)
def test_layouts(case, forced, activation, residual, store):
    check(case, np.float32, activation, residual, store=store, **FORCED[forced])


def kernels(masks=MASKS):
    return pytest.mark.parametrize("forced", FORCED_VIEWS), pytest.mark.parametrize("mask", masks)


@pytest.mark.fast
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("forced", FORCED_VIEWS)
def test_backward_calculates_the_bits_of_forward_again(forced, mode, mask):
    # norm(x) - norm(x) is 0, where ReLU has a slope of 0: a single multiply-add that is rounded
    # otherwise in backward makes half of the results something else.
    limits, case, shape, _ = FORCED_VIEWS[forced]
    case = by_id[case]
    mask = make_mask(shape, mask)
    x, dy = normal(*shape, dtype=np.float32, offset=3.0), np.ones(shape, np.float32)
    for store in STORES.values():
        with use(**limits, **store):
            plain = getattr(case.layer(np.float32), mode)()
            layer = getattr(case.layer(np.float32, activation="relu"), mode)()
            if plain.tracks and mode == "eval":
                layer.load_state_dict(plain.state_dict())
            y = plain(x, mask=mask)
            assert not layer(x, mask=mask, residual=-y).any()
            dx, dresidual = layer.backward(dy)
            assert not dresidual.any()
            assert not dx.any()
            assert not any(g.any() for g in layer.gradients().values())


@pytest.mark.fast
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=names)
def test_nan_and_zero_gradients(activation):
    x = np.array([[1.0, 2.0, np.nan, 4.0]], np.float32)
    mask = ~np.isnan(x)
    y, saved = F.layer_norm_forward(x, 4, mask=mask, activation=activation, residual=x)
    assert np.isnan(y).tolist() == [[False, False, True, False]]
    dx, _, _, dresidual = F.layer_norm_backward(np.where(mask, x, 0), saved)
    assert np.isfinite(dx).all()
    assert np.isfinite(dresidual).all()


@cases("BatchNorm2d", "LayerNorm", "SwitchableNorm2d")
def test_overwritten_residual(case):
    layer = case.layer(np.float32, activation="silu")
    x, r = case.input(np.float32), normal(*case.shape, seed=1, dtype=np.float32)
    expected = layer(x, residual=r)
    for out in (r.copy(), x.copy()):
        arguments = {"residual": out} if (out == r).all() else {"residual": r}
        first = x if (out == r).all() else out
        assert np.array_equal(layer(first, **arguments, out=out), expected)
        with pytest.raises(RuntimeError, match=r"out=(x|residual)"):
            layer.backward(x)


@cases("BatchNorm2d", "LayerNorm")
def test_outputs_of_backward(case):
    layer = case.layer(np.float32, activation="gelu")
    x, r, dy = (normal(*case.shape, seed=seed, dtype=np.float32) for seed in range(3))
    layer(x, residual=r)
    dx, dr = layer.backward(dy)
    assert not np.shares_memory(dr, dy)
    for names in (("out",), ("out_residual",)):
        layer(x, residual=r)
        results = layer.backward(own := dy.copy(), **dict.fromkeys(names, own))
        np.testing.assert_array_equal(results, (dx, dr))
        assert results[names[0] == "out_residual"] is own
    layer(x, residual=r)
    with pytest.raises(ValueError, match="out_residual: memory of its own"):
        layer.backward(own, out=own, out_residual=own)
    for wrong in (x, r):
        with pytest.raises(ValueError, match="overlap"):
            layer.backward(dy, out_residual=wrong[::-1])
    layer(x)
    with pytest.raises(ValueError, match="there was no residual"):
        layer.backward(dy, out_residual=np.empty_like(dy))


def test_residual_alone_copies_dy():
    x, r, dy = (normal(5, 6, seed=seed, dtype=np.float32) for seed in range(3))
    y, saved = F.layer_norm_forward(x, 6, residual=r)
    np.testing.assert_array_equal(y, F.layer_norm(x, 6) + r)
    gradients = F.layer_norm_backward(dy, saved)
    assert gradients._fields == ("dx", "dweight", "dbias", "dresidual")
    np.testing.assert_array_equal(gradients.dresidual, dy)
    assert F.layer_norm_backward(dy, F.layer_norm_forward(x, 6)[1])._fields[-1] == "dbias"


@pytest.mark.parametrize(
    "wrong", ["Relu", ("relu", 0.1), ("leaky_relu", np.nan), ("leaky_relu",), 3, ["relu"]]
)
def test_wrong_activation(wrong):
    with pytest.raises(ValueError, match="activation: "):
        nn.BatchNorm2d(3, activation=wrong)
    layer = nn.LayerNorm(3, activation="relu")
    with pytest.raises(ValueError, match="activation: "):
        layer.activation = wrong
    assert layer.activation == "relu"
    with pytest.raises(ValueError, match="residual: the shape of x"):
        layer(np.ones((2, 3), np.float32), residual=np.ones(3, np.float32))


def test_repr_shows_it():
    assert repr(nn.BatchNorm2d(5, activation="relu")).endswith("activation='relu')")
    shown = repr(nn.LayerNorm(5, activation=("leaky_relu", 0.2)))
    assert shown.endswith("activation=('leaky_relu', 0.2))")


def apply(function, x):
    """Call a function of vectors for each element."""
    from numba import njit

    from numbanorm.numba_ext.jit import FLAGS
    from numbanorm.numba_ext.vectors import load, store

    @njit(**FLAGS)
    def run(x, y):
        for i in range(0, x.shape[0], 16):
            store(function(load(x, i, None)), y, i, None)

    padded = np.resize(x, -(-len(x) // 16) * 16)
    y = np.empty_like(padded)
    with np.errstate(all="ignore"):
        run(padded, y)
    return y[: len(x)]


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="NumPy rounds each product")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exp", "tanh", "erf"])
def test_functions_are_within_two_units_of_the_last_place(name, dtype):
    limit = 110 if dtype == np.float32 else 760
    draw = np.random.default_rng(0)
    x = np.concatenate([
        draw.uniform(-limit, limit, 1 << 16), draw.normal(0, 1, 1 << 16),
        np.linspace(-7, 7, 1 << 16), 10.0 ** draw.uniform(-30, 2, 1 << 14),
        [0.0, -0.0, np.inf, -np.inf, 1e30, -1e30],
    ]).astype(dtype)  # fmt: skip
    y = apply(getattr(activations, name), x)
    wide = x.astype(np.longdouble)
    with np.errstate(all="ignore"):
        if name == "erf":
            # That of C is in float64, and within a unit there; SciPy's is not.
            expected = np.array([math.erf(value) for value in x.tolist()], np.longdouble)
        else:
            expected = getattr(np, name)(wide)
        rounded = expected.astype(dtype)
        units = np.abs(y - expected) / np.spacing(np.abs(rounded))
    units[y == rounded] = 0
    assert units.max() <= 2, (x[units.argmax()], y[units.argmax()])
    assert np.isnan(apply(getattr(activations, name), np.full(16, np.nan, dtype))).all()
