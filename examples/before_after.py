"""Train one convolutional network with the norm before its activations, and with it behind them.

    python before_after.py [--epochs 3] [--seeds 5] [--output before_after.png]

The digits of scikit-learn, three convolutions, ReLU or sigmoid, BatchNorm or LayerNorm between
convolution and activation ("before") or between activation and the next layer ("after"). The same
seed gives both the same initial weights and the same batches; each is trained with two learning
rates, and the one that is better for it counts. The figure shows the test accuracy of each pair,
and the mean of their difference with its 95 % interval.

With ReLU there is no winner: the differences are less than their intervals. With sigmoid, after is
better: the next layer then gets values around 0, where those of a sigmoid are around one half.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
from depth import best_rate
from figures import COLOURS, grid
from learning_rate import Sigmoid
from nn import Conv2d, Flatten, Linear, ReLU, Sequential, accuracy, fit
from scipy.stats import t
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from train_digits import NORMS, digits, positive

ACTIVATIONS = {"ReLU": ReLU, "sigmoid": Sigmoid}
PLACES = ("before", "after")
KINDS = ("batch", "layer")
RATES = (0.1, 0.3)


def network(norm, activation, place, rng):
    """Return a network whose norms stand before or after their activations."""
    layers, channels = [], 1
    for kernel_size, stride in (5, 4), (3, 1), (3, 1):
        layers.append(Conv2d(channels, 16, kernel_size, stride=stride, rng=rng))
        channels = 16
        pair = [NORMS[norm](channels, 2, 2), ACTIVATIONS[activation]()]
        layers += pair if place == "before" else reversed(pair)
    return Sequential(*layers, Flatten(), Linear(channels * 4, 10, gain=0.1, rng=rng))


# Matrices this small are done sooner than threads are woken.
@threadpool_limits.wrap(limits=1)
def train(data, norm, activation, place, rate, epochs, seed):
    """Return the test accuracy of a new network."""
    images, test_images, labels, test_labels = data
    rng = np.random.default_rng(seed)
    model = network(norm, activation, place, rng)
    for _ in fit(model, images, labels, rate=rate, epochs=epochs, batch_size=32, rng=rng):
        pass
    return accuracy(model, test_images, test_labels)


def interval(values):
    """Return half the width of the 95 % confidence interval of the mean over the last axis."""
    n = values.shape[-1]
    return t.ppf(0.975, n - 1) * values.std(axis=-1, ddof=1) / np.sqrt(n)


def table(accuracies):
    """Return (kinds, activations, places, seeds) as text, in percent."""
    lines = [f"{'':<18}{'before':>10}{'after':>10}{'before - after':>20}"]
    for (k, kind), (a, activation) in product(enumerate(KINDS), enumerate(ACTIVATIONS)):
        before, after = 100 * accuracies[k, a]
        cells = f"{before.mean():>10.1f}{after.mean():>10.1f}"
        difference = f"{(before - after).mean():.1f} +- {interval(before - after):.1f}"
        lines.append(f"{f'{kind}, {activation}':<18}{cells}{difference:>20}")
    return "\n".join(lines)


def plot(accuracies, path):
    """Save the accuracies of each pair, and the differences with their intervals."""
    figure, ((left, right),) = grid(1, 2, size=(10, 3.8), width_ratios=(3, 2), sharey=True)
    names = [f"{kind}, {activation}" for kind, activation in product(KINDS, ACTIVATIONS)]
    for row, pair in enumerate(100 * accuracies.reshape(len(names), 2, -1)):
        colour = COLOURS[names[row].partition(",")[0]]
        heights = row + np.linspace(-0.25, 0.25, pair.shape[1])
        left.hlines(heights, *pair, color=colour, alpha=0.4)
        left.plot(pair[0], heights, "o", color=colour, label="before" if row == 0 else None)
        face = {"markerfacecolor": "white", "label": "after" if row == 0 else None}
        left.plot(pair[1], heights, "o", color=colour, **face)
        difference = pair[0] - pair[1]
        right.errorbar(
            difference.mean(), row, xerr=interval(difference), fmt="o", color=colour, capsize=4
        )
    right.axvline(0, color="#7F7F7F", linestyle=":", linewidth=1)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(title="The norm before or after the activation", xlabel="test accuracy in %")
    right.set(title="Before, less after", xlabel="points, 95 % interval")
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


def several(text):
    value = positive(text)
    if value == 1:
        raise argparse.ArgumentTypeError("an interval needs at least 2, got 1")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=positive, default=3, help="default: 3")
    parser.add_argument("--seeds", type=several, default=5, help="how many, default: 5")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("before_after.png"),
        help="where the figure goes, default: before_after.png",
    )
    args = parser.parse_args(argv)

    data = digits(0)
    settings = list(product(KINDS, ACTIVATIONS, PLACES, RATES, range(args.seeds)))
    accuracies = [
        train(data, kind, activation, place, rate, args.epochs, seed)
        for kind, activation, place, rate, seed in tqdm(settings, unit="network", disable=None)
    ]
    shape = len(KINDS), len(ACTIVATIONS), len(PLACES), len(RATES), args.seeds
    accuracies = best_rate(np.reshape(accuracies, shape))
    print(table(accuracies))
    plot(accuracies, args.output)
    print(f"Figure: {args.output}")
    return accuracies


if __name__ == "__main__":
    main()
