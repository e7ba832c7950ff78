"""Tables that the tests share: layers, shapes, memory layouts, masks; and how results compare."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference as ref

import numbanorm as nn

DTYPES = [np.float32, np.float64]


def normal(*shape, seed=0, dtype=np.float64, offset=0.0):
    """Draw the same standard normal numbers for the same arguments."""
    return (offset + np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(dtype)


def assert_close(actual, expected, *, scale=0.0, dtype=None, what=""):
    """Compare to rounding: 16 eps in float32, 256 in float64, where the oracle rounds as well.

    `scale` is the size of what was added up, where that is more than the result: one for all, or
    that of each entry, which then stands for itself; `dtype` the type of x, where the result is
    stored in a wider one.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    if not actual.size:
        return
    eps = max(np.finfo(d).eps for d in (actual.dtype, dtype or actual.dtype))
    factor = 16 if eps > 1e-10 else 256
    # A gradient of some 1e-50 is 0 in float32.
    result = np.abs(expected) if np.ndim(scale) else np.abs(expected).max()
    bound = factor * eps * np.maximum(scale, result) + np.finfo(actual.dtype).tiny
    error = np.abs(actual.astype(np.float64) - expected)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    allowed = np.broadcast_to(bound, error.shape)[worst]
    assert np.all(error <= bound), (
        f"{what}: off by {error[worst]:.3g} at {worst} (allowed {allowed:.3g}): "
        f"{actual[worst]!r}, expected {expected[worst]!r}"
    )


@dataclass(frozen=True)
class Case:
    """A layer, the shape of an x for it, and its definition in the words of the reference."""

    id: str
    make: Callable[..., Any]
    shape: tuple[int, ...]
    statistics: Callable[[tuple[int, ...]], list[ref.Statistic]]
    feature_axes: tuple[int, ...]
    eps: float | None = 1e-5  # None: the machine epsilon of x
    center: bool = True
    momentum: float | None = 0.1
    tracked: int | None = None  # which of the statistics has running ones

    def layer(self, dtype=np.float64, *, filled=True, **options):
        """Make the layer, parameters and running statistics filled with random numbers."""
        layer = self.make(dtype=dtype, **options)
        if type(layer) is nn.Norm:
            layer(self.input(dtype))  # its parameters come from the first x
        return fill(layer) if filled else layer

    def input(self, dtype=np.float64, seed=0):
        return normal(*self.shape, seed=seed, dtype=dtype)

    def naive(self, layer, x, mask=None):
        """Run the definition with the layer's parameters and in its mode."""
        stats, running = self.statistics(x.shape), {}
        if self.tracked is not None and not layer.training:
            repeat = stats[self.tracked].size // max(layer.running_mean.size, 1)
            running[self.tracked] = tuple(
                np.tile(np.ravel(r).astype(np.float64), repeat)
                for r in (layer.running_mean, layer.running_var)
            )
        switch = getattr(layer, "mean_weight", None), getattr(layer, "var_weight", None)
        return ref.Naive(
            x,
            stats,
            layer.weight,
            layer.bias,
            feature_axes=self.feature_axes,
            eps=float(np.finfo(x.dtype).eps) if self.eps is None else self.eps,
            center=self.center,
            mask=mask,
            mean_weight=switch[0],
            var_weight=switch[1],
            running=running,
        )

    def check(self, layer, x, dy, mask=None, forward=None, backward=None):
        """Compare one forward and backward, and the running statistics, with the definition."""
        naive = self.naive(layer, x, mask)
        tracking = layer.training and self.tracked is not None
        if tracking:
            running = ref.track(
                layer.running_mean,
                layer.running_var,
                naive,
                self.tracked,
                self.momentum,
                int(layer.num_batches_tracked) + 1,
            )
        layer.zero_grad()
        y = forward(layer, x) if forward else layer(x, mask=mask)
        assert y.dtype == x.dtype
        assert_close(y, naive.y, scale=scale_of(naive, "y", x), what="y")
        dx = backward(layer, dy) if backward else layer.backward(dy)
        assert dx.dtype == x.dtype
        expected = naive.backward(dy)
        assert_close(dx, expected.pop("dx"), scale=scale_of(naive, "dx", x), what="dx")
        gradients = layer.gradients()
        assert set(gradients) == set(expected) == set(layer.parameters())
        for name, value in expected.items():
            scale = scale_of(naive, name, x)
            assert_close(gradients[name], value, scale=scale, dtype=x.dtype, what=name)
        if tracking:
            for name, value in zip(("running_mean", "running_var"), running, strict=True):
                assert_close(getattr(layer, name), value, scale=1, dtype=x.dtype, what=name)


