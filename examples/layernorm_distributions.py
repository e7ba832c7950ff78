"""See what LayerNorm does to the distributions of a dense layer's outputs.

    python layernorm_distributions.py [--output layernorm_distributions.png]

100 patches of 10x10 pixels, cut from a photograph that comes with scikit-learn, go through
Linear(100, 50) and LayerNorm(50). After LayerNorm each single sample has mean 0 and variance 1,
whatever its brightness and contrast were. A single feature, seen over the samples, has not: that
is what BatchNorm would see to.
"""

import argparse
from pathlib import Path

import numpy as np
from figures import COLOURS, grid
from matplotlib.ticker import MaxNLocator
from nn import Linear
from sklearn.datasets import load_sample_image
from sklearn.feature_extraction.image import extract_patches_2d
from train_digits import positive

import numbanorm


def patches(count, seed):
    """Return patches of 10x10 grey values as (count, 100), over all of mean 0 and variance 1."""
    grey = load_sample_image("china.jpg").mean(axis=2)
    x = extract_patches_2d(grey, (10, 10), max_patches=count, random_state=seed)
    x = x.reshape(count, 100)
    return ((x - x.mean()) / x.std()).astype(np.float32)


def table(before, after):
    """Return means and variances before and after as text."""
    lines = ["                                     before           after"]
    for name, axes in (("all values", None), ("a sample", 1), ("a feature", 0)):
        for moment in "mean", "var":
            cells = []
            for y in before, after:
                moments = numbanorm.moments(y, axes)
                values = moments.mean if moment == "mean" else moments.var()
                # The rounding errors of a mean of 0 would print as -0.00.
                low, high = values.min().round(2) + 0.0, values.max().round(2) + 0.0
                cells.append(f"{low:.2f}" if axes is None else f"{low:.2f} ... {high:.2f}")
            name_of_moment = {"mean": "mean", "var": "variance"}[moment] + f" of {name}"
            lines.append(f"{name_of_moment:<26}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def plot(before, after, path):
    """Save the 2x3 figure: all values, variance of each feature, values of one sample."""
    figure, axes = grid(2, 3, size=(10, 5), sharex="col")
    # The sample that is furthest from variance 1 shows best what happens to it.
    one = np.abs(np.log(before.var(axis=1))).argmax()
    rows = ("before", before, COLOURS["none"]), ("after LayerNorm", after, COLOURS["layer"])
    for row, (name, y, colour) in zip(axes, rows, strict=True):
        histogram = {"color": colour, "edgecolor": "white", "linewidth": 0.5}
        row[0].hist(y.ravel(), bins=40, **histogram)
        row[1].bar(range(y.shape[1]), y.var(axis=0), color=colour)
        row[2].hist(y[one], bins=12, **histogram)
        for axis, values in (row[0], y), (row[2], y[one]):
            # The rounding errors of a mean of 0 would print as -0.00.
            moments = f"mean {values.mean().round(2) + 0.0:.2f}\nvariance {values.var():.2f}"
            axis.margins(y=0.3)
            axis.text(0.98, 0.96, moments, transform=axis.transAxes, ha="right", va="top")
        row[0].set_ylabel(f"{name}\n\ncount")
        row[1].set_ylabel("variance")
        row[2].set_ylabel("count")
        row[2].yaxis.set_major_locator(MaxNLocator(5, integer=True))
    titles = "All values", "Variance of each feature over the samples", "One sample's 50 values"
    for column, title, label in zip(axes.T, titles, ("value", "feature", "value"), strict=True):
        column[0].set_title(title)
        column[1].set_xlabel(label)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=positive, default=100, help="default: 100")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("layernorm_distributions.png"),
        help="where the figure goes, default: layernorm_distributions.png",
    )
    args = parser.parse_args(argv)

    linear = Linear(100, 50, gain=1, rng=np.random.default_rng(args.seed))
    before = linear(patches(args.samples, args.seed))
    after = numbanorm.LayerNorm(50)(before)
    print(table(before, after))
    plot(before, after, args.output)
    print(f"Figure: {args.output}")
    return before, after


if __name__ == "__main__":
    main()
