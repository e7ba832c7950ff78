"""Evaluate the same networks in training mode and in evaluation, down to a single sample.

    python single_sample.py [--epochs 4] [--companies 200] [--output single_sample.png]

Two convolutional networks, one with BatchNorm and one with LayerNorm, learn the digits of
scikit-learn. Then the test images are given to them in batches of 1 to 128, as in training (with
the statistics of the batch) and in evaluation. The figure shows the accuracies, and what the
networks make of one image in the company of many others: its probability of the right class.

LayerNorm knows no difference. BatchNorm in training mode judges an image by its company, which is
an answer of chance for a single sample; in evaluation it is the same function of each image.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
from batch_size import network
from figures import COLOURS, grid
from nn import fit
from scipy.special import softmax
from threadpoolctl import threadpool_limits
from train_digits import digits, positive

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
NORMS = ("batch", "layer")
MODES = {"training": True, "evaluation": False}
COMPANY = 8


def trained(norm, data, epochs, seed):
    """Return a network that has learned the digits, in each of the modes."""
    images, _, labels, _ = data
    rng = np.random.default_rng(seed)
    model, _ = network(norm, rng)
    for _ in fit(model, images, labels, rate=0.1, epochs=epochs, batch_size=32, rng=rng):
        pass
    # Copies: what runs in training mode moves its running statistics.
    return [deepcopy(model).train(mode) for mode in MODES.values()]


def accuracies(models, images, labels, rng):
    """Return the accuracy in batches drawn at random, (modes, sizes)."""
    order = rng.permutation(len(images))[: len(images) // max(SIZES) * max(SIZES)]
    found = np.empty((len(models), len(SIZES)))
    for (m, s), _ in np.ndenumerate(found):
        batches = images[order].reshape(-1, SIZES[s], *images.shape[1:])
        logits = np.concatenate([models[m](batch) for batch in batches])
        found[m, s] = np.mean(logits.argmax(axis=1) == labels[order])
    return found


def in_company(models, images, label, companies, rng):
    """Return the first image's probability of its class, (modes, companies)."""
    found = np.empty((len(models), companies))
    for c in range(companies):
        others = 1 + rng.choice(len(images) - 1, COMPANY - 1, replace=False)
        batch = images[np.append(0, others)]
        found[:, c] = [softmax(model(batch)[0])[label] for model in models]
    return found


def table(results):
    """Return the accuracies in percent, and how far the probability moves, as text."""
    header = "".join(f"{size:>7}" for size in SIZES)
    lines = [f"{'accuracy, in batches of':<24}{header}   probability of one image"]
    for norm, (shares, probabilities) in results.items():
        for mode, row, p in zip(MODES, shares, probabilities, strict=True):
            cells = "".join(f"{100 * share:>7.1f}" for share in row)
            lines.append(f"{f'{norm}, {mode}':<24}{cells}   {p.min():.4f} to {p.max():.4f}")
    return "\n".join(lines)


def plot(results, path):
    """Save the accuracies over batch sizes, and the one image's probabilities."""
    figure, ((left, right),) = grid(1, 2, size=(10, 3.8))
    styles = {"training": "--", "evaluation": "-"}
    ticks = []
    for norm, (shares, probabilities) in results.items():
        for mode, row, p in zip(MODES, shares, probabilities, strict=True):
            style = {"color": COLOURS[norm], "linestyle": styles[mode], "marker": "o"}
            left.plot(SIZES, 100 * row, label=f"{norm}, {mode}", markersize=4, **style)
            height = len(ticks) + np.linspace(-0.3, 0.3, len(p))
            right.plot(p, height, ".", color=COLOURS[norm], markersize=3)
            ticks.append(f"{norm}, {mode}")
    left.set_xscale("log", base=2)
    left.set_xticks(SIZES, SIZES)
    left.set(title="Test accuracy in %", xlabel="images in a batch")
    left.legend(frameon=False)
    right.set_yticks(range(len(ticks)), ticks)
    right.invert_yaxis()
    right.set(title=f"One image, among {COMPANY - 1} others", xlabel="probability of its class")
    figure.savefig(path, dpi=150)


# Matrices this small are done sooner than threads are woken.
@threadpool_limits.wrap(limits=1)
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=positive, default=4, help="default: 4")
    parser.add_argument("--companies", type=positive, default=200, help="default: 200")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("single_sample.png"),
        help="where the figure goes, default: single_sample.png",
    )
    args = parser.parse_args(argv)

    data = digits(args.seed)
    _, images, _, labels = data
    results = {}
    for norm in NORMS:
        models = trained(norm, data, args.epochs, args.seed)
        rng = np.random.default_rng(args.seed)
        shares = accuracies(models, images, labels, rng)
        results[norm] = shares, in_company(models, images, labels[0], args.companies, rng)
    print(table(results))
    plot(results, args.output)
    print(f"Figure: {args.output}")
    return results


if __name__ == "__main__":
    main()
