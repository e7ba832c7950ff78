"""The table of cases that compare.py and the asv benchmarks share: what is normalised, where.

Each library has one function that makes a :class:`Runner` for a case. Data and gradients are the
same in all of them, so that results can be compared before anything is timed.

With NUMBANORM_BENCH_SMALL=1 in the environment, the images and rows keep their names and get
small: to see that everything runs, not how fast.
"""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Passes over memory that cannot be avoided, in units of one array read or written: forward in
# training, forward in evaluation, backward. The batch does not fit in a cache, so that x is read
# twice in forward, x and dy twice in backward; a sample, an instance or a row does.
PASSES = {
    "batch": (3, 2, 5),
    "instance": (2, 2, 3),
    "group": (2, 2, 3),
    "switchable": (3, 3, 5),
    "layer": (2, 2, 3),
    "rms": (2, 2, 3),
}
GROUPS = 32


class Case(NamedTuple):
    """One row: a layer on an array.

    ``shape`` is that of the array in memory; the channels are axis 1, or the last one if
    ``layout`` is "last". ``layout`` "first" of "layer" and "rms" normalises over axis 1.
    """

    layer: str
    shape: tuple[int, ...]
    layout: str = "first"
    dtype: str = "float32"
    masked: bool = False
    offset: float = 0

    @property
    def name(self) -> str:
        """Name the case as it stands in tables: batch 64x64x56x56 last."""
        parts = [self.layer, "x".join(map(str, self.shape))]
        parts += [self.layout] if self.layout == "last" or self.per_row_first else []
        parts += ["float64"] if self.dtype == "float64" else []
        parts += [f"at {self.offset:.0e}"] if self.offset else []
        return " ".join(parts + (["masked"] if self.masked else []))

    @property
    def per_row_first(self) -> bool:
        """Whether a LayerNorm is over axis 1 instead of the last one."""
        return self.layer in ("layer", "rms") and self.layout == "first"

    @property
    def axis(self) -> int:
        """The channel axis, or the one that is normalised."""
        return 1 if self.layout == "first" else len(self.shape) - 1

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return x, dy, weight and bias."""
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal(self.shape, dtype="float32") for _ in range(2))
        weight, bias = rng.standard_normal((2, self.shape[self.axis])) * 0.1 + 1
        return tuple(
            array.astype(self.dtype) for array in (x * 2 + (1 + self.offset), dy, weight, bias)
        )

    def mask(self) -> np.ndarray | None:
        """Return a mask of four fifths of the elements, or None."""
        if not self.masked:
            return None
        return np.random.default_rng(1).random(self.shape, dtype="float32") < 0.8


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the same image with its channels last."""
    return (shape[0], *shape[2:], shape[1])


IMAGES = {
    "resnet 56x56": (64, 64, 56, 56),
    "resnet 28x28": (32, 256, 28, 28),
    "resnet 7x7": (64, 512, 7, 7),
    "small 32x32": (8, 64, 32, 32),
    "video": (4, 32, 16, 56, 56),
}
ROWS = {
    "bert": (16384, 768),
    "wide": (2048, 4096),
    "narrow": (4096, 128),
    "vit": (64, 197, 768),
}
if os.environ.get("NUMBANORM_BENCH_SMALL"):
    IMAGES = {name: (2, s[1], *(4 for _ in s[2:])) for name, s in IMAGES.items()}
    ROWS = {name: (*(8 for _ in s[1:]), s[-1]) for name, s in ROWS.items()}
# What is over in microseconds, so that the way to the kernels counts.
SMALL = (Case("batch", (32, 64)), Case("batch", (8, 16, 8, 8)), Case("layer", (32, 128), "last"))
CASES = [
    *(
        Case(layer, shape if layout == "first" else channels_last(shape), layout)
        for layer in ("batch", "instance", "group", "switchable")
        for shape in IMAGES.values()
        for layout in ("first", "last")
    ),
    Case("batch", (8192, 1024)),
    *SMALL,
    *(Case(layer, shape, "last") for layer in ("layer", "rms") for shape in ROWS.values()),
    *(Case(layer, (32, 96, 56, 56)) for layer in ("layer", "rms")),
    Case("batch", (64, 3, 224, 224)),
    Case("batch", (64, 224, 224, 3), "last"),
    Case("batch", (32, 64, 56, 56), dtype="float64"),
    Case("switchable", (32, 64, 56, 56), dtype="float64"),
    Case("layer", (8192, 768), "last", dtype="float64"),
    *(
        Case(layer, shape if layout == "first" else channels_last(shape), layout, masked=True)
        for layer, shape, layout in (
            ("batch", IMAGES["resnet 56x56"], "first"),
            ("batch", IMAGES["resnet 56x56"], "last"),
            ("batch", (8192, 1024), "first"),
            ("instance", IMAGES["resnet 28x28"], "first"),
            ("group", IMAGES["resnet 7x7"], "first"),
            ("group", IMAGES["resnet 28x28"], "last"),
            ("switchable", IMAGES["resnet 56x56"], "first"),
            ("switchable", IMAGES["resnet 56x56"], "last"),
        )
    ),
    Case("layer", ROWS["bert"], "last", masked=True),
]