def scale_of(naive, name, x):
    """Return the scale of a result of the oracle, with what the oracle itself rounds."""
    scale, double = naive.scale[name], x.dtype == np.float64
    # What 256 eps of float64 are in 16 of float32.
    magnified = naive.magnified * (1 if double else 2**-25)
    if name == "y":
        own = np.maximum(scale, naive.over_groups(magnified))
        most = max(1, np.abs(naive.y).max(initial=0))
    else:
        if name == "dx":
            factor = naive.over_groups(magnified)
        elif name in ("weight", "bias"):
            factor = magnified.max(naive.over_features, initial=0).reshape(scale.shape)
        else:
            factor = magnified.max(initial=0)
        own, most = scale * np.maximum(1, factor), scale.max(initial=0)
    return own if double else np.minimum(own, most)


def fill(layer, seed=0):
    """Fill parameters and running statistics with random numbers, in place."""
    draw = np.random.default_rng(seed).standard_normal
    for p in layer.parameters().values():
        p[...] = 0.5 + draw(p.shape)
    if layer.running_mean is not None:
        layer.running_mean[...] = draw(layer.running_mean.shape)
        layer.running_var[...] = 0.5 + draw(layer.running_var.shape) ** 2
    return layer


def state(layer):
    """Copy everything that a failed call must not change."""
    kept = {f"gradient of {k}": v.copy() for k, v in layer.gradients().items()}
    kept |= {k: np.array(v) for k, v in layer.parameters().items()}
    kept |= {k: np.array(v) for k, v in layer.state_dict().items()}
    return kept | {"training": np.array(layer.training)}


def assert_same_state(layer, before, but=()):
    after = state(layer)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if name not in but:
            np.testing.assert_array_equal(after[name], value, err_msg=name, strict=True)


# -- layers --------------------------------------------------------------------------------------


def channel(name, make, shape, *kinds, axis=1, groups=1, tracked=None, **more):
    """Describe a layer with a channel axis, by the statistics it takes."""

    def statistics(shape):
        return [ref.channel_statistic(k, shape, groups, axis) for k in kinds]

    return Case(name, make, shape, statistics, (axis,), tracked=tracked, **more)


def over_axes(name, make, shape, axes, feature_axes, groups=1, **more):
    """Describe a layer by the axes it reduces."""

    def statistics(shape):
        return [ref.statistic(shape, axes, groups)]

    return Case(name, make, shape, statistics, feature_axes, **more)


def switchable(name, make, shape, *over, axis=1, groups=1, untracked=False, **more):
    tracked = over.index("bn") if "bn" in over and not untracked else None
    return channel(name, make, shape, *over, axis=axis, groups=groups, tracked=tracked, **more)


# fmt: off
BATCH = [
    channel("BatchNorm1d", lambda **k: nn.BatchNorm1d(5, **k), (7, 5), "bn", tracked=0),
    channel("BatchNorm1d-ncl", lambda **k: nn.BatchNorm1d(3, **k), (4, 3, 9), "bn", tracked=0),
    channel("BatchNorm2d", lambda **k: nn.BatchNorm2d(4, **k), (3, 4, 5, 6), "bn", tracked=0),
    channel("BatchNorm2d-last", lambda **k: nn.BatchNorm2d(4, axis=-1, **k),
            (3, 5, 6, 4), "bn", axis=-1, tracked=0),
    channel("BatchNorm3d", lambda **k: nn.BatchNorm3d(3, **k), (2, 3, 2, 4, 3), "bn", tracked=0),
    channel("BatchNorm3d-last", lambda **k: nn.BatchNorm3d(3, axis=-1, **k),
            (2, 2, 4, 3, 3), "bn", axis=-1, tracked=0),
    channel("BatchNorm-6d", lambda **k: nn.BatchNorm(3, **k),
            (2, 3, 2, 1, 2, 3), "bn", tracked=0),
    channel("BatchNorm-middle", lambda **k: nn.BatchNorm(4, axis=2, **k),
            (3, 5, 4, 2), "bn", axis=2, tracked=0),
    channel("BatchNorm2d-untracked", lambda **k: nn.BatchNorm2d(4, track_running_stats=False, **k),
            (3, 4, 5, 6), "bn"),
    channel("BatchNorm2d-plain", lambda **k: nn.BatchNorm2d(4, affine=False, **k),
            (3, 4, 5, 6), "bn", tracked=0),
    channel("BatchNorm2d-scale", lambda **k: nn.BatchNorm2d(4, bias=False, **k),
            (3, 4, 5, 6), "bn", tracked=0),
    channel("BatchNorm2d-cumulative", lambda **k: nn.BatchNorm2d(4, momentum=None, **k),
            (3, 4, 5, 6), "bn", tracked=0, momentum=None),
    channel("BatchNorm2d-eps", lambda **k: nn.BatchNorm2d(4, eps=0.1, momentum=0.7, **k),
            (3, 4, 5, 6), "bn", tracked=0, momentum=0.7, eps=0.1),
]

