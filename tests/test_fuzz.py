"""Any layer, shape, strides, types, axes, mask and mode against the float64 oracle.

``NUMBANORM_FUZZ=50000 pytest tests/test_fuzz.py`` tries that many examples, new ones each time, and
a quarter as many of what has a test of its own.
"""

import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import reference as ref
from cases import (
    DTYPES,
    LAYOUTS,
    MASKS,
    OUT_LAYOUTS,
    Case,
    assert_close,
    channel,
    normal,
    over_axes,
    scale_of,
    switchable,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import numbanorm as nn
from numbanorm.tuning import use

EXAMPLES = int(os.environ.get("NUMBANORM_FUZZ", "0"))
thorough = settings(
    max_examples=EXAMPLES or 2000,
    derandomize=not EXAMPLES,
    suppress_health_check=list(HealthCheck),
)
quarter = settings(thorough, max_examples=thorough.max_examples // 4)

# -- layers --------------------------------------------------------------------------------------

size = st.one_of(st.integers(1, 6), st.integers(1, 6), st.sampled_from([0, 1, 2, 3, 16, 35]))
option = st.booleans()


def some(table):
    return st.sampled_from(list(table.values()))


def layouts(ndim, table=LAYOUTS):
    """Draw a function that lays out an array; some need a channel axis."""
    return some({k: v for k, v in table.items() if ndim > 1 or "channels" not in k})


@st.composite
def shapes(draw, min_ndim, max_ndim=5):
    shape = tuple(draw(st.lists(size, min_size=min_ndim, max_size=max_ndim)))
    assume(math.prod(shape) <= 4000)
    return shape


@st.composite
def shapes_with_channels(draw, min_ndim=2):
    """Draw a shape, its channel axis, from the left or the right, and a number of groups."""
    shape = draw(shapes(min_ndim))
    axis = draw(st.sampled_from(range(1, len(shape))))
    c = shape[axis]
    assume(c > 0)
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    return shape, axis if draw(option) else axis - len(shape), groups


@st.composite
def momenta(draw):
    return draw(st.sampled_from([0.1, None, 0.0, 1.0, 0.25]))


@st.composite
def channel_layers(draw, layer, kind):
    shape, axis, _ = draw(shapes_with_channels(3 if kind == "in" else 2))
    track, momentum = draw(option), draw(momenta())
    options = {"affine": draw(option), "bias": draw(option), "axis": axis}
    return channel(
        layer.__name__,
        lambda **k: layer(
            shape[axis], momentum=momentum, track_running_stats=track, **options, **k
        ),
        shape, kind, axis=axis, tracked=0 if track else None, momentum=momentum,
    )  # fmt: skip


@st.composite
def group_norms(draw):
    shape, axis, groups = draw(shapes_with_channels())
    options = {"affine": draw(option), "bias": draw(option), "axis": axis}
    return channel(
        "GroupNorm",
        lambda **k: nn.GroupNorm(groups, shape[axis], **options, **k),
        shape, "gn", groups=groups, axis=axis,
    )  # fmt: skip


@st.composite
def switchable_norms(draw):
    shape, axis, groups = draw(shapes_with_channels())
    over = draw(st.lists(st.sampled_from(["in", "ln", "bn", "gn"]), min_size=1, unique=True))
    track, momentum = draw(option), draw(momenta())
    options = {"affine": draw(option), "bias": draw(option), "axis": axis, "over": over}
    return switchable(
        "SwitchableNorm",
        lambda **k: nn.SwitchableNorm(
            shape[axis],
            momentum=momentum,
            track_running_stats=track,
            num_groups=groups if "gn" in over else None,
            **options,
            **k,
        ),
        shape, *over, groups=groups, axis=axis, untracked=not track, momentum=momentum,
    )  # fmt: skip


@st.composite
def row_norms(draw, layer):
    shape = draw(shapes(1))
    n_axes = draw(st.integers(1, len(shape)))
    axes = tuple(range(-n_axes, 0))
    affine, options = draw(option), {}
    if layer is nn.LayerNorm:
        options["bias"] = draw(option)
    return over_axes(
        layer.__name__,
        lambda **k: layer(shape[-n_axes:], 1e-5, affine, **options, **k),
        shape, axes, axes, center=layer is nn.LayerNorm,
    )  # fmt: skip


@st.composite
def norms(draw):
    shape = draw(shapes(1))
    every = range(len(shape))
    axes = tuple(draw(st.sets(st.sampled_from(every), min_size=1)))
    given_features = draw(st.none() | st.sets(st.sampled_from(every)).map(tuple))
    kept = tuple(a for a in every if a not in axes)
    features = given_features
    if features is None:
        features = kept if 0 in axes else axes
    groups = 1
    if 1 in axes and shape[1] > 0:
        groups = draw(st.sampled_from([g for g in range(1, shape[1] + 1) if shape[1] % g == 0]))
    track, momentum = draw(option), draw(momenta())
    options: dict[str, Any] = {"bias": draw(option), "center": draw(option)}
    affine = draw(option)
    return over_axes(
        "Norm",
        lambda **k: nn.Norm(
            axes,
            affine,
            track,
            feature_axes=given_features,
            groups=groups,
            momentum=momentum,
            **options,
            **k,
        ),
        shape, axes, tuple(sorted(features)), groups=groups, tracked=0 if track else None,
        momentum=momentum, center=options["center"],
    )  # fmt: skip


layers = st.one_of(
    channel_layers(nn.BatchNorm, "bn"),
    channel_layers(nn.InstanceNorm, "in"),
    group_norms(),
    row_norms(nn.LayerNorm),
    row_norms(nn.RMSNorm),
    norms(),
    switchable_norms(),
    switchable_norms(),
)


# -- what they are called with -------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A layer in one of its modes, and arguments for it."""

    case: Case
    layer_dtype: type
    training: bool
    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None
    parallel: bool
    pieces: bool
    streamed: bool

    def layer(self, **options):
        return self.case.layer(self.layer_dtype, **options).train(self.training)

    @contextmanager
    def ways(self):
        """Let the kernels run on several threads or on one, on pieces or on whole groups.

        Those write by streaming stores or by ordinary ones.
        """

        with use(
            parallel_from=0 if self.parallel else 1 << 16,
            whole_groups=not self.pieces,
            cache_bytes=0 if self.streamed else None,
            stream_from=1,
        ):
            yield


@st.composite
def calls(draw):
    case = draw(layers)
    dtype, layer_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**32))
    scale = draw(st.sampled_from([1.0, 1e-2, 1e3]))
    # In float64 the oracle rounds as well.
    offset = draw(st.sampled_from([0.0, -3.0, 10.0, 1e4 if dtype == np.float32 else 1.0]))
    x = scale * normal(*case.shape, seed=seed, offset=offset)
    kind = draw(st.sampled_from(["normal", "normal", "groups apart", "few values", "constant"]))
    if kind == "groups apart":
        # Each along one axis, far more than inside.
        axis = draw(st.sampled_from(range(x.ndim)))
        offsets = normal(*(n if a == axis else 1 for a, n in enumerate(x.shape)), seed=seed)
        x += draw(st.sampled_from([10, 1000])) * scale * offsets
    if kind == "few values":
        x = np.round(x / scale)
    if kind == "constant":
        x = np.full(case.shape, scale * offset)
    dy = normal(*case.shape, seed=seed + 1)
    mask = None
    if x.size and draw(option):
        mask = draw(some(MASKS))(case.shape)
    return Call(
        case=case,
        layer_dtype=layer_dtype,
        training=draw(st.sampled_from([True, True, False])),
        x=draw(layouts(x.ndim))(x.astype(dtype)),
        dy=draw(layouts(x.ndim))(dy.astype(draw(st.sampled_from(DTYPES)))),
        mask=mask,
        parallel=draw(option),
        pieces=draw(option),
        streamed=draw(option),
    )