class Runner(NamedTuple):
    """How a library does a case; forwards keep what backward needs and return y.

    ``arrays`` are x, y, dy and dx, if they are the same for all calls.
    """

    train: Callable[[], Any]
    evaluate: Callable[[], Any]
    backward: Callable[[], Any]
    gradients: Callable[[], list[np.ndarray]]
    arrays: tuple[np.ndarray, ...] = ()


def numbanorm_layer(case: Case) -> Any:
    """Return the layer of a case."""
    import numbanorm

    _, _, weight, bias = case.data()
    channels, axis = case.shape[case.axis], case.axis
    dtype = np.dtype(case.dtype)
    make = {
        "batch": lambda: numbanorm.BatchNorm(channels, axis=axis, dtype=dtype),
        "instance": lambda: numbanorm.InstanceNorm(channels, affine=True, axis=axis, dtype=dtype),
        "group": lambda: numbanorm.GroupNorm(GROUPS, channels, axis=axis, dtype=dtype),
        "switchable": lambda: numbanorm.SwitchableNorm(channels, axis=axis, dtype=dtype),
        "layer": lambda: numbanorm.Norm(axis, shape=channels, dtype=dtype),
        "rms": lambda: numbanorm.Norm(
            axis, shape=channels, center=False, bias=False, eps=None, dtype=dtype
        ),
    }
    layer = make[case.layer]()
    # In place: the first commits that asv measures have no other way.
    parameters = layer.parameters()
    parameters["weight"][...] = weight
    if "bias" in parameters:
        parameters["bias"][...] = bias
    return layer


def numbanorm_runner(case: Case, fresh: bool = False) -> Runner:
    """Return how numbanorm does a case, into ``out=`` or into fresh memory."""
    layer = numbanorm_layer(case)
    x, dy, _, _ = case.data()
    mask = case.mask()
    y, dx = (None, None) if fresh else (np.ones_like(x), np.ones_like(x))

    def gradients() -> list[np.ndarray]:
        found = layer.gradients()
        return [found[name].copy() for name in found]

    return Runner(
        lambda: layer.train().forward(x, mask=mask, out=y),
        lambda: layer.eval().forward(x, mask=mask, out=y),
        lambda: layer.backward(dy, out=dx),
        gradients,
        () if y is None or dx is None else (x, y, dy, dx),
    )


def torch_switchable(torch: Any, channels: int, dims: int) -> Any:
    """Return SwitchableNorm written plainly in PyTorch, as people write it."""

    class SwitchableNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = (1, channels, *(1,) * dims)
            self.weight = torch.nn.Parameter(torch.ones(shape))
            self.bias = torch.nn.Parameter(torch.zeros(shape))
            self.mean_weight = torch.nn.Parameter(torch.ones(3))
            self.var_weight = torch.nn.Parameter(torch.ones(3))
            self.register_buffer("running_mean", torch.zeros(shape))
            self.register_buffer("running_var", torch.ones(shape))

        def forward(self, x: Any) -> Any:
            space = tuple(range(2, x.ndim))
            mean_in = x.mean(space, keepdim=True)
            var_in = x.var(space, unbiased=False, keepdim=True)
            mean_ln = mean_in.mean(1, keepdim=True)
            square = var_in + mean_in**2
            var_ln = square.mean(1, keepdim=True) - mean_ln**2
            if self.training:
                mean_bn = mean_in.mean(0, keepdim=True)
                var_bn = square.mean(0, keepdim=True) - mean_bn**2
                n = x.numel() / x.shape[1]
                self.running_mean.lerp_(mean_bn.detach(), 0.1)
                self.running_var.lerp_(var_bn.detach() * n / (n - 1), 0.1)
            else:
                mean_bn, var_bn = self.running_mean, self.running_var
            p, q = self.mean_weight.softmax(0), self.var_weight.softmax(0)
            mean = p[0] * mean_in + p[1] * mean_ln + p[2] * mean_bn
            var = q[0] * var_in + q[1] * var_ln + q[2] * var_bn
            return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias

    return SwitchableNorm()