INSTANCE = [
    channel("InstanceNorm1d", lambda **k: nn.InstanceNorm1d(3, **k), (4, 3, 9), "in"),
    channel("InstanceNorm2d", lambda **k: nn.InstanceNorm2d(4, affine=True, **k),
            (3, 4, 5, 6), "in"),
    channel("InstanceNorm2d-last", lambda **k: nn.InstanceNorm2d(4, affine=True, axis=-1, **k),
            (3, 5, 6, 4), "in", axis=-1),
    channel("InstanceNorm3d", lambda **k: nn.InstanceNorm3d(3, affine=True, **k),
            (2, 3, 2, 4, 3), "in"),
    channel("InstanceNorm-6d", lambda **k: nn.InstanceNorm(3, affine=True, **k),
            (2, 3, 2, 1, 2, 3), "in"),
    channel("InstanceNorm2d-tracking",
            lambda **k: nn.InstanceNorm2d(4, affine=True, track_running_stats=True, **k),
            (3, 4, 5, 6), "in", tracked=0),
    channel("InstanceNorm2d-tracking-last",
            lambda **k: nn.InstanceNorm2d(4, track_running_stats=True, axis=-1, **k),
            (3, 5, 6, 4), "in", axis=-1, tracked=0),
    channel("InstanceNorm1d-cumulative",
            lambda **k: nn.InstanceNorm1d(4, momentum=None, track_running_stats=True, **k),
            (3, 4, 7), "in", tracked=0, momentum=None),
]

GROUP = [
    channel("GroupNorm", lambda **k: nn.GroupNorm(2, 6, **k), (3, 6, 4, 5), "gn", groups=2),
    channel("GroupNorm-last", lambda **k: nn.GroupNorm(2, 6, axis=-1, **k),
            (3, 4, 5, 6), "gn", groups=2, axis=-1),
    channel("GroupNorm-nc", lambda **k: nn.GroupNorm(2, 6, **k), (5, 6), "gn", groups=2),
    channel("GroupNorm-ncl", lambda **k: nn.GroupNorm(3, 6, **k), (5, 6, 7), "gn", groups=3),
    channel("GroupNorm-1", lambda **k: nn.GroupNorm(1, 6, **k), (3, 6, 4, 5), "gn", groups=1),
    channel("GroupNorm-C", lambda **k: nn.GroupNorm(6, 6, **k), (3, 6, 4, 5), "gn", groups=6),
    channel("GroupNorm-plain", lambda **k: nn.GroupNorm(2, 6, affine=False, **k),
            (3, 6, 4, 5), "gn", groups=2),
    channel("GroupNorm-scale", lambda **k: nn.GroupNorm(2, 6, bias=False, **k),
            (3, 6, 4, 5), "gn", groups=2),
]