def assume_trainable(call):
    """Leave out what is an error in PyTorch as well: one value per channel in training."""
    if call.training and call.case.id in ("BatchNorm", "InstanceNorm"):
        (stat,) = call.case.statistics(call.x.shape)
        assume(stat.size == 0 or call.x.size != stat.size)
        assume(call.x.size)


@thorough
@given(calls(), st.data(), st.integers(1, 2))
def test_like_the_definition(call, data, steps):
    assume_trainable(call)
    x, dy, mask = call.x, call.dy, call.mask
    before = x.tobytes(), dy.tobytes()
    y_layout, dx_layout = (data.draw(layouts(x.ndim, OUT_LAYOUTS)) for _ in range(2))
    y_goes, dx_goes = (data.draw(st.sampled_from(["new", "out", "over"])) for _ in range(2))
    layer = call.layer()

    def forward(layer, x):
        out = y_layout(np.full_like(x, np.nan)) if y_goes == "out" else None
        y = layer(x, mask=mask, out=out)
        assert out is None or y is out
        return y

    def backward(layer, dy):
        out = dx_layout(np.full(dy.shape, np.nan, x.dtype)) if dx_goes == "out" else None
        if dx_goes == "over":
            dy = out = dx_layout(dy.astype(x.dtype))
        dx = layer.backward(dy, out=out)
        assert out is None or dx is out
        return dx

    with call.ways():
        for _ in range(steps):
            call.case.check(layer, x, dy, mask, forward, backward)
        assert (x.tobytes(), dy.tobytes()) == before
        if y_goes == "over":
            naive, own = call.case.naive(layer, x, mask), y_layout(np.array(x))
            assert layer(own, mask=mask, out=own) is own
            assert_close(own, naive.y, scale=scale_of(naive, "y", x), what="y over x")


