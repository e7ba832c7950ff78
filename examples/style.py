"""Find parts of photographs again after their contrast and colour have been changed.

    python style.py [--seeds 5] [--output style.png]

The two photographs that come with scikit-learn are cut into squares of 32x32 pixels. Each goes
through two convolutions with random weights and a ReLU behind each, without a norm or with norms on
the square itself and before each ReLU. Then the squares in another style are looked for among those
of the original: which has the nearest features? The figure shows what the styles and InstanceNorm
make of a photograph, and how many squares are found, over five draws of the weights.

Contrast and colour are a scale and a shift of each channel: InstanceNorm takes them away, and every
square is found. LayerNorm takes away what is common to the colours. BatchNorm in evaluation keeps
the style, as no norm does. A gamma of 2 is not linear but close enough; a negative is found by
none.
"""

import argparse
from pathlib import Path

import numpy as np
from before_after import interval, several
from custom_axes import photographs
from figures import COLOURS, grid
from nn import Conv2d, ReLU, Sequential
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from train_digits import NORMS

KINDS = ("none", "batch", "layer", "instance")
EDGE = 32


def colours(*gains):
    """Return a function that multiplies red, green and blue."""
    gains = np.array(gains, np.float32)[:, None, None]
    return lambda x: x * gains


# From values in [0, 1] to values in [0, 1].
STYLES = {
    "original": lambda x: x,
    "less contrast": lambda x: 0.35 + 0.3 * x,
    "darker": lambda x: 0.4 * x,
    "evening": colours(1.0, 0.6, 0.3),
    "blue": lambda x: 0.5 * colours(0.2, 0.5, 1.0)(x) + np.float32([0, 0.1, 0.5])[:, None, None],
    "gamma of 2": lambda x: x**2,
    "negative": lambda x: 1 - x,
}


def squares(images):
    """Return (N, C, H, W) cut into (squares, C, EDGE, EDGE)."""
    n, c, h, w = images.shape
    images = images[..., : h // EDGE * EDGE, : w // EDGE * EDGE]
    parts = images.reshape(n, c, h // EDGE, EDGE, w // EDGE, EDGE)
    return parts.transpose(0, 2, 4, 1, 3, 5).reshape(-1, c, EDGE, EDGE)


def network(norm, rng):
    """Return a network with random weights that makes features of squares."""
    layers, channels, edge = [], 3, EDGE
    if norm != "none":
        layers.append(NORMS[norm](channels, edge, edge))
    for _ in range(2):
        layers.append(Conv2d(channels, 16, stride=2, bias=False, rng=rng))
        channels, edge = 16, edge // 2
        if norm != "none":
            layers.append(NORMS[norm](channels, edge, edge))
        layers.append(ReLU())
    return Sequential(*layers)


def shares_found(norm, originals, seed):
    """Return for each style the share of squares whose nearest original is their own."""
    model = network(norm, np.random.default_rng(seed))
    # BatchNorm, too, with the statistics that are its own: those of the originals.
    for _ in range(50):
        model(originals)
    model.eval()
    known = model(originals).reshape(len(originals), -1)
    shares = []
    for change in STYLES.values():
        features = model(change(originals)).reshape(len(originals), -1)
        distances = cdist(features, known)
        shares.append(np.mean(distances.argmin(axis=1) == np.arange(len(originals))))
    return shares


def table(shares):
    """Return the shares, (kinds, styles, seeds), in percent as text."""
    lines = [f"{'found, %':<16}" + "".join(f"{kind:>15}" for kind in KINDS)]
    for s, style in enumerate(STYLES):
        cells = (f"{v.mean():.1f} +- {interval(v):.1f}" for v in 100 * shares[:, s])
        lines.append(f"{style:<16}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def plot(photograph, shares, path):
    """Save the photograph in each style without and with InstanceNorm, and the shares."""
    figure, axes = grid(3, len(STYLES), size=(12, 5.2), height_ratios=(1, 1, 1.5))
    norm = NORMS["instance"](*photograph.shape)
    for column, (style, change) in zip(axes.T, STYLES.items(), strict=True):
        x = change(photograph[None])
        # From two deviations below the mean to two above it.
        for axis, picture in zip(column, (x[0], (norm(x)[0] + 2) / 4), strict=False):
            axis.imshow(picture.transpose(1, 2, 0).clip(0, 1))
            axis.set_axis_off()
        column[0].set_title(style, fontsize=10)
    for axis, text in zip(axes[:2, 0], ("the photograph", "InstanceNorm"), strict=True):
        axis.text(-0.1, 0.5, text, va="center", rotation=90, transform=axis.transAxes)
    for axis in axes[2]:
        axis.remove()
    below = figure.add_subplot(axes[2, 0].get_gridspec()[2, :])
    below.spines[["top", "right"]].set_visible(False)
    width = 0.8 / len(KINDS)
    for k, kind in enumerate(KINDS):
        places = np.arange(len(STYLES)) + (k - (len(KINDS) - 1) / 2) * width
        values = 100 * shares[k]
        below.bar(places, values.mean(axis=1), width, color=COLOURS[kind], label=kind)
        below.errorbar(places, values.mean(axis=1), interval(values), fmt="none", ecolor="black")
    below.set_xticks(range(len(STYLES)), STYLES)
    below.set(ylabel="squares found, %", ylim=(0, 105), xlim=(-0.5, len(STYLES) - 0.5))
    below.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=150)


# Matrices this small are done sooner than threads are woken.
@threadpool_limits.wrap(limits=1)
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=several, default=5, help="how many, default: 5")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("style.png"),
        help="where the figure goes, default: style.png",
    )
    args = parser.parse_args(argv)

    images = photographs(213)
    originals = squares(images)
    print(f"{len(originals)} squares of {len(images)} photographs")
    shares = np.array(
        [
            [shares_found(kind, originals, seed) for seed in range(args.seeds)]
            for kind in tqdm(KINDS, unit="network", disable=None)
        ]
    ).swapaxes(1, 2)
    print(table(shares))
    plot(images[0], shares, args.output)
    print(f"Figure: {args.output}")
    return shares


if __name__ == "__main__":
    main()
