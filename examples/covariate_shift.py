"""Watch what a deep layer gets as its input while the layers under it learn.

    python covariate_shift.py [--epochs 10] [--rate 0.1] [--output covariate_shift.png]

The digits of scikit-learn, a dense network with five hidden layers of 100 ReLU units, without a
norm layer, with BatchNorm and with LayerNorm before each ReLU. In each training step the mean and
the spread (the standard deviation) over the batch are taken of what the units of the last hidden
layer get. Without normalisation both go a long way. BatchNorm leaves each unit's mean and spread
to two parameters, its bias and its weight, which move slowly. LayerNorm normalises samples and
not units: each unit still shifts, about half as far.
"""

import argparse
import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from figures import COLOURS, grid
from learning_rate import network
from nn import SGD, ReLU, cross_entropy
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from train_digits import digits, positive

import numbanorm

NORMS = {"none": None, "batch": numbanorm.BatchNorm1d, "layer": numbanorm.LayerNorm}
HIDDEN = (100,) * 5
BATCH_SIZE = 64
# The images that the moments are taken over: always the same, so that only the network changes.
WATCHED = 256


def input_of_last_activation(model, images):
    """Return the moments over these images, in training mode, of what each unit gets."""
    # A copy, so that looking at the network does not change its running statistics.
    x = images
    for layer in copy.deepcopy(model).layers[:-2]:
        x = layer(x)
    return numbanorm.moments(x, axes=0)


# Matrices this small are done sooner than threads are woken.
@threadpool_limits.wrap(limits=1)
def train(norm, data, rate, epochs, progress):
    """Return mean and spread as (steps, units), and the test accuracy after each epoch."""
    images, test_images, labels, test_labels = data
    rng = np.random.default_rng(0)
    model = network(ReLU, 2**0.5, NORMS[norm], rng=rng, hidden=HIDDEN)
    optimiser = SGD(model, rate, momentum=0)
    seen, accuracies = [], []
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(images)), len(images) // BATCH_SIZE):
            seen.append(input_of_last_activation(model, images[:WATCHED]))
            model.zero_grad()
            _, dlogits = cross_entropy(model(images[batch]), labels[batch])
            model.backward(dlogits)
            optimiser.step()
        accuracies.append(np.mean(model.eval()(test_images).argmax(axis=1) == test_labels))
        model.train()
        progress.update()
    return SimpleNamespace(
        mean=np.array([moments.mean for moments in seen]),
        std=np.array([moments.std() for moments in seen]),
        accuracies=np.array(accuracies),
    )


def shift(run):
    """Return how far each unit's mean went in training, in units of its spread at the start."""
    return np.ptp(run.mean, axis=0) / run.std[0]


def growth(run):
    """Return by which factor each unit's spread varied in training."""
    return run.std.max(axis=0) / run.std.min(axis=0)


def table(runs):
    """Return medians over the units as text."""
    lines = ["          shift of the mean,      largest spread     test accuracy after"]
    lines += ["norm      in spreads at start   over the smallest    1 epoch    all epochs"]
    for norm, run in runs.items():
        first, *_, last = np.repeat(run.accuracies, 2)
        lines.append(
            f"{norm:<10}{np.median(shift(run)):>19.2f}{np.median(growth(run)):>20.2f}"
            f"{100 * first:>11.1f}%{100 * last:>12.1f}%"
        )
    return "\n".join(lines)


def plot(runs, path):
    """Save one unit's mean and spread and some units' means for each norm, and accuracies."""
    figure, axes = grid(1, len(runs) + 1, size=(12, 3.4))
    for axis, (norm, run) in zip(axes[0], runs.items(), strict=False):
        step = np.arange(len(run.mean)) + 1
        others = axis.plot(step, run.mean[:, ::20], color=COLOURS[norm], linewidth=0.8, alpha=0.6)
        # The unit in the middle of all, by its shift, stands for the others.
        unit = np.argsort(shift(run))[run.mean.shape[1] // 2]
        mean, std = run.mean[:, unit], run.std[:, unit]
        (one,) = axis.plot(step, mean, color="black", linewidth=1.5)
        band = axis.fill_between(
            step, mean - std, mean + std, color=COLOURS[norm], alpha=0.3, linewidth=0
        )
        if norm == "batch":
            labels = "one unit: mean", "and spread", "means of others"
            axis.legend((one, band, others[0]), labels, loc="lower left", frameon=False)
        axis.set(title=norm, xlabel="training step")
        axis.sharey(axes[0, 0])
    axes[0, 0].set_ylabel("input of the last hidden ReLU")
    for norm, run in runs.items():
        epoch = np.arange(len(run.accuracies)) + 1
        axes[0, -1].plot(
            epoch, 100 * run.accuracies, color=COLOURS[norm], marker="o", markersize=3, label=norm
        )
    axes[0, -1].set(title="Test accuracy in %", xlabel="epoch")
    axes[0, -1].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=positive, default=10, help="default: 10")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate, default: 0.1")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("covariate_shift.png"),
        help="where the figure goes, default: covariate_shift.png",
    )
    args = parser.parse_args(argv)

    images, test_images, labels, test_labels = digits(0)
    data = images.reshape(-1, 64), test_images.reshape(-1, 64), labels, test_labels
    runs = {}
    with tqdm(total=len(NORMS) * args.epochs, unit="epoch", disable=None) as progress:
        for norm in NORMS:
            progress.set_description(norm)
            runs[norm] = train(norm, data, args.rate, args.epochs, progress)
    print(table(runs))
    plot(runs, args.output)
    print(f"Figure: {args.output}")
    return runs


if __name__ == "__main__":
    main()
