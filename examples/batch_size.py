"""Train one convolutional network with each normalisation over batch sizes.

    python batch_size.py [--seeds 5] [--epochs 2] [--processes 2] [--output batch_size.png]

The digits of scikit-learn, three convolutions. Every network sees the same number of images, so
that small batches mean many steps, and the learning rate is in proportion to the batch size. The
figure shows the test accuracy, with its standard error over the seeds, and which statistics
SwitchableNorm has learned to use, on average over its layers.

BatchNorm is ahead from batches of 8 on, but with batches of two it is behind LayerNorm, GroupNorm
and SwitchableNorm. Network and learning rate were chosen with an eye on the test accuracy, so that
BatchNorm has few values to go by; with the first network that was tried, it hardly suffered.
SwitchableNorm moves its weights from LN to BN as batches grow. With batches of 128 there are 22
steps in all, too few for each of them; networks with batch statistics make the most of these.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
from figures import COLOURS, STATISTICS, grid
from nn import SGD, Conv2d, Flatten, Linear, ReLU, Sequential, cross_entropy
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from train_digits import NORMS, digits, positive

import numbanorm

SIZES = (2, 4, 8, 16, 32, 64, 128)
OVER = ("in", "ln", "bn")
MOMENTS = {"mean": "mean", "var": "variance"}

data = cache(digits)


def network(norm, rng):
    """Return the network, and those of its layers that normalise.

    The first convolution leaves 2x2 pixels: of a batch of two, BatchNorm sees eight values.
    """
    layers, norms, channels = [], [], 1
    for kernel_size, stride in (5, 4), (3, 1), (3, 1):
        options = {"stride": stride, "bias": norm == "none", "rng": rng}
        layers.append(Conv2d(channels, 16, kernel_size, **options))
        channels = 16
        if norm != "none":
            norms.append(NORMS[norm](channels, 2, 2))
            layers.append(norms[-1])
        layers.append(ReLU())
    layers += [Flatten(), Linear(channels * 4, 10, gain=0.1, rng=rng)]
    return Sequential(*layers), norms


# Matrices this small are done sooner than threads are woken.
@threadpool_limits.wrap(limits=1)
def train(setting, epochs, rate):
    """Return test accuracy and SwitchableNorm's weights, (moments, statistics), NaN without."""
    norm, batch_size, seed = setting
    images, test_images, labels, test_labels = data(0)
    rng = np.random.default_rng(seed)
    model, norms = network(norm, rng)
    batches = -(-len(images) // batch_size)
    rates = np.linspace(rate * batch_size / 32, 0, epochs * batches, endpoint=False)
    optimiser = SGD(model, rates[0])
    step = 0
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(images)), batches):
            optimiser.learning_rate = rates[step]
            model.zero_grad()
            _, dlogits = cross_entropy(model(images[batch]), labels[batch])
            model.backward(dlogits)
            optimiser.step()
            step += 1
    accuracy = np.mean(model.eval()(test_images).argmax(axis=1) == test_labels)
    weights = np.full((len(MOMENTS), len(OVER)), np.nan)
    if norm == "switchable":
        importances = [layer.importance() for layer in norms]
        for cell, (moment, statistic) in zip(np.ndindex(2, 3), product(MOMENTS, OVER), strict=True):
            weights[cell] = np.mean([i[moment][statistic] for i in importances])
    return accuracy, weights


def train_all(train, settings, processes, **options):
    """Call `train` with each setting; return what it returns, stacked."""
    bar = partial(tqdm, total=len(settings), unit="network", disable=None)
    work = partial(train, **options)
    if processes == 1:
        results = list(bar(map(work, settings)))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, spawn, numbanorm.set_num_threads, (1,)) as pool:
            results = list(bar(pool.map(work, settings)))
    return tuple(map(np.array, zip(*results, strict=True)))


def error(values):
    """Return the standard error of the mean over the last axis."""
    return values.std(axis=-1, ddof=1 if values.shape[-1] > 1 else 0) / values.shape[-1] ** 0.5


