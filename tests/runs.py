"""What tests/bits.py runs: forwards and backwards of every layer, layout, dtype, mask and mode.

    python tests/runs.py THREADS PATTERN ...

prints a digest of each result of the package that is imported, as JSON. A NaN is a NaN, whatever
its bits.
"""

import contextlib
import fnmatch
import functools
import hashlib
import itertools
import json
import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any

import cases
import numpy as np
from cases import CASES, DTYPES, FORCED_VIEWS, LAYOUTS, by_id, channel, normal, over_axes

import numbanorm as nn
import numbanorm.functional as F

# Enough for several threads. Each is read in another way, or cut otherwise.
# fmt: off
LARGE = [
    replace(by_id["BatchNorm2d"], id="pieces", shape=(40, 4, 96, 96)),
    replace(by_id["BatchNorm2d"], id="pieces in parts", shape=(3, 4, 300, 301)),
    replace(by_id["SwitchableNorm2d"], id="pieces, mixed", shape=(30, 4, 57, 56)),
    replace(by_id["SwitchableNorm2d-all"], id="pieces, four mixed", shape=(16, 6, 40, 41)),
    channel("columns", lambda **k: nn.BatchNorm2d(70, axis=-1, **k),
            (16, 57, 60, 70), "bn", axis=-1, tracked=0),
    replace(by_id["BatchNorm2d-last"], id="columns, folded", shape=(20, 120, 122, 4)),
    replace(by_id["SwitchableNorm2d-last"], id="columns, mixed", shape=(9, 70, 71, 4)),
    over_axes("element rows", lambda **k: nn.LayerNorm(768, **k), (301, 768), (-1,), (-1,)),
    over_axes("element parts", lambda **k: nn.LayerNorm(70001, **k),
              (5, 70001), (-1,), (-1,)),
    over_axes("element rows, rms", lambda **k: nn.RMSNorm(1001, **k),
              (700, 1001), (-1,), (-1,), center=False, eps=None),
    replace(by_id["LayerNorm"], id="element rows, short", shape=(20001, 10)),
    replace(by_id["GroupNorm"], id="element rows, a weight for several", shape=(301, 6, 7, 7)),
    channel("element rows, in turn", lambda **k: nn.GroupNorm(32, 512, **k),
            (20, 512, 7, 7), "gn", groups=32),
    replace(by_id["Norm-columns"], id="element columns", shape=(7, 70, 60, 41)),
    replace(by_id["InstanceNorm2d"], id="group rows, one each", shape=(50, 4, 41, 40)),
    replace(by_id["GroupNorm"], id="group rows", shape=(30, 6, 50, 51)),
    replace(by_id["BatchNorm2d"], id="group rows, interleaved", shape=(40, 4, 30, 31)),
    replace(by_id["Norm-interleaved"], id="group rows, interleaved often", shape=(10, 30, 5, 300)),
    channel("group columns, across rows", lambda **k: nn.BatchNorm2d(257, **k),
            (50, 257, 5, 7), "bn", tracked=0),
    channel("group columns", lambda **k: nn.InstanceNorm2d(130, affine=True, axis=-1, **k),
            (9, 20, 21, 130), "in", axis=-1),
    channel("group columns, folded", lambda **k: nn.GroupNorm(4, 20, axis=-1, **k),
            (30, 33, 16, 20), "gn", groups=4, axis=-1),
    channel("group columns, narrow", lambda **k: nn.BatchNorm1d(301, **k),
            (700, 301), "bn", tracked=0),
]
# fmt: on
# Written with streaming stores at the cache size of most machines.
HUGE = [
    replace(by_id["InstanceNorm2d"], id="huge pieces", shape=(21, 4, 320, 321)),
    replace(by_id["BatchNorm2d-last"], id="huge columns", shape=(20, 200, 300, 4)),
    over_axes("huge rows", lambda **k: nn.LayerNorm(901, **k), (9001, 901), (-1,), (-1,)),
]
MASKS = ("none", "random", "empty groups")
MODES = ("train", "eval")
MEMORY = [name for name in cases.OUT_LAYOUTS if name != "C"]
STARTS = (0, 1, 13)  # where outputs begin, in elements


