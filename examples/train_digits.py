"""Train one small network with each normalisation on handwritten digits, and compare them.

    python train_digits.py [--norm switchable] [--batch-size 32] [--epochs 15] [--seed 0]

The data are the 1,797 digits of 8x8 pixels that come with scikit-learn; a quarter of them is
held out. The network is three convolutions and a dense layer, written in NumPy in `nn.py`. Behind
each convolution stands a norm layer that is followed by ReLU, which it does in the same passes over
memory. Whatever the norm, training starts from the same weights and sees the same batches.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from nn import SGD, Conv2d, Flatten, Linear, ReLU, Sequential, cross_entropy
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import numbanorm

# Each takes the shape of what the convolution before it makes of one sample.
NORMS = {
    "none": None,
    "batch": lambda c, h, w, **options: numbanorm.BatchNorm2d(c, **options),
    "layer": lambda c, h, w, **options: numbanorm.LayerNorm([c, h, w], **options),
    "instance": lambda c, h, w, **options: numbanorm.InstanceNorm2d(c, affine=True, **options),
    "group": lambda c, h, w, **options: numbanorm.GroupNorm(4, c, **options),
    "switchable": lambda c, h, w, **options: numbanorm.SwitchableNorm2d(c, **options),
}

# Distinct to colour-blind readers too (Okabe and Ito); a statistic has the colour of its norm.
COLOURS = {
    "none": "#7f7f7f",
    "batch": "#0072b2",
    "layer": "#e69f00",
    "instance": "#009e73",
    "group": "#cc79a7",
    "switchable": "#000000",
}
STATISTICS = {"in": "instance", "ln": "layer", "bn": "batch"}


class Timed:
    """A layer with a stopwatch: `seconds` is what its forward and backward took so far."""

    def __init__(self, layer):
        self.layer = layer
        self.seconds = 0.0

    def __call__(self, x):
        """Return the layer's output."""
        start = perf_counter()
        y = self.layer(x)
        self.seconds += perf_counter() - start
        return y

    def backward(self, dy):
        """Return the gradient of the layer's input."""
        start = perf_counter()
        dx = self.layer.backward(dy)
        self.seconds += perf_counter() - start
        return dx

    def __getattr__(self, name):
        """Leave everything else to the layer."""
        return getattr(self.layer, name)


@dataclass
class Run:
    """What is known of one network after its training; seconds are per epoch."""

    losses: np.ndarray  # (epochs, batches)
    importance: list  # for each batch, for each SwitchableNorm: layer.importance()
    accuracy: float
    seconds: float
    seconds_in_norm: float  # and ReLU


def digits(seed):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    return train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)


def shifted(images, rng):
    """Move each image by up to one pixel up or down and left or right.

    A network that has seen the digits in other places is right more often about new ones.
    """
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    places = sliding_window_view(padded, images.shape[2:], axis=(2, 3))
    row, column = rng.integers(3, size=(2, len(images)))
    return places[np.arange(len(images)), :, row, column]


