"""Train one dense network with and without BatchNorm, over learning rates and initial weights.

    python learning_rate.py [--epochs 4] [--seeds 2] [--output learning_rate.png]

The digits of scikit-learn, three hidden layers of 100 units with sigmoid or ReLU, plain gradient
descent. BatchNorm stands between each hidden layer and its activation. The figure shows the test
accuracy over learning rates, and at one learning rate over the scale of the hidden layers'
initial weights.

With BatchNorm ReLU bears ten times the learning rate, sigmoid trains at all, and both train from
any of the initial weights. That BatchNorm regularises is not seen in so short a training: it is
ahead on the training data as much as on the test data.
"""

import argparse
from pathlib import Path

import numpy as np
from figures import grid
from nn import SGD, Layer, Linear, ReLU, Sequential, cross_entropy
from scipy.special import expit
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from train_digits import digits, positive

import numbanorm

RATES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
SCALES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
BATCH_SIZE = 32


class Sigmoid(Layer):
    """1 / (1 + exp(-x)), element by element."""

    def forward(self, x):
        """Return y, of x's shape."""
        self._y = expit(x)
        return self._y

    def backward(self, dy):
        """Return dx, of x's shape."""
        return dy * self._y * (1 - self._y)


# Each network of the figure: its activation, the standard deviation that suits the weights before
# it (times 1 / sqrt(inputs)), and what stands between the two.
NETWORKS = {
    "sigmoid": (Sigmoid, 1.0, None),
    "sigmoid, BatchNorm": (Sigmoid, 1.0, numbanorm.BatchNorm1d),
    "ReLU": (ReLU, 2**0.5, None),
    "ReLU, BatchNorm": (ReLU, 2**0.5, numbanorm.BatchNorm1d),
}


def network(activation, gain, norm, *, rng, hidden=(100, 100, 100)):
    """Return a dense network for the digits, 64 pixels to 10 classes."""
    layers, features = [], 64
    for width in hidden:
        layers.append(Linear(features, width, gain=gain, rng=rng))
        if norm is not None:
            layers.append(norm(width))
        layers.append(activation())
        features = width
    return Sequential(*layers, Linear(features, 10, gain=1, rng=rng))


# Matrices this small are done sooner than threads are woken.
@threadpool_limits.wrap(limits=1)
def train(name, data, rate, scale, epochs, seed):
    """Return the accuracies on training and test data after training with one learning rate."""
    images, test_images, labels, test_labels = data
    rng = np.random.default_rng(seed)
    activation, gain, norm = NETWORKS[name]
    model = network(activation, gain * scale, norm, rng=rng)
    optimiser = SGD(model, rate, momentum=0)
    # A learning rate beyond what the network can take ends in overflow: that is a result, too.
    with np.errstate(all="ignore"):
        for _ in range(epochs):
            for batch in np.array_split(rng.permutation(len(images)), len(images) // BATCH_SIZE):
                model.zero_grad()
                _, dlogits = cross_entropy(model(images[batch]), labels[batch])
                model.backward(dlogits)
                optimiser.step()
        model.eval()
        return [
            np.mean(model(x).argmax(axis=1) == y)
            for x, y in ((images, labels), (test_images, test_labels))
        ]


def table(accuracies, header, values):
    """Return test accuracies in percent as text, and how the best is on the training data."""
    lines = [f"{header:<20}" + "".join(f"{value:>7g}" for value in values) + "   best (training)"]
    for name, (training, test) in zip(NETWORKS, accuracies, strict=True):
        best = test.argmax()
        lines.append(
            f"{name:<20}"
            + "".join(f"{100 * accuracy:>7.1f}" for accuracy in test)
            + f"{100 * test[best]:>7.1f} ({100 * training[best]:.1f})"
        )
    return "\n".join(lines)


def plot(panels, path):
    """Save one heat map for each panel: (title, label, values, accuracies)."""
    figure, axes = grid(1, len(panels), size=(11, 3.4), sharey=True)
    for axis, (title, label, values, accuracies) in zip(axes[0], panels, strict=True):
        test = 100 * accuracies[:, 1]
        rows, columns = np.arange(test.shape[0]), np.arange(test.shape[1])
        image = axis.pcolormesh(
            columns, rows, test, vmin=0, vmax=100, cmap="viridis", edgecolors="white", linewidth=2
        )
        for (row, column), accuracy in np.ndenumerate(test):
            colour = "black" if accuracy > 60 else "white"
            axis.text(column, row, f"{accuracy:.0f}", ha="center", va="center", color=colour)
        axis.set_xticks(columns, [f"{value:g}" for value in values])
        axis.set_yticks(rows, NETWORKS)
        axis.set_ylim(rows[-1] + 0.5, -0.5)
        axis.set(title=title, xlabel=label)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="test accuracy in %", pad=0.01)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--epochs", type=positive, default=4, help="default: 4")
    parser.add_argument("--seeds", type=positive, default=2, help="how many, default: 2")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("learning_rate.png"),
        help="where the figure goes, default: learning_rate.png",
    )
    args = parser.parse_args(argv)

    images, test_images, labels, test_labels = digits(0)
    data = images.reshape(-1, 64), test_images.reshape(-1, 64), labels, test_labels
    rate_panel = [(rate, 1.0) for rate in args.rates]
    scale_panel = [(0.1, scale) for scale in args.scales]
    runs = [(name, *setting) for name in NETWORKS for setting in rate_panel + scale_panel]
    results = [
        np.mean([train(name, data, *setting, args.epochs, seed) for seed in range(args.seeds)], 0)
        for name, *setting in tqdm(runs, unit="network", disable=None)
    ]
    # (networks, training and test, settings)
    accuracies = np.reshape(results, (len(NETWORKS), -1, 2)).transpose(0, 2, 1)
    over_rates, over_scales = np.split(accuracies, [len(args.rates)], axis=2)
    print(table(over_rates, "learning rate", args.rates))
    print()
    print(table(over_scales, "initial weights x", args.scales))
    panels = (
        ("Learning rate", "learning rate", args.rates, over_rates),
        ("Initial weights (learning rate 0.1)", "times the usual", args.scales, over_scales),
    )
    plot(panels, args.output)
    print(f"Figure: {args.output}")
    return over_rates, over_scales


if __name__ == "__main__":
    main()
