"""What recycling memory, and writing dx over dy, each give in a training step.

    python recycling.py [--rounds 7]

Both rest on counting references: an output takes the memory of one that nobody has any more, and
PyTorch's gradient of x that of y. Steps with both, without either and without one take turns in one
process, on the same data; the table has the median time of each over that with both. What gives
less than 5 % on every machine is not worth its lines. ``NUMBANORM_RECYCLE=0`` switches both off.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

import numbanorm
from numbanorm.core.memory import arrays
from numbanorm.tuning import use

WAYS = {
    "both": {},
    "no recycling": {"recycle": False},
    "dx not over dy": {"dx_over_dy": False},
    "neither": {"recycle": False, "dx_over_dy": False},
}


def numpy_step() -> Callable[[], object]:
    """Return a forward and a backward of three layers, as a network of NumPy has them."""
    x = np.random.default_rng(0).standard_normal((32, 64, 56, 56), np.float32)
    layers = [numbanorm.BatchNorm2d(64), numbanorm.GroupNorm(8, 64), numbanorm.LayerNorm(56)]

    def step() -> None:
        y = x
        for layer in layers:
            y = layer(y)
        for layer in reversed(layers):
            y = layer.backward(y)

    return step


def torch_steps() -> dict[str, Callable[[], object]]:
    """Return training steps of PyTorch models, or none where it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    import numbanorm.torch

    nn = torch.nn

    def step_of(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
        numbanorm.torch.convert(model)
        optimiser = torch.optim.SGD(model.parameters(), 1e-3)

        def step() -> None:
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()

        return step

    block = [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    norms = [nn.BatchNorm2d(64), nn.ReLU()]
    rows = [nn.LayerNorm(768), nn.Linear(768, 768), nn.GELU()]
    return {
        "PyTorch, convolutions": step_of(nn.Sequential(*block * 3), torch.randn(8, 64, 56, 56)),
        "PyTorch, norms and ReLU": step_of(nn.Sequential(*norms * 4), torch.randn(32, 64, 56, 56)),
        "PyTorch, LayerNorm + Linear": step_of(nn.Sequential(*rows * 3), torch.randn(4096, 768)),
    }


def timed(step: Callable[[], object], way: str) -> float:
    """Return the time of a step in some way, after one that is not counted."""
    with use(**WAYS[way]):
        step()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{'median of ' + str(rounds):<30}{'ms':>8}", *(f"{way:>16}" for way in WAYS))
    for name, step in {"NumPy, three norms": numpy_step(), **torch_steps()}.items():
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                times[way].append(timed(step, way))
        arrays.clear()
        base, *_ = medians = [statistics.median(times[way]) for way in WAYS]
        print(f"{name:<30}{1e3 * base:8.1f}", *(f"{median / base:16.2f}" for median in medians))


if __name__ == "__main__":
    main()
