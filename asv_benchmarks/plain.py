"""The layers written plainly in NumPy: a baseline, and in float64 what all results must equal.

Every statistic is a mean over some axes; SwitchableNorm mixes three of them. Nothing is shared
with the library.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from cases import Case, Runner

EPS = 1e-5
MOMENTUM = 0.1


def relu(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ReLU and its slope."""
    return np.maximum(v, 0), (v > 0).astype(v.dtype)


def gelu(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return GELU and its slope."""
    phi = (1 + np.vectorize(math.erf, otypes=[v.dtype])(v / math.sqrt(2))) / 2
    return v * phi, phi + v * np.exp(-v * v / 2) / math.sqrt(2 * math.pi)


ACTIVATIONS = {"relu": relu, "gelu": gelu}


class Forward(NamedTuple):
    """What backward needs."""

    x: np.ndarray
    means: list[np.ndarray]
    variances: list[np.ndarray]
    centred: np.ndarray
    rstd: np.ndarray


def runner(case: Case, dtype: str | None = None) -> Runner:
    """Return how plain NumPy does a case, in another dtype if one is given; not masked ones."""
    x, dy, weight, bias = (array.astype(dtype or case.parameter_dtype) for array in case.data())
    residual = case.residual_array()
    axis, shape = case.axis, case.shape
    channel_shape = tuple(n if a == axis else 1 for a, n in enumerate(shape))
    over_channels = tuple(a for a in range(len(shape)) if a != axis)
    if case.layer == "group":
        # One more axis behind that of the channels: they are (group, channel of the group) now.
        shape = (*shape[:axis], case.num_groups, shape[axis] // case.num_groups, *shape[axis + 1 :])
        channel_shape = tuple(n if a in (axis, axis + 1) else 1 for a, n in enumerate(shape))
        over_channels = tuple(a for a in range(len(shape)) if a not in (axis, axis + 1))
    x, dy = x.reshape(shape), dy.reshape(shape)
    weight, bias = weight.reshape(channel_shape), bias.reshape(channel_shape)
    every = range(len(shape))
    axes = {
        "in": tuple(a for a in every if a not in (0, axis)),
        "ln": tuple(a for a in every if a != 0),
        "bn": over_channels,
        "gn": tuple(a for a in every if a not in (0, axis)),
        "row": (axis,),
    }
    statistics = {
        "batch": ["bn"],
        "instance": ["in"],
        "group": ["gn"],
        "switchable": ["in", "ln", "bn"],
        "layer": ["row"],
        "rms": ["row"],
    }[case.layer]
    share = 1 / len(statistics)  # the softmax of equal logits
    center = case.layer != "rms"
    # torch.nn.RMSNorm's default.
    eps = EPS if center else float(np.finfo(case.parameter_dtype).eps)
    running: dict[str, Any] = {"mean": 0.0, "var": 1.0}
    kept: dict[str, Any] = {}

    def moments(training: bool) -> Any:
        for name in statistics:
            if name == "bn" and not training:
                yield running["mean"], running["var"]
                continue
            mean = x.mean(axes[name], keepdims=True)
            if not center:
                mean = np.zeros_like(mean)
            var = ((x - mean) ** 2).mean(axes[name], keepdims=True)
            if name == "bn":
                n = math.prod(shape[a] for a in axes[name])
                running["mean"] = running["mean"] * (1 - MOMENTUM) + mean * MOMENTUM
                running["var"] = running["var"] * (1 - MOMENTUM) + var * (MOMENTUM * n / (n - 1))
            yield mean, var

    def forward(training: bool) -> np.ndarray:
        means, variances = map(list, zip(*moments(training), strict=True))
        centred = x - sum(means) * share
        rstd = 1 / np.sqrt(sum(variances) * share + eps)
        if training:
            kept["forward"] = Forward(x, means, variances, centred, rstd)
        y = centred * (rstd * weight)
        if center:
            y += bias
        y = y.reshape(case.shape)
        if residual is not None:
            y += residual.astype(y.dtype)
        if case.activation is not None:
            y, kept["slope"] = ACTIVATIONS[case.activation](y)
        return y

    def backward() -> Any:
        saved = kept.pop("forward")
        dv = dy.reshape(case.shape) * kept.pop("slope", 1)
        dx, kept["gradients"] = differentiate(saved, dv.reshape(shape))
        return (dx, dv) if case.residual else dx

    def differentiate(saved: Forward, dy: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        x_hat = saved.centred * saved.rstd
        dx = dy * (weight * saved.rstd)
        # Gradients of each element's mean and variance.
        dmean, dvar = -dx, dx * x_hat * (-0.5 * saved.rstd)
        logits = []
        for name, mean, var in zip(statistics, saved.means, saved.variances, strict=True):
            logits.append((float((dmean * mean).sum()), float((dvar * var).sum())))
            by_mean = dmean.mean(axes[name], keepdims=True) if center else 0
            by_var = dvar.mean(axes[name], keepdims=True)
            dx = dx + share * (by_mean + by_var * 2 * (saved.x - mean))
        gradients = [(dy * x_hat).sum(over_channels).reshape(-1)]
        if center:
            gradients.append(dy.sum(over_channels).reshape(-1))
        if case.layer == "switchable":
            # Through the softmax.
            gradients += [share * (np.array(d) - np.mean(d)) for d in zip(*logits, strict=True)]
        return dx.reshape(case.shape), gradients

    return Runner(
        lambda: forward(True), lambda: forward(False), backward, lambda: kept["gradients"]
    )