def table(accuracies, weights, sizes):
    """Return accuracies in percent, and SwitchableNorm's weights, as text."""
    lines = [f"{'batch size':<18}" + "".join(f"{size:>13}" for size in sizes)]
    for norm, row in zip(NORMS, accuracies, strict=True):
        cells = [f"{100 * a.mean():.1f} +- {100 * error(a):.1f}" for a in row]
        lines.append(f"{norm:<18}" + "".join(f"{cell:>13}" for cell in cells))
    for m, moment in enumerate(MOMENTS.values()):
        for s, statistic in enumerate(OVER):
            cells = weights[:, :, m, s].mean(axis=1)
            lines.append(
                f"{f'{statistic} in {moment}':<18}" + "".join(f"{c:>13.2f}" for c in cells)
            )
    return "\n".join(lines)


def plot(accuracies, weights, sizes, path):
    """Save the accuracies, and SwitchableNorm's weights in mean and variance."""
    figure, axes = grid(1, 3, size=(12, 3.8), width_ratios=(2, 1, 1))
    left, *rest = axes[0]
    for n, (norm, row) in enumerate(zip(NORMS, accuracies, strict=True)):
        style = "--" if norm == "none" else "-"
        line = {"color": COLOURS[norm], "linestyle": style, "marker": "o", "markersize": 3}
        line |= {"capsize": 2, "label": norm}
        # Side by side, so that the bars are seen.
        places = np.array(sizes) * 2 ** (0.06 * (n - 2.5))
        left.errorbar(places, 100 * row.mean(axis=1), 100 * error(row), **line)
    # One point is seen; networks that are below leave the frame.
    best = 100 * accuracies.mean(axis=2).max()
    left.set_ylim(best - 11, best + 1)
    left.set_title("Test accuracy in %, the upper end")
    left.legend(frameon=False, ncols=2, loc="lower left")
    rest[0].set_ylabel("SwitchableNorm")
    for m, (axis, moment) in enumerate(zip(rest, MOMENTS.values(), strict=True)):
        for s, statistic in enumerate(OVER):
            values = weights[:, :, m, s]
            line = {"color": STATISTICS[statistic], "marker": "o", "markersize": 3}
            line["label"] = statistic.upper()
            axis.errorbar(sizes, values.mean(axis=1), error(values), capsize=2, **line)
        axis.axhline(1 / len(OVER), color="#7F7F7F", linestyle=":", linewidth=1)
        axis.set_title(f"Weights in the {moment}")
        axis.sharey(rest[0])
    rest[0].legend(frameon=False)
    for axis in axes[0]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, sizes)
        axis.set_xlabel("batch size")
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=positive, nargs="+", default=SIZES, help="batch sizes")
    parser.add_argument("--epochs", type=positive, default=2, help="default: 2")
    parser.add_argument("--rate", type=float, default=0.1, help="for a batch of 32, default: 0.1")
    parser.add_argument("--seeds", type=positive, default=5, help="how many, default: 5")
    parser.add_argument("--processes", type=positive, default=2, help="default: 2")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("batch_size.png"),
        help="where the figure goes, default: batch_size.png",
    )
    args = parser.parse_args(argv)

    # The longest first: small batches.
    sizes = sorted(args.sizes)
    settings = list(product(sizes, NORMS, range(args.seeds)))
    settings = [(norm, size, seed) for size, norm, seed in settings]
    results = train_all(train, settings, args.processes, epochs=args.epochs, rate=args.rate)
    shape = len(sizes), len(NORMS), args.seeds
    accuracies = results[0].reshape(shape).swapaxes(0, 1)
    weights = results[1].reshape(*shape, *results[1].shape[1:])[:, list(NORMS).index("switchable")]
    print(table(accuracies, weights, sizes))
    plot(accuracies, weights, sizes, args.output)
    print(f"Figure: {args.output}")
    return accuracies, weights


if __name__ == "__main__":
    main()
