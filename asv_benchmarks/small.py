"""Time small layers, where the way through Python counts: PyTorch's and converted, in turns.

    python asv_benchmarks/small.py [--rounds N]

Microseconds on one thread, medians of rounds: forward without a graph, forward with one, and both
passes. The last line is an autograd function of Python that does nothing: what nobody can be below.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import numbanorm.torch

CASES = [
    (nn.LayerNorm(64), (8, 64)),
    (nn.RMSNorm(64), (8, 64)),
    (nn.BatchNorm1d(64), (32, 64)),
    (nn.BatchNorm2d(16), (4, 16, 4, 4)),
    (nn.BatchNorm2d(16).eval(), (4, 16, 4, 4)),
    (nn.GroupNorm(4, 16), (4, 16, 4, 4)),
]


class Nothing(torch.autograd.Function):
    """Returns memory that nobody has written to."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """Return what y would be."""
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        """Return what gradients would be."""
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def microseconds(function, n=300):
    """Return the mean time of a call."""
    begin = time.perf_counter()
    for _ in range(n):
        function()
    return (time.perf_counter() - begin) / n * 1e6


def medians(functions, rounds):
    """Return the median time of each function, called in turns."""
    for function in functions:
        microseconds(function, 50)
    times = zip(*[[microseconds(f) for f in functions] for _ in range(rounds)], strict=True)
    return [statistics.median(of_function) for of_function in times]


def calls(layer, shape, parameters):
    """Return forward without a graph, forward with one, and both passes."""
    x, dy = torch.randn(shape), torch.randn(shape)
    leaf = x.clone().requires_grad_()

    def forward():
        with torch.no_grad():
            layer(x)

    def both():
        layer(leaf).backward(dy)
        for tensor in (leaf, *parameters):
            tensor.grad = None

    return [forward, lambda: layer(leaf), both]


def main():
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    names = "forward", "with a graph", "both passes"
    print(f"{'':44}" + "".join(f"{name + ': PyTorch, ours':>32}" for name in names))
    for layer, shape in CASES:
        ours = numbanorm.torch.convert(copy.deepcopy(layer))
        pairs = [calls(each, shape, list(each.parameters())) for each in (layer, ours)]
        found = medians(pairs[0] + pairs[1], rounds)
        kind = f"{type(layer).__name__} {shape}{'' if layer.training else ', evaluation'}"
        cells = (
            f"{a:14.1f} {b:8.1f} ({b / a:.2f})" for a, b in zip(found, found[3:], strict=False)
        )
        print(f"{kind:44}" + "".join(f"{cell:>32}" for cell in cells), flush=True)
    parameters = [torch.randn(64, requires_grad=True) for _ in range(2)]

    def nothing(x):
        return Nothing.apply(x, *parameters)

    found = medians(calls(nothing, (8, 64), parameters), rounds)
    print(f"{'an empty function of Python':44}" + "".join(f"{time:32.1f}" for time in found))


if __name__ == "__main__":
    main()