def results(call, layer, x, dy):
    """Return all that comes of a forward and a backward, by name."""
    found = {"y": layer(x, mask=call.mask), "dx": layer.backward(dy)}
    found |= layer.gradients()
    if call.case.tracked is not None:
        found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    return found


@quarter
@given(calls(), st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 2**32), option)
def test_nan_and_inf_stay_in_their_groups(call, bad, index, skip):
    assume_trainable(call)
    assume(call.x.size)
    where = np.unravel_index(index % call.x.size, call.x.shape)
    counts = call.mask is None or np.broadcast_to(call.mask, call.x.shape)[where]
    clean, dy = np.array(call.x), np.array(call.dy)
    spoiled = clean.copy()
    spoiled[where] = bad
    if not counts:
        dy[where] = 0  # and then nothing of it is in any gradient
    options = {} if call.case.tracked is None else {"skip_nonfinite": skip}
    layer, clean_layer = call.layer(**options), call.layer(**options)
    old = {k: v.copy() for k, v in clean_layer.state_dict().items()}
    with call.ways(), np.errstate(all="ignore"):
        naive = call.case.naive(layer, spoiled if counts else clean, call.mask)
        expected = {"y": naive.y, **naive.backward(dy)}
        tracking = call.training and call.case.tracked is not None
        if tracking:
            n = int(layer.num_batches_tracked) + 1
            running = ref.track(
                layer.running_mean, layer.running_var, naive,
                call.case.tracked, call.case.momentum, n,
            )  # fmt: skip
            expected |= dict(zip(("running_mean", "running_var"), running, strict=True))
        got = results(call, layer, spoiled, dy)
        unspoiled = results(call, clean_layer, clean, dy)
    if not counts:
        expected["y"][where] = np.nan
    skipped = tracking and skip and counts
    assert layer.num_batches_skipped == skipped
    if tracking:
        nothing = call.mask is not None and not np.broadcast_to(call.mask, call.x.shape).any()
        assert layer.num_batches_tracked == n - (skipped or nothing)
    for name, values in got.items():
        if skipped and name.startswith("running"):
            np.testing.assert_array_equal(values, old[name], name)
            continue
        affected = ~np.isfinite(expected.get(name, values))
        # A single logit has the gradient 0, whatever the values.
        if np.isnan(bad) and not (name in ("mean_weight", "var_weight") and values.size == 1):
            np.testing.assert_array_equal(np.isnan(values), affected, name)
        np.testing.assert_array_equal(values[~affected], unspoiled[name][~affected], name)


@quarter
@given(shapes(1), st.data())
def test_moments(shape, data):
    axes = data.draw(st.none() | st.sets(st.sampled_from(range(len(shape)))).map(tuple))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = normal(*shape, seed=data.draw(st.integers(0, 99)), offset=data.draw(st.floats(-9, 9)))
    x = data.draw(layouts(x.ndim))(x.astype(dtype))
    mask = data.draw(some(MASKS))(shape) if x.size and data.draw(option) else None
    keepdims = data.draw(option)
    every = tuple(range(x.ndim))
    reduced = every if axes is None else axes
    with use(parallel_from=data.draw(st.sampled_from([0, 1 << 16]))):
        got = nn.moments(x, axes, mask=mask, keepdims=keepdims)
    count, mean, var = ref.moments(np.array(x, np.float64), ref.statistic(shape, reduced), mask)
    kept = tuple(
        1 if a in reduced else n for a, n in enumerate(shape) if keepdims or a not in reduced
    )
    np.testing.assert_array_equal(np.broadcast_to(got.count, kept), count.reshape(kept))
    np.testing.assert_allclose(got.mean, mean.reshape(kept), rtol=0, atol=1e-13)
    np.testing.assert_allclose(got.var(), var.reshape(kept), rtol=0, atol=1e-12)


def test_the_examples_are_varied():
    """Take care that the strategies do not shrink to a corner."""
    seen = set()

    @settings(max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(calls())
    def look(call):
        seen.update({call.case.id, call.x.dtype, call.x.ndim})
        seen.add(("training", call.training))
        seen.add(("masked", call.mask is not None))
        seen.add(("C-contiguous", call.x.flags.c_contiguous))

    look()
    names = {"BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm", "Norm"}
    assert names | {"SwitchableNorm", np.dtype("f4"), np.dtype("f8"), 1, 5} <= seen
    for what in ("training", "masked", "C-contiguous"):
        assert {(what, True), (what, False)} <= seen