def network(norm, rng):
    """Return the network, and those of its layers that normalise."""
    layers, norms = [], []
    shape = (1, 8, 8)
    for channels, stride in (16, 1), (32, 2), (32, 1):
        layers.append(Conv2d(shape[0], channels, stride=stride, bias=norm == "none", rng=rng))
        shape = (channels, shape[1] // stride, shape[2] // stride)
        if norm == "none":
            layers.append(ReLU())
        else:
            norms.append(Timed(NORMS[norm](*shape, activation="relu")))
            layers.append(norms[-1])
    layers += [Flatten(), Linear(np.prod(shape), 10, gain=0.1, rng=rng)]
    return Sequential(*layers), norms


def warm_up(norm, data, batch_size):
    """Let Numba compile what training and evaluation need; return the seconds it took."""
    images, test_images, labels, _ = data
    start = perf_counter()
    model, _ = network(norm, np.random.default_rng(0))
    _, dlogits = cross_entropy(model(images[:batch_size]), labels[:batch_size])
    model.backward(dlogits)
    model.eval()(test_images)
    return perf_counter() - start


def train(norm, data, batch_size, epochs, seed, progress):
    """Train a new network; return its `Run`."""
    images, test_images, labels, test_labels = data
    rng = np.random.default_rng(seed)
    model, norms = network(norm, rng)
    batches = len(images) // batch_size
    # The rate is in proportion to the batch, and rises first (Goyal et al., arXiv:1706.02677).
    steps = epochs * batches
    done = np.arange(1, steps + 1) / (steps + 1)
    rates = 0.1 * batch_size / 32 * np.interp(done, [0, 0.2, 1], [0, 1, 0])
    optimiser = SGD(model, rates[0])
    losses, importance = [], []

    start = perf_counter()
    for _ in range(epochs):
        # What would be left for a smaller batch sits out this epoch: BatchNorm suffers from those.
        order = rng.permutation(len(images))[: batches * batch_size]
        for batch in order.reshape(batches, batch_size):
            optimiser.learning_rate = rates[len(losses)]
            model.zero_grad()
            loss, dlogits = cross_entropy(model(shifted(images[batch], rng)), labels[batch])
            model.backward(dlogits)
            optimiser.step()
            losses.append(loss)
            if norm == "switchable":
                importance.append([layer.importance() for layer in norms])
        progress.update()
        progress.set_postfix(loss=f"{np.mean(losses[-batches:]):.4f}")
    seconds = perf_counter() - start
    seconds_in_norm = sum(layer.seconds for layer in norms)

    predictions = model.eval()(test_images).argmax(axis=1)
    return Run(
        losses=np.reshape(losses, (epochs, batches)),
        importance=importance,
        accuracy=np.mean(predictions == test_labels),
        seconds=seconds / epochs,
        seconds_in_norm=seconds_in_norm / epochs,
    )


def table(runs):
    """Return the closing table as text."""
    lines = ["                test     final        seconds per epoch"]
    lines += ["norm        accuracy      loss     total    in normalisation"]
    for norm, run in runs.items():
        lines.append(
            f"{norm:<10}{run.accuracy:>10.4f}{run.losses[-1].mean():>10.4f}"
            f"{run.seconds:>10.3f}{run.seconds_in_norm:>20.3f}"
        )
    return "\n".join(lines)


def plot(runs, path):
    """Save the loss curves, and SwitchableNorm's weights where there are any."""
    # Not pyplot: a figure of its own needs no display.
    figure = Figure(figsize=(12, 4.8) if "switchable" in runs else (6, 4.8), layout="constrained")
    left = figure
    if "switchable" in runs:
        left, right = figure.subfigures(1, 2, width_ratios=(5, 7))
        plot_importance(runs["switchable"], right)
    plot_losses(runs, left)
    figure.savefig(path, dpi=150)


def plot_losses(runs, figure):
    axes = figure.subplots()
    for norm, run in runs.items():
        axes.semilogy(
            np.arange(len(run.losses)) + 1,
            run.losses.mean(axis=1),
            marker="o",
            markersize=3,
            color=COLOURS[norm],
            linestyle="--" if norm == "none" else "-",
            label=norm,
        )
    axes.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy, mean of the epoch")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def plot_importance(run, figure):
    _, batches = run.losses.shape
    epoch = np.arange(1, len(run.importance) + 1) / batches
    layers = len(run.importance[0])
    grid = figure.subplots(2, layers, sharex=True, sharey=True)
    for row, (moment, name) in zip(grid, {"mean": "mean", "var": "variance"}.items(), strict=True):
        row[0].set_ylabel(f"weight in the {name}")
        for layer, axes in enumerate(row):
            for statistic, norm in STATISTICS.items():
                weight = [step[layer][moment][statistic] for step in run.importance]
                axes.plot(epoch, weight, color=COLOURS[norm], label=norm)
            axes.spines[["top", "right"]].set_visible(False)
    for layer in range(layers):
        grid[0, layer].set_title(f"SwitchableNorm {layer + 1}")
        grid[-1, layer].set_xlabel("epoch")
        grid[-1, layer].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    names = grid[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=len(STATISTICS), frameon=False)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--norm", choices=[*NORMS, "all"], default="all", help="default: all")
    parser.add_argument("--batch-size", type=positive, default=32, help="default: 32")
    parser.add_argument("--epochs", type=positive, default=15, help="default: 15")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("train_digits.png"),
        help="where the figure goes, default: train_digits.png",
    )
    args = parser.parse_args(argv)

    data = digits(args.seed)
    batch_size = min(args.batch_size, len(data[0]))
    norms = list(NORMS) if args.norm == "all" else [args.norm]
    runs, compilation = {}, 0.0
    with tqdm(total=len(norms) * args.epochs, unit="epoch") as progress:
        for norm in norms:
            progress.set_description(f"{norm}, compiling")
            compilation += warm_up(norm, data, batch_size)
            progress.set_description(norm)
            runs[norm] = train(norm, data, batch_size, args.epochs, args.seed, progress)

    print(table(runs))
    print(f"\nNot in these times: {compilation:.1f} s of compilation before the clocks started.")
    plot(runs, args.output)
    print(f"Figure: {args.output}")
    return runs


if __name__ == "__main__":
    main()
