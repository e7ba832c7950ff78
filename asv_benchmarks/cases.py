"""The table of cases that compare.py and the asv benchmarks share: what is normalised, where.

Each library has one function that makes a :class:`Runner` for a case. Data and gradients are the
same in all of them, so that results can be compared before anything is timed.

With NUMBANORM_BENCH_SMALL=1 in the environment, the images and rows keep their names and get
small: to see that everything runs, not how fast.
"""

import contextlib
import copy
import fnmatch
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

HALF = ["float16"]
with contextlib.suppress(ImportError):
    import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it

    HALF.insert(0, "bfloat16")

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
RELU_FAMILY = ("relu", "leaky_relu", "relu6")
ACTIVATIONS = (*RELU_FAMILY, "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")


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
    activation: str | None = None
    residual: bool = False
    odd: bool = False

    @property
    def name(self) -> str:
        """Name the case as it stands in tables: batch 64x64x56x56 last."""
        parts = [self.layer, "x".join(map(str, self.shape))]
        parts += [self.layout] if self.layout == "last" or self.per_row_first else []
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [f"at {self.offset:.0e}"] if self.offset else []
        parts += ["residual"] if self.residual else []
        parts += [self.activation] if self.activation else []
        return " ".join(parts + (["masked"] if self.masked else []))

    @property
    def fused(self) -> bool:
        """Whether something follows the norm."""
        return self.residual or self.activation is not None

    @property
    def half(self) -> bool:
        """Whether its elements have 16 bits."""
        return self.dtype in HALF

    @property
    def groups(self) -> list[str]:
        """The groups of the summary that it belongs to."""
        if self.odd:
            return ["odd"]
        if self.masked:
            return ["masked"]
        if self.fused:
            found = ["fused", f"fused {self.dtype}"]
            if self.activation in RELU_FAMILY:
                found += [f"ReLU family{' + residual' * self.residual} {self.dtype}"]
            return found
        return ["half", self.dtype] if self.half else ["plain"]

    @property
    def base(self) -> "Case | None":
        """What it is a variant of: the same without a mask, the norm alone, or in float32."""
        if self.masked:
            return self._replace(masked=False)
        if self.fused:
            return self._replace(activation=None, residual=False)
        return self._replace(dtype="float32") if self.half else None

    @property
    def passes(self) -> tuple[int, ...]:
        """Passes over memory that cannot be avoided, see PASSES."""
        train, evaluate, backward = PASSES[self.layer]
        if not self.residual:
            return train, evaluate, backward
        # The slope is that at x and the residual, as often as dy is read.
        reads = 0 if self.activation is None else 2 if backward == 5 else 1
        return train + 1, evaluate + 1, backward + reads + 1

    @property
    def per_row_first(self) -> bool:
        """Whether a LayerNorm is over axis 1 instead of the last one."""
        return self.layer in ("layer", "rms") and self.layout == "first"

    @property
    def axis(self) -> int:
        """The channel axis, or the one that is normalised."""
        return 1 if self.layout == "first" else len(self.shape) - 1

    @property
    def num_groups(self) -> int:
        """The groups of a GroupNorm: where there are few channels, of two each."""
        return min(GROUPS, self.shape[self.axis] // 2)

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return x, dy, weight and bias."""
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal(self.shape, dtype="float32") for _ in range(2))
        weight, bias = rng.standard_normal((2, self.shape[self.axis])) * 0.1 + 1
        x, dy, weight, bias = (
            array.astype(self.dtype) for array in (x * 2 + (1 + self.offset), dy, weight, bias)
        )
        # Some have parameters of 16 bits, some of 32.
        return x, dy, weight.astype(self.parameter_dtype), bias.astype(self.parameter_dtype)

    @property
    def parameter_dtype(self) -> np.dtype[Any]:
        """The dtype of weight and bias."""
        return np.dtype("float32" if self.half else self.dtype)

    def mask(self) -> np.ndarray | None:
        """Return a mask of four fifths of the elements, or None."""
        if not self.masked:
            return None
        return np.random.default_rng(1).random(self.shape, dtype="float32") < 0.8

    def residual_array(self) -> np.ndarray | None:
        """Return what is added behind the norm, or None."""
        if not self.residual:
            return None
        array = np.random.default_rng(2).standard_normal(self.shape, dtype="float32")
        return array.astype(self.dtype)


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


def everywhere(*shapes: str, rows: str) -> list[Case]:
    """Return all layers on some images, at both positions of the channels, and on rows."""
    return [
        *(
            Case(layer, shape if layout == "first" else channels_last(shape), layout)
            for layer in ("batch", "instance", "group", "switchable")
            for shape in (IMAGES[name] for name in shapes)
            for layout in ("first", "last")
        ),
        *(Case(layer, ROWS[rows], "last") for layer in ("layer", "rms")),
    ]


CASES += [
    case._replace(dtype=dtype)
    for dtype in HALF
    for case in (
        everywhere("resnet 56x56", "resnet 28x28", "resnet 7x7", rows="bert")
        + [Case(layer, (32, 96, 56, 56)) for layer in ("layer", "rms")]
        if dtype == "bfloat16"
        else everywhere("resnet 28x28", rows="vit")
    )
]
CASES += [
    *(
        case._replace(dtype=dtype, activation="relu", residual=residual)
        for dtype in ("float32", *HALF[:-1])
        for case in everywhere("resnet 28x28", rows="vit")
        for residual in (False, True)
    ),
    *(
        Case("batch", IMAGES["resnet 56x56"], activation="relu", residual=residual)
        for residual in (False, True)
    ),
    *(
        Case("batch", IMAGES["resnet 28x28"], activation=activation, residual=residual)
        for activation in (None, *ACTIVATIONS[1:])
        for residual in (False, True)
        if residual or activation is not None
    ),
    Case("layer", ROWS["vit"], "last", activation="gelu"),
]
# Few samples of many elements, very many of a few, thin images: not what layers are made for, but
# what they meet. LayerNorm over (64, 56, 56) is one over a row of as many elements.
ODD = {
    "layer": [
        (1, 64 * 56 * 56), (4, 64 * 56 * 56), (16, 64 * 56 * 56), (1, 10**6), (1, 2 * 10**6),
        (2, 10**6), (64, 1 << 15), (512, 512), (4096, 8), (10**6, 2), (10**5, 20),
    ],
    "rms": [(1, 64 * 56 * 56), (4, 64 * 56 * 56), (1, 2 * 10**6), (10**5, 8)],
    "batch": [
        (2, 500000), (8, 4096, 3, 3), (8000, 256), (10**6, 2), (10**5, 20), (2, 1, 1000, 1000),
        (32, 256, 1, 1), (4, 8192, 2, 2), (64, 2, 2, 2),
    ],
    "group": [
        (1, 8, 200, 200), (8, 64, 1, 1), (1024, 64, 1, 1), (64, 512, 2, 2), (1, 64, 500, 500),
    ],
    "instance": [(2, 3, 1000, 1), (1, 1, 1000, 1000), (64, 512, 2, 2), (2, 3, 10**6, 1)],
}  # fmt: skip
CASES += [
    Case(layer, shape, "last" if layer in ("layer", "rms") else "first", odd=True)
    for layer, shapes in ODD.items()
    for shape in shapes
]


def choose(patterns: Iterable[str], groups: Iterable[str]) -> list[Case]:
    """Return the cases of some groups whose names fit a pattern."""
    return [
        case
        for case in CASES
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)
        and not {*groups}.isdisjoint(case.groups)
    ]


class Runner(NamedTuple):
    """How a library does a case; forwards keep what backward needs and return y.

    ``arrays`` are x, y, dy and dx, if they are the same for all calls. ``array`` makes an array of
    what came back, which no clock should see. Behind a residual, ``backward`` returns two.
    """

    train: Callable[[], Any]
    evaluate: Callable[[], Any]
    backward: Callable[[], Any]
    gradients: Callable[[], list[np.ndarray]]
    arrays: tuple[np.ndarray, ...] = ()
    array: Callable[[Any], np.ndarray] = np.asarray


def numbanorm_layer(case: Case) -> Any:
    """Return the layer of a case."""
    import numbanorm

    _, _, weight, bias = case.data()
    channels, axis = case.shape[case.axis], case.axis
    kind: dict[str, Any] = {"axis": axis, "dtype": case.parameter_dtype}
    # The first commits that asv measures have no such argument.
    then: dict[str, Any] = {} if case.activation is None else {"activation": case.activation}
    make = {
        "batch": lambda: numbanorm.BatchNorm(channels, **kind, **then),
        "instance": lambda: numbanorm.InstanceNorm(channels, affine=True, **kind, **then),
        "group": lambda: numbanorm.GroupNorm(case.num_groups, channels, **kind, **then),
        "switchable": lambda: numbanorm.SwitchableNorm(channels, **kind, **then),
        "layer": lambda: numbanorm.Norm(axis, shape=channels, dtype=kind["dtype"], **then),
        "rms": lambda: numbanorm.Norm(
            axis, shape=channels, center=False, bias=False, eps=None, dtype=kind["dtype"], **then
        ),
    }
    layer = make[case.layer]()
    # In place: the first commits that asv measures have no other way.
    parameters = layer.parameters()
    parameters["weight"][...] = weight
    if "bias" in parameters:
        parameters["bias"][...] = bias
    return layer


def numbanorm_runner(
    case: Case, fresh: bool = False, arrays: tuple[np.ndarray, ...] = ()
) -> Runner:
    """Return how numbanorm does a case, into ``out=``, some arrays if given, or fresh memory."""
    layer = numbanorm_layer(case)
    if not arrays:
        x, dy, _, _ = case.data()
        arrays = x, np.ones_like(x), dy, np.ones_like(x)
    x, y, dy, dx = arrays
    given: dict[str, Any] = {"mask": case.mask(), "out": None if fresh else y}
    into: dict[str, Any] = {"out": None if fresh else dx}
    if case.residual:
        given["residual"] = case.residual_array()
        into["out_residual"] = None if fresh else np.ones_like(x)

    def gradients() -> list[np.ndarray]:
        found = layer.gradients()
        return [found[name].copy() for name in found]

    def forward(training: bool) -> Any:
        # A change of mode is no part of a call, and the first of many alone has one.
        if layer.training != training:
            layer.train(training)
        return layer.forward(x, **given)

    return Runner(
        lambda: forward(True),
        lambda: forward(False),
        lambda: layer.backward(dy, **into),
        gradients,
        () if fresh else arrays,
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


def torch_activation(name: str | None, in_place: bool) -> Callable[[Any], Any]:
    """Return what PyTorch calls an activation."""
    from torch.nn import functional as F

    return {
        None: lambda v: v,
        "relu": lambda v: F.relu(v, in_place),
        "leaky_relu": lambda v: F.leaky_relu(v, 0.01, in_place),
        "relu6": lambda v: F.relu6(v, in_place),
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "sigmoid": lambda v: v.sigmoid(),
        "tanh": lambda v: v.tanh(),
    }[name]


def torch_runner(
    case: Case,
    in_place: bool = False,
    compiled: bool = False,
    half_weights: bool = False,
    converted: bool = False,
) -> Runner:
    """Return how PyTorch does a case; masked ones as if there were no mask.

    ``converted`` is by numbanorm's layers for it. ``in_place`` has addition and activation write
    over their input where PyTorch can. Weights beside 16 bits have 32, as under autocast, where its
    kernels take both.
    """
    import torch

    dims = len(case.shape) - 2
    channels = case.shape[case.axis]
    moved = case.layout == "last" and case.layer not in ("layer", "rms")

    def tensor(array: np.ndarray) -> Any:
        # torch.from_numpy knows no ml_dtypes.
        wide = torch.from_numpy(array.astype("float32") if case.half else array)
        return wide.to(getattr(torch, case.dtype))

    x, dy, weight, bias = map(tensor, case.data())
    added = case.residual_array()
    residual = None if added is None else tensor(added)
    if case.layer in ("layer", "rms"):
        kind = torch.nn.LayerNorm if case.layer == "layer" else torch.nn.RMSNorm
        layer: Any = kind(channels)
    else:
        if moved:
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
            residual = None if residual is None else residual.movedim(-1, 1)
        nn = torch.nn
        kinds = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        instances = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
        layer = {
            "batch": lambda: kinds[dims](channels),
            "instance": lambda: instances[dims](channels, affine=True),
            "group": lambda: nn.GroupNorm(case.num_groups, channels),
            "switchable": lambda: torch_switchable(torch, channels, dims),
        }[case.layer]()
    if not case.half or half_weights or case.layer in ("rms", "switchable"):
        layer = layer.to(x.dtype)
    with torch.no_grad():
        layer.weight.view(-1).copy_(weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.view(-1).copy_(bias)
    if converted:
        import numbanorm.torch

        layer = numbanorm.torch.convert(layer)
    # No change of mode inside a clock: the running statistics are those of both.
    evaluated = copy.deepcopy(layer).eval().requires_grad_(False)
    evaluated._buffers = layer._buffers
    activation = torch_activation(case.activation, in_place)

    def call(layer: Any, x: Any, residual: Any) -> Any:
        # PyTorch normalises over last axes only.
        y = layer(x.movedim(1, -1)).movedim(-1, 1) if case.per_row_first else layer(x)
        if residual is not None:
            y = y.add_(residual) if in_place else y + residual
        return activation(y)

    if compiled:
        # Else the code of ``call`` is compiled for some cases only, and then runs as it is.
        torch.compiler.reset()
        call = torch.compile(call, dynamic=False)
    sources = [None if t is None else t.detach().requires_grad_() for t in (x, residual)]
    inputs = [*(t for t in sources if t is not None), *layer.parameters()]
    kept: dict[str, Any] = {}

    def train() -> Any:
        kept["y"] = call(layer, *sources)
        return kept["y"]

    def backward() -> Any:
        kept["gradients"] = torch.autograd.grad(kept.pop("y"), inputs, dy)
        return kept["gradients"][:2] if case.residual else kept["gradients"][0]

    def array(tensor: Any) -> np.ndarray:
        tensor = (tensor.movedim(1, -1) if moved else tensor).detach()
        found: np.ndarray = (tensor.float() if case.half else tensor).numpy()
        return found

    def gradients() -> list[np.ndarray]:
        found = kept["gradients"][1 + case.residual :]
        return [gradient.double().numpy().reshape(-1) for gradient in found]

    return Runner(train, lambda: call(evaluated, x, residual), backward, gradients, array=array)


def jax_runner(case: Case) -> Runner:
    """Return how JAX (jit) does a case, with statistics written plainly; not switchable ones."""
    import jax
    import jax.numpy as jnp

    if case.layer == "switchable" or case.fused:
        raise NotImplementedError(f"{case.name} is not written in JAX here")
    x, dy, weight, bias = (jnp.asarray(array) for array in case.data())
    axis, n = case.axis, len(case.shape)
    grid = tuple(-1 if a == axis else 1 for a in range(n))

    def apply(x: Any, weight: Any, bias: Any) -> Any:
        shape = x.shape
        if case.layer == "group":
            groups = case.num_groups
            x = x.reshape((*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :]))
            axes = tuple(a for a in range(1, n + 1) if a != axis)
        else:
            kept = {"batch": (axis,), "instance": (0, axis)}.get(case.layer)
            axes = (axis,) if kept is None else tuple(a for a in range(n) if a not in kept)
        if case.layer == "rms":
            eps = jnp.finfo(case.parameter_dtype).eps
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
        return kept["gradients"][0]

    def gradients() -> list[np.ndarray]:
        _, dweight, dbias = kept["gradients"]
        return [np.asarray(dweight)] + ([] if case.layer == "rms" else [np.asarray(dbias)])

    def run() -> Any:
        return jax.block_until_ready(forward(x, weight, bias))

    return Runner(run, run, backward, gradients)
