"""Fold BatchNorm into the layers before it: the same outputs, without its time.

    python fold_batchnorm.py [--epochs 5] [--output fold_batchnorm.png]

At test time BatchNorm multiplies each channel by a number and adds one, and the convolution or
dense layer before it can do that as well. A small network learns scikit-learn's handwritten
digits; its running statistics are replaced by those of all training images; `fold_conv` and
`fold_linear` make a network without BatchNorm of it. Both networks run in turn, so that whatever
else the machine does hits both, and their median times are compared.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from figures import COLOURS, grid
from nn import SGD, Conv2d, Flatten, Linear, ReLU, Sequential, cross_entropy
from tqdm import tqdm
from train_digits import digits

import numbanorm

BATCH_SIZE = 32


class Comparison(NamedTuple):
    """Layers with BatchNorm against layers into which it is folded, on the same input."""

    name: str
    difference: float  # the largest of the outputs
    before: float  # milliseconds
    after: float


def network(rng):
    return Sequential(
        Conv2d(1, 16, bias=False, rng=rng),
        numbanorm.BatchNorm2d(16),
        ReLU(),
        Conv2d(16, 32, stride=2, bias=False, rng=rng),
        numbanorm.BatchNorm2d(32),
        ReLU(),
        Flatten(),
        Linear(32 * 4 * 4, 64, rng=rng),
        numbanorm.BatchNorm1d(64),
        ReLU(),
        Linear(64, 10, gain=0.1, rng=rng),
    )


def is_norm(layer):
    return isinstance(layer, numbanorm.BatchNorm)


def train(model, images, labels, epochs, rng):
    """Train, then take exact running statistics over all images."""
    optimiser = SGD(model, learning_rate=0.05)
    parts = -(-len(images) // BATCH_SIZE)
    for _ in tqdm(range(epochs), desc="training", unit="epoch"):
        for batch in np.array_split(rng.permutation(len(images)), parts):
            model.zero_grad()
            _, dlogits = cross_entropy(model(images[batch]), labels[batch])
            model.backward(dlogits)
            optimiser.step()
    norms = [layer for layer in model.layers if is_norm(layer)]
    numbanorm.recalibrate(model, np.array_split(images, parts), norms)


def fold(layer, norm):
    """Return a layer that does what both do in evaluation."""
    weight, bias = (layer.parameters().get(name) for name in ("weight", "bias"))
    rng = np.random.default_rng(0)  # what it draws is written over
    if isinstance(layer, Linear):
        weight, bias = numbanorm.fold_linear(weight, bias, norm)
        folded = Linear(weight.shape[1], weight.shape[0], rng=rng)
    else:
        weight, bias = numbanorm.fold_conv(weight, bias, norm)
        outputs, inputs, size, _ = weight.shape
        folded = Conv2d(inputs, outputs, size, stride=layer.stride, rng=rng)
    folded.parameters()["weight"][...] = weight
    folded.parameters()["bias"][...] = bias
    return folded


def without_norms(model):
    """Return the network with each BatchNorm folded into the layer before it."""
    layers = []
    for layer in model.layers:
        if is_norm(layer):
            layers[-1] = fold(layers[-1], layer)
        else:
            layers.append(layer)
    return Sequential(*layers)


def compare(name, before, after, x, rounds):
    """Return the largest difference of both outputs, and the median times of calls in turn."""
    difference = np.abs(before(x) - after(x)).max()
    seconds = np.empty((rounds, 2))
    for row in seconds:
        for k, function in enumerate((before, after)):
            start = perf_counter()
            function(x)
            row[k] = perf_counter() - start
    return Comparison(name, difference, *1000 * np.median(seconds, axis=0))


def compare_all(model, folded, x, rounds):
    """Compare each layer that has a BatchNorm, on what reaches it, and then the networks."""
    found, reached = [], x
    for layer, norm in pairwise(model.layers):
        if is_norm(norm):
            name = f"{type(layer).__name__} {layer.parameters()['weight'].shape}"
            pair = Sequential(layer, norm), fold(layer, norm)
            found.append(compare(name, *pair, reached, rounds))
        reached = layer(reached)
    return [*found, compare("the network", model, folded, x, rounds)]


def table(comparisons):
    lines = [f"{'':<24}{'largest':>12}{'milliseconds':>20}"]
    lines += [f"{'layer':<24}{'difference':>12}{'BatchNorm':>11}{'folded':>9}{'saved':>8}"]
    for name, difference, before, after in comparisons:
        times = f"{before:>11.3f}{after:>9.3f}{1 - after / before:>8.0%}"
        lines.append(f"{name:<24}{difference:>12.1e}{times}")
    return "\n".join(lines)


def plot(comparisons, before, after, path):
    """Save the networks' outputs against each other, and the times."""
    figure, ((left, right),) = grid(1, 2, size=(10, 4))
    left.plot(before.ravel(), after.ravel(), ".", color=COLOURS["batch"], alpha=0.3)
    ends = before.min(), before.max()
    left.plot(ends, ends, color="black", linewidth=0.8, zorder=0)
    left.set(
        title=f"Outputs; they differ by {comparisons[-1].difference:.0e} at most",
        xlabel="with BatchNorm",
        ylabel="folded",
    )
    places = np.arange(len(comparisons))
    right.barh(places - 0.2, [c.before for c in comparisons], 0.4, color=COLOURS["batch"])
    right.barh(places + 0.2, [c.after for c in comparisons], 0.4, color=COLOURS["none"])
    right.set_yticks(places, [c.name.replace(" (", "\n(") for c in comparisons])
    right.invert_yaxis()
    right.set(title="Time of a forward pass", xlabel="milliseconds")
    right.legend(["with BatchNorm", "folded"], frameon=False)
    figure.savefig(path, dpi=150)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=positive, default=5, help="default: 5")
    parser.add_argument("--rounds", type=positive, default=50, help="timed calls, default: 50")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fold_batchnorm.png"),
        help="where the figure goes, default: fold_batchnorm.png",
    )
    args = parser.parse_args(argv)

    images, test_images, labels, test_labels = digits(args.seed)
    rng = np.random.default_rng(args.seed)
    model = network(rng)
    train(model, images, labels, args.epochs, rng)
    folded = without_norms(model.eval())
    comparisons = compare_all(model, folded, test_images, args.rounds)
    print(table(comparisons))

    before, after = model(test_images), folded(test_images)
    for name, logits in ("with BatchNorm", before), ("folded", after):
        accuracy = np.mean(logits.argmax(axis=1) == test_labels)
        print(f"test accuracy {name}: {accuracy:.4f}")
    plot(comparisons, before, after, args.output)
    print(f"Figure: {args.output}")
    return comparisons, before, after


if __name__ == "__main__":
    main()