def special(x, *values):
    """Write NaN and Inf to the first, last and middle of x."""
    x = x.copy()
    x.flat[[0, x.size // 2, -1]] = np.nan, np.inf, -np.inf
    return x


VALUES = {
    "normal": lambda x: x,
    "offset": lambda x: x + x.dtype.type(1e6),
    "constant": lambda x: np.full_like(x, 1 / 3),
    "special": special,
}


@contextlib.contextmanager
def tuned(**limits):
    """Set limits of tuning, also in a state where they are constants in several modules."""
    try:
        from numbanorm import tuning
    except ImportError:
        from numbanorm import _axes, _normalize, _threads
    else:
        with tuning.use(**limits):
            yield
        return
    with contextlib.ExitStack() as stack:
        for limit, value in limits.items():
            name = {"overlap": "BESIDE", "cache_bytes": "cache_size"}.get(limit, limit.upper())
            module = next(m for m in (_axes, _threads, _normalize) if hasattr(m, name))
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, (lambda n=value: n) if name == "cache_size" else value)
        stack.callback(_axes.geometry.cache_clear)
        _axes.geometry.cache_clear()
        yield


@functools.lru_cache(maxsize=32)
def data(shape, seed, dtype, values="normal"):
    x = VALUES[values](normal(*shape, seed=seed, dtype=dtype))
    x.flags.writeable = False
    return x


@functools.lru_cache(maxsize=32)
def make_mask(shape, kind):
    if kind == "none":
        return None
    mask = normal(*shape, seed=2) < 0.5
    for axis in range(len(shape)) if kind == "empty groups" else ():
        np.moveaxis(mask, axis, 0)[0] = False
    return mask


def place(like, start):
    """Return an output that begins ``start`` elements after its memory, or None."""
    if start is None:
        return None
    return np.zeros(like.size + start, like.dtype)[start:].reshape(like.shape)


@dataclass(frozen=True)
class Run:
    """A forward and a backward of a layer: how, and with what."""

    case: cases.Case
    dtype: Any = np.float32
    mask: str = "none"
    mode: str = "train"
    values: str = "normal"
    memory: str = "C"
    start: int | None = None
    tuning: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self):
        """Say all that is not the default."""
        other = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)[2:]
            if getattr(self, f.name) not in (f.default, {})
        ]
        size = "x".join(map(str, self.case.shape))
        return " ".join((self.case.id, size, self.dtype.__name__, *other))

    def __call__(self):
        """Return y, dx, gradients and running statistics by name."""
        with tuned(**self.tuning):
            layer = self.case.layer(self.dtype, **self.options)
            getattr(layer, self.mode)()
            x = data(self.case.shape, 0, self.dtype, self.values)
            dy, mask = data(self.case.shape, 1, self.dtype), make_mask(self.case.shape, self.mask)
            if self.memory == "C":
                y, dx = place(x, self.start), place(dy, self.start)
            else:
                x, dy, y, dx = map(LAYOUTS[self.memory], (x, dy, np.zeros_like(x), dy * 0))
            found = {"y": layer(x, mask=mask, out=y), "dx": layer.backward(dy, out=dx)}
            found |= {f"d{name}": value for name, value in layer.gradients().items()}
            found |= {k: v for k, v in layer.state_dict().items() if k.startswith("running")}
            if self.memory == "C" and self.start is None:
                found["y over x"], found["dx over dy"] = x.copy(), dy.copy()
                layer(found["y over x"], mask=mask, out=found["y over x"])
                layer(x, mask=mask)
                layer.backward(found["dx over dy"], out=found["dx over dy"])
            return found