def torch_runner(case: Case) -> Runner:
    """Return how PyTorch does a case; masked ones as if there were no mask."""
    import torch

    data = case.data()
    dims = len(case.shape) - 2
    channels = case.shape[case.axis]
    x, dy, weight, bias = (torch.from_numpy(array) for array in data)
    if case.layer in ("layer", "rms"):
        kind = torch.nn.LayerNorm if case.layer == "layer" else torch.nn.RMSNorm
        layer: Any = kind(channels)
    else:
        if case.layout == "last":
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
        nn = torch.nn
        kinds = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        instances = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
        layer = {
            "batch": lambda: kinds[dims](channels),
            "instance": lambda: instances[dims](channels, affine=True),
            "group": lambda: nn.GroupNorm(GROUPS, channels),
            "switchable": lambda: torch_switchable(torch, channels, dims),
        }[case.layer]()
    layer = layer.to(x.dtype)
    with torch.no_grad():
        layer.weight.view(-1).copy_(weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.view(-1).copy_(bias)
    x.requires_grad_(True)

    def call(x: Any) -> Any:
        # PyTorch normalises over last axes only.
        return layer(x.movedim(1, -1)).movedim(-1, 1) if case.per_row_first else layer(x)

    kept: dict[str, Any] = {}

    def train() -> Any:
        layer.train()
        kept["y"] = call(x)
        return as_in_memory(kept["y"].detach())

    def evaluate() -> Any:
        layer.eval()
        with torch.no_grad():
            return as_in_memory(call(x))

    def backward() -> Any:
        x.grad = None
        kept.pop("y").backward(dy)
        return as_in_memory(x.grad)

    def as_in_memory(tensor: Any) -> np.ndarray:
        moved = case.layout == "last" and case.layer not in ("layer", "rms")
        array: np.ndarray = (tensor.movedim(1, -1) if moved else tensor).numpy()
        return array

    def gradients() -> list[np.ndarray]:
        names = ("weight", "bias", "mean_weight", "var_weight")
        found = [getattr(layer, name, None) for name in names]
        return [p.grad.numpy().reshape(-1).copy() for p in found if p is not None]

    return Runner(train, evaluate, backward, gradients)


def jax_runner(case: Case) -> Runner:
    """Return how JAX (jit) does a case, with statistics written plainly; not switchable ones."""
    import jax
    import jax.numpy as jnp

    if case.layer not in ("batch", "instance", "group", "layer", "rms"):
        raise NotImplementedError(f"{case.layer} is not written in JAX here")
    x, dy, weight, bias = (jnp.asarray(array) for array in case.data())
    axis, n = case.axis, len(case.shape)
    grid = tuple(-1 if a == axis else 1 for a in range(n))

    def apply(x: Any, weight: Any, bias: Any) -> Any:
        shape = x.shape
        if case.layer == "group":
            x = x.reshape((*shape[:axis], GROUPS, shape[axis] // GROUPS, *shape[axis + 1 :]))
            axes = tuple(a for a in range(1, n + 1) if a != axis)
        else:
            kept = {"batch": (axis,), "instance": (0, axis)}.get(case.layer)
            axes = (axis,) if kept is None else tuple(a for a in range(n) if a not in kept)
        if case.layer == "rms":
            eps = jnp.finfo(x.dtype).eps
            x_hat = x * jax.lax.rsqrt((x * x).mean(axes, keepdims=True) + eps)
            return x_hat.reshape(shape) * weight.reshape(grid)
        mean = x.mean(axes, keepdims=True)
        var = ((x - mean) ** 2).mean(axes, keepdims=True)
        x_hat = (x - mean) * jax.lax.rsqrt(var + 1e-5)
        return x_hat.reshape(shape) * weight.reshape(grid) + bias.reshape(grid)

    forward = jax.jit(apply)
    gradient = jax.jit(lambda x, w, b, dy: jax.vjp(apply, x, w, b)[1](dy))
    kept: dict[str, Any] = {}

    def backward() -> Any:
        kept["gradients"] = jax.block_until_ready(gradient(x, weight, bias, dy))
        return np.asarray(kept["gradients"][0])

    def gradients() -> list[np.ndarray]:
        _, dweight, dbias = kept["gradients"]
        return [np.asarray(dweight)] + ([] if case.layer == "rms" else [np.asarray(dbias)])

    def run() -> Any:
        return np.asarray(jax.block_until_ready(forward(x, weight, bias)))

    return Runner(run, run, backward, gradients)