ROWS = [
    over_axes("LayerNorm", lambda **k: nn.LayerNorm(10, **k), (6, 10), (-1,), (-1,)),
    over_axes("LayerNorm-3d", lambda **k: nn.LayerNorm(9, **k), (3, 4, 9), (-1,), (-1,)),
    over_axes("LayerNorm-2axes", lambda **k: nn.LayerNorm((4, 5), **k),
              (3, 4, 5), (-1, -2), (-1, -2)),
    over_axes("LayerNorm-3axes", lambda **k: nn.LayerNorm([2, 4, 5], **k),
              (3, 2, 4, 5), (1, 2, 3), (1, 2, 3)),
    over_axes("LayerNorm-no-batch", lambda **k: nn.LayerNorm([7], **k), (7,), (0,), (0,)),
    over_axes("LayerNorm-plain", lambda **k: nn.LayerNorm(10, elementwise_affine=False, **k),
              (6, 10), (-1,), (-1,)),
    over_axes("LayerNorm-scale", lambda **k: nn.LayerNorm(10, bias=False, **k),
              (6, 10), (-1,), (-1,)),
    over_axes("RMSNorm", lambda **k: nn.RMSNorm(10, **k), (6, 10), (-1,), (-1,),
              center=False, eps=None),
    over_axes("RMSNorm-2axes", lambda **k: nn.RMSNorm((4, 5), eps=1e-3, **k),
              (3, 4, 5), (-1, -2), (-1, -2), center=False, eps=1e-3),
    over_axes("RMSNorm-plain", lambda **k: nn.RMSNorm(10, elementwise_affine=False, **k),
              (3, 2, 10), (-1,), (-1,), center=False, eps=None),
]

GENERIC = [
    over_axes("Norm-rows", lambda **k: nn.Norm(-1, **k), (3, 4, 9), (2,), (2,)),
    over_axes("Norm-batch", lambda **k: nn.Norm((0, 2, 3), track_stats=True, **k),
              (3, 4, 5, 6), (0, 2, 3), (1,), tracked=0),
    over_axes("Norm-batch-1-axis", lambda **k: nn.Norm(0, track_stats=True, **k),
              (7, 2, 3), (0,), (1, 2), tracked=0),
    over_axes("Norm-columns", lambda **k: nn.Norm(1, **k), (3, 5, 4, 2), (1,), (1,)),
    over_axes("Norm-columns-tracked", lambda **k: nn.Norm(1, track_stats=True, **k),
              (3, 5, 4, 9), (1,), (1,), tracked=0),
    over_axes("Norm-scattered", lambda **k: nn.Norm((0, 2), track_stats=True, **k),
              (3, 4, 5, 6), (0, 2), (1, 3), tracked=0),
    over_axes("Norm-features-all", lambda **k: nn.Norm(0, feature_axes=(0, 1), **k),
              (5, 4), (0,), (0, 1)),
    over_axes("Norm-interleaved", lambda **k: nn.Norm((1, 3), feature_axes=2, **k),
              (3, 4, 5, 6), (1, 3), (2,)),
    over_axes("Norm-odd-axes", lambda **k: nn.Norm((1, 3), **k), (3, 4, 5, 6), (1, 3), (1, 3)),
    over_axes("Norm-outer", lambda **k: nn.Norm((0, 1), track_stats=True, momentum=None, **k),
              (3, 4, 5), (0, 1), (2,), tracked=0, momentum=None),
    over_axes("Norm-all", lambda **k: nn.Norm((0, 1, 2), track_stats=True, **k),
              (3, 4, 5), (0, 1, 2), (), tracked=0),
    over_axes("Norm-all-rows-tracked", lambda **k: nn.Norm((1, 2), track_stats=True, **k),
              (3, 4, 5), (1, 2), (1, 2), tracked=0),
    over_axes("Norm-features-channel",
              lambda **k: nn.Norm((2, 3), feature_axes=1, track_stats=True, **k),
              (3, 4, 5, 6), (2, 3), (1,), tracked=0),
    over_axes("Norm-features-other",
              lambda **k: nn.Norm((0, 2, 3), feature_axes=(1, -1), **k),
              (3, 4, 5, 6), (0, 2, 3), (1, 3)),
    over_axes("Norm-groups", lambda **k: nn.Norm((1, 2, 3), feature_axes=1, groups=2, **k),
              (3, 6, 4, 5), (1, 2, 3), (1,), groups=2),
    over_axes("Norm-groups-per-element", lambda **k: nn.Norm((1, 2), groups=2, **k),
              (3, 6, 4), (1, 2), (1, 2), groups=2),
    over_axes("Norm-groups-batch",
              lambda **k: nn.Norm((0, 1, 2), feature_axes=1, groups=3, track_stats=True, **k),
              (3, 6, 4), (0, 1, 2), (1,), groups=3, tracked=0),
    over_axes("Norm-rms-channel",
              lambda **k: nn.Norm((1, 2), feature_axes=1, center=False, bias=False, **k),
              (3, 4, 5), (1, 2), (1,), center=False),
    over_axes("Norm-rms-bias", lambda **k: nn.Norm(-1, center=False, **k),
              (3, 4, 5), (2,), (2,), center=False),
    over_axes("Norm-rms-batch", lambda **k: nn.Norm((0, 2), center=False, **k),
              (3, 4, 5), (0, 2), (1,), center=False),
    over_axes("Norm-plain", lambda **k: nn.Norm((0, 2), affine=False, track_stats=True, **k),
              (3, 4, 5), (0, 2), (1,), tracked=0),
    over_axes("Norm-shape", lambda **k: nn.Norm((0, 2), shape=(4,), **k),
              (3, 4, 5), (0, 2), (1,)),
]