def runs():
    """Yield all runs."""

    def product(cases, **axes):
        for case, *values in itertools.product(cases, *axes.values()):
            yield Run(case, **dict(zip(axes, values, strict=True)))

    yield from product(CASES, dtype=DTYPES, mask=MASKS, mode=MODES)
    several, tracking, few = (
        [by_id[name] for name in names] for names in (cases.SEVERAL_AXES, cases.TRACKING, cases.FEW)
    )
    yield from product(several, dtype=DTYPES, mask=MASKS[:2], memory=MEMORY)
    yield from product(CASES, dtype=DTYPES, mode=MODES, values=[*VALUES][1:])
    yield from product(tracking, values=["special"], options=[{"skip_nonfinite": True}])
    yield from product(
        cases.SWITCHABLE, dtype=DTYPES, mask=MASKS, mode=MODES, options=[{"sample_variance": True}]
    )
    always = {"parallel_from": 0, "stream_from": 1, "stream_parts_from": 1, "cache_bytes": 0}
    for limits, case, shape, _ in FORCED_VIEWS.values():
        forced = replace(by_id[case], shape=shape)
        never = {**limits, "parallel_from": 0, "cache_bytes": None}
        yield from product(
            [forced, *CASES], dtype=DTYPES, mask=MASKS[::2], mode=MODES, tuning=[never]
        )
        yield from product(
            [forced, *few],
            dtype=DTYPES, mask=MASKS[::2], mode=MODES, start=STARTS, tuning=[limits | always],
        )  # fmt: skip
    yield from product(LARGE, dtype=DTYPES, mask=MASKS, mode=MODES)
    yield from product(LARGE, dtype=DTYPES, values=[*VALUES][1:])
    yield from product(
        LARGE, dtype=DTYPES, mask=MASKS[:2], start=STARTS, tuning=[{"cache_bytes": 0}]
    )
    yield from product(HUGE, mode=MODES, start=STARTS)


def functions():
    """Yield the name of each call without a layer, and the call."""
    shape, logits, rows = (5, 6, 4, 7), normal(2, 3), normal(2, 7)
    for dtype, mask in itertools.product(DTYPES, MASKS):
        weight, bias, mean, deviation = normal(4, 6).astype(dtype)
        calls = {
            "batch_norm": (mean, deviation**2, weight, bias, True),
            "instance_norm": (mean, deviation**2, weight, bias, True),
            "group_norm": (3, weight, bias),
            "layer_norm": (7, *rows),
            "rms_norm": (7, rows[0]),
            "switchable_norm": (*logits, weight, bias, mean, deviation**2),
        }
        for name, args in calls.items():
            yield (
                f"{name} {dtype.__name__} {mask}",
                functools.partial(call_function, name, args, shape, dtype, mask),
            )
        for large, axes in itertools.product(
            [shape, (30, 60, 21, 31)], [None, 0, 1, -1, (0, 2), (0, 2, 3), (1, 3)]
        ):
            yield (
                f"moments {large} {axes} {dtype.__name__} {mask}",
                functools.partial(call_moments, axes, large, dtype, mask),
            )


def call_function(name, args, shape, dtype, mask):
    args = [np.copy(a) if isinstance(a, np.ndarray) else a for a in args]
    x, dy, mask = data(shape, 0, dtype), data(shape, 1, dtype), make_mask(shape, mask)
    found = {"y": getattr(F, name)(x, *args, mask=mask)}
    found["y again"], saved = getattr(F, f"{name}_forward")(x, *args, mask=mask)
    found |= getattr(F, f"{name}_backward")(dy, saved)._asdict()
    # Running statistics are written to.
    found |= {f"argument {i}": a for i, a in enumerate(args)}
    return {k: v for k, v in found.items() if v is not None}


def call_moments(axes, shape, dtype, mask):
    m = nn.moments(data(shape, 0, dtype), axes, mask=make_mask(shape, mask))
    return {"count": m.count, "mean": m.mean, "m2": m.m2, "m2 of twice": (m + m).m2}


def digest(array):
    """Return a hash of the shape, the type and the bits."""
    array = np.array(array, order="C")
    if array.dtype.kind == "f":
        array[np.isnan(array)] = np.nan
    head = f"{array.shape} {array.dtype}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()[:16]


def print_digests(patterns, threads):
    """Print, as JSON, the digests of all results of the package that is imported."""
    nn.set_num_threads(threads)
    calls = dict(itertools.chain(((run.name, run) for run in runs()), functions()))
    found = {}
    for name in calls:
        if any(fnmatch.fnmatch(name, f"*{pattern}*") for pattern in patterns):
            with np.errstate(all="ignore"):
                found[name] = {k: digest(v) for k, v in calls[name]().items()}
    json.dump({"package": nn.__file__, "digests": found}, sys.stdout)


if __name__ == "__main__":
    print_digests(sys.argv[2:], int(sys.argv[1]))