SWITCHABLE = [
    switchable("SwitchableNorm1d", lambda **k: nn.SwitchableNorm1d(4, **k), (8, 4), "ln", "bn"),
    switchable("SwitchableNorm1d-ncl", lambda **k: nn.SwitchableNorm1d(4, **k),
               (3, 4, 7), "ln", "bn"),
    switchable("SwitchableNorm1d-in", lambda **k: nn.SwitchableNorm1d(4, over=("in", "bn"), **k),
               (8, 4), "in", "bn"),
    switchable("SwitchableNorm2d", lambda **k: nn.SwitchableNorm2d(4, **k),
               (3, 4, 5, 6), "in", "ln", "bn"),
    switchable("SwitchableNorm2d-last", lambda **k: nn.SwitchableNorm2d(4, axis=-1, **k),
               (3, 5, 6, 4), "in", "ln", "bn", axis=-1),
    switchable("SwitchableNorm3d", lambda **k: nn.SwitchableNorm3d(3, **k),
               (2, 3, 2, 4, 3), "in", "ln", "bn"),
    switchable("SwitchableNorm-6d", lambda **k: nn.SwitchableNorm(3, **k),
               (2, 3, 2, 1, 2, 3), "in", "ln", "bn"),
    switchable("SwitchableNorm2d-all",
               lambda **k: nn.SwitchableNorm2d(6, over=("gn", "bn", "in", "ln"), num_groups=2, **k),
               (3, 6, 5, 4), "gn", "bn", "in", "ln", groups=2),
    switchable("SwitchableNorm2d-all-last",
               lambda **k: nn.SwitchableNorm2d(
                   6, over=("ln", "gn", "bn", "in"), num_groups=3, axis=-1, **k),
               (3, 5, 4, 6), "ln", "gn", "bn", "in", groups=3, axis=-1),
    switchable("SwitchableNorm2d-untracked",
               lambda **k: nn.SwitchableNorm2d(4, track_running_stats=False, **k),
               (3, 4, 5, 6), "in", "ln", "bn", untracked=True),
    switchable("SwitchableNorm2d-plain", lambda **k: nn.SwitchableNorm2d(4, affine=False, **k),
               (3, 4, 5, 6), "in", "ln", "bn"),
    switchable("SwitchableNorm2d-scale", lambda **k: nn.SwitchableNorm2d(4, bias=False, **k),
               (3, 4, 5, 6), "in", "ln", "bn"),
    switchable("SwitchableNorm2d-no-bn", lambda **k: nn.SwitchableNorm2d(4, over=("in", "ln"), **k),
               (3, 4, 5, 6), "in", "ln"),
    switchable("SwitchableNorm2d-cumulative",
               lambda **k: nn.SwitchableNorm2d(4, momentum=None, **k),
               (3, 4, 5, 6), "in", "ln", "bn", momentum=None),
]

CASES = [*BATCH, *INSTANCE, *GROUP, *ROWS, *GENERIC, *SWITCHABLE]
# fmt: on
by_id = {case.id: case for case in CASES}
TRACKING = [case.id for case in CASES if case.tracked is not None]
# Of x with several axes, which can be laid out otherwise and have masks of other shapes.
SEVERAL_AXES = [case.id for case in CASES if len(case.shape) > 1]


def cases(*names):
    """Parametrise `case` over the named ones, or over all."""
    chosen = [by_id[n] for n in names] or CASES
    return pytest.mark.parametrize("case", chosen, ids=[c.id for c in chosen])


# One of each way through the kernels: both channel positions, rows, scattered axes, groups.
FEW = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm2d-last", "InstanceNorm2d-tracking",
    "InstanceNorm2d-last", "GroupNorm", "GroupNorm-last", "LayerNorm", "LayerNorm-3axes",
    "RMSNorm", "Norm-columns", "Norm-scattered", "Norm-groups-per-element", "SwitchableNorm1d",
    "SwitchableNorm2d", "SwitchableNorm2d-all", "SwitchableNorm2d-all-last",
]  # fmt: skip


# -- shapes, channels at axis 1: the tests put them last as well ---------------------------------

CHANNEL_SHAPES = {
    "one value in all": (1, 1, 1),
    "two values": (2, 1, 1),
    "(N, C)": (9, 5),
    "(N, C), one sample": (1, 6),
    "(N, C), one channel": (11, 1),
    "(N, C), a row less than 64 chunks": (63, 3),
    "(N, C), 64 rows": (64, 3),
    "(N, C), a row more than 64 chunks": (65, 3),
    "(N, C), rows for many chunks": (2049, 17),
    "(N, C), more channels than a vector of float32": (129, 67),
    "(N, C), more channels than a block": (3, 4099),
    "rows of 1": (5, 4, 1, 1),
    "rows of 2": (2, 3, 2),
    "rows of 49": (4, 6, 7, 7),
    "odd sizes": (3, 5, 9, 11),
    "a batch of one": (1, 5, 9, 11),
    "one channel": (3, 1, 9, 11),
    "three channels of an image": (2, 3, 33, 31),
    "many channels": (2, 259, 3, 5),
    "inner axis of 1": (2, 3, 8, 1),
    "outer axis of 1": (2, 3, 1, 8),
    "video": (2, 3, 3, 5, 7),
    "a row less one than 1024": (2, 3, 1023),
    "a row more one than 1024": (2, 3, 1025),
    "a row less one than 2048": (2, 3, 2047),
    "a row of 2048": (2, 3, 2048),
    "a row more one than 2048": (2, 3, 2049),
    "a row less one than 4096": (1, 2, 4095),
    "a row more one than 4096": (1, 2, 4097),
    "a chunk less one": (2, 2, 32767),
    "a chunk": (2, 2, 32768),
    "a chunk and one": (2, 2, 32769),
    "two chunks and one, one row": (1, 1, 65537),
    "several short rows to a chunk, and a rest": (37, 31, 49),
    "a chunk of channels last, and a rest": (1, 3, 181, 183),
    "no samples": (0, 3, 4),
    "no values": (2, 3, 0),
    "no values in the middle": (2, 3, 0, 4),
}

ROW_SHAPES = {
    "one value": (1, 1),
    "rows of 1": (5, 1),
    "rows of 2": (5, 2),
    "one row": (1, 13),
    "odd": (7, 13),
    "rows of 3": (1000, 3),
    "rows of 49": (33, 49),
    "rows of 128": (65, 128),
    "rows less one than 1024": (3, 1023),
    "rows more one than 1024": (3, 1025),
    "rows less one than 2048": (3, 2047),
    "rows of 2048": (3, 2048),
    "rows more one than 2048": (3, 2049),
    "rows more one than 4096": (3, 4097),
    "a chunk less one": (2, 32767),
    "a chunk and one": (2, 32769),
    "more than two chunks": (2, 70001),
    "many rows to a chunk, and a rest": (2111, 48),
    "three axes": (5, 7, 11),
    "no rows": (0, 5),
}


def shapes(table):
    return pytest.mark.parametrize("shape", table.values(), ids=table.keys())


# -- layouts of the kernels: small arrays take them all, as the limits are others ----------------

# For each, limits of tuning, a case and a shape that then take the view.
FORCED_VIEWS = {
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
    "parts of rows with a weight for each element": (
        {"long_row": 1, "element_part": 17, "row_part": 23}, "LayerNorm-3axes", (3, 2, 4, 5),
        (3, 40),
    ),
    "interleaved rows": (
        {"short_row": 0, "row_run": 60}, "BatchNorm2d", (3, 4, 5, 6), (1, 3, 4, 30)
    ),
    "interleaved rows, several times": (
        {"short_row": 0, "row_run": 60}, "Norm-interleaved", (3, 4, 5, 6), (3, 4, 5, 6)
    ),
    "across rows": (
        {"many_rows": 1, "column_width": 70}, "BatchNorm2d", (3, 4, 5, 6), (1, 3, 120)
    ),
    "across rows that are short for how many they are": (
        {"row_over_rows": 10, "column_width": 70}, "BatchNorm2d", (3, 4, 5, 6), (1, 3, 120)
    ),
    "columns": (
        {"column_fold": 1, "column_width": 2, "long_task": 1},
        "BatchNorm2d-last", (3, 5, 6, 4), (1, 90, 4),
    ),
    "columns, folded": ({"column_fold": 12}, "BatchNorm2d-last", (3, 5, 6, 4), (1, 30, 12)),
    "columns with a weight for each row": (
        {"column_run": 64}, "Norm-columns", (2, 5, 10, 13), (2, 5, 130)
    ),
    "groups of columns": ({"column_fold": 1}, "GroupNorm-last", (3, 8, 8, 6), (3, 64, 6)),
    "groups of columns, folded": ({}, "GroupNorm-last", (3, 8, 8, 6), (3, 16, 24)),
}  # fmt: skip


# -- memory layouts: the same values, laid out otherwise -----------------------------------------


def _sliced(x):
    wide = np.full([2 * s + 1 for s in x.shape], np.nan, x.dtype)
    view = wide[tuple(slice(1, 2 * s + 1, 2) for s in x.shape)]
    view[...] = x
    return view


def _inner_part(x):
    wide = np.full([*x.shape[:-1], x.shape[-1] + 3], np.nan, x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def _negative(x):
    back = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[back])[back]


def _negative_inner(x):
    return np.ascontiguousarray(x[..., ::-1])[..., ::-1]


def _channels_last(x):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def _channels_first(x):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 1)), 1, -1)


def _swapped(x):
    return np.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1)


def _misaligned(x):
    raw = np.empty(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "every second of each axis": _sliced,
    "part of a longer row": _inner_part,
    "all axes backwards": _negative,
    "inner axis backwards": _negative_inner,
    "channels last in memory": _channels_last,
    "channels first in memory": _channels_first,
    "outer and inner axis swapped": _swapped,
    "misaligned": _misaligned,
    "read-only": _read_only,
}
# An output is written to, and is not read-only.
OUT_LAYOUTS = {k: v for k, v in LAYOUTS.items() if k != "read-only"}


def layouts(name="layout", table=LAYOUTS):
    return pytest.mark.parametrize(name, table.values(), ids=table.keys())


# -- masks: random, of some shape that broadcasts to x -------------------------------------------


def _random_mask(shape, seed):
    return np.random.default_rng([seed, *shape]).random(shape) < 0.6


def _thin(shape, keep):
    """Keep the sizes of some axes, 1 for the others."""
    return tuple(s if keep(a) else 1 for a, s in enumerate(shape))


MASKS = {
    "full": lambda s: _random_mask(s, 0),
    "by sample": lambda s: _random_mask(_thin(s, lambda a: a == 0), 6),
    "one for all samples": lambda s: _random_mask(_thin(s, lambda a: a > 0), 0),
    "without the batch axis": lambda s: _random_mask(s[1:], 2),
    "by inner index": lambda s: _random_mask(s[-1:], 3),
    "outer and inner": lambda s: _random_mask(_thin(s, lambda a: a in (0, len(s) - 1)), 1),
    "padded lengths": lambda s: (
        np.arange(s[-1]) < 1 + np.arange(s[0]).reshape(-1, *[1] * (len(s) - 1)) % s[-1]
    ),
    "Fortran": lambda s: np.asfortranarray(_random_mask(s, 4)),
    "all True": lambda s: np.ones(s, dtype=bool),
    "all False": lambda s: np.zeros(s, dtype=bool),
    "a scalar": lambda s: np.array(True),
}


def masks(*names):
    chosen = {k: MASKS[k] for k in names} if names else MASKS
    return pytest.mark.parametrize("make_mask", chosen.values(), ids=chosen.keys())
