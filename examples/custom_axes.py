"""Normalise over any axes: each named layer is one line of Norm, and so are those without a name.

    python custom_axes.py [--output custom_axes.png]

First, each named layer is made from `Norm`: outputs, gradients and running statistics are the
same to the last bit. Then the two photographs that come with scikit-learn are a batch that is
normalised over axes for which PyTorch has no layer. The table has the largest mean and the
average variance of what comes out: below 1 where there is next to no variance against eps.
"""

import argparse
from pathlib import Path

import numpy as np
from figures import grid
from sklearn.datasets import load_sample_images
from train_digits import positive

import numbanorm
from numbanorm import BatchNorm2d, GroupNorm, InstanceNorm2d, LayerNorm, Norm, RMSNorm

N, C, H, W = range(4)  # the axes of a batch of images


def photographs(height):
    """Return the two photographs as (N, C, H, W), between 0 and 1, about that high."""
    x = np.stack(load_sample_images().images).transpose(0, 3, 1, 2) / 255
    step = max(1, x.shape[H] // height)
    x = x[:, :, : x.shape[H] // step * step, : x.shape[W] // step * step]
    n, c, h, w = x.shape
    # The mean of each block of step x step pixels.
    return x.reshape(n, c, h // step, step, w // step, step).mean(axis=(3, 5)).astype(np.float32)


def named(c, h, w):
    """Return pairs of a named layer for x of shape (N, c, h, w), and the same as a Norm."""
    return (
        (BatchNorm2d(c), Norm((N, H, W), track_stats=True)),
        (InstanceNorm2d(c, affine=True), Norm((H, W), feature_axes=C)),
        (GroupNorm(c, c), Norm((C, H, W), feature_axes=C, groups=c)),
        (GroupNorm(1, c), Norm((C, H, W), feature_axes=C)),
        (LayerNorm([c, h, w]), Norm((C, H, W))),
        (LayerNorm(w), Norm(W)),
        (RMSNorm(w), Norm(W, center=False, bias=False, eps=None)),
    )


def unnamed():
    """Return layers without a name; without weights too, so that the statistics alone are seen."""
    return {
        "each pixel over its colours": Norm(C, affine=False),
        "each column of each colour": Norm(H, affine=False),
        "each row, colours together": Norm((C, W), affine=False),
        "each place over the batch": Norm(N, affine=False),
        "each row over batch and colours": Norm((N, C, W), affine=False),
    }


def largest_difference(a, b, x, dy):
    """Return how far apart two layers are at most: outputs, gradients, running statistics."""
    pairs = [(a(x), b(x)), (a.backward(dy), b.backward(dy))]
    pairs += [(gradient, b.gradients()[name]) for name, gradient in a.gradients().items()]
    pairs += [(array, b.state_dict()[name]) for name, array in a.state_dict().items()]
    return max(float(np.abs(one - other).max()) for one, other in pairs)


def plot(x, outputs, path):
    """Save the first photograph, and what the layers without a name make of it."""
    figure, axes = grid(2, 3, size=(8, 4.1))
    for axis, (title, y) in zip(axes.flat, {"the photograph": x, **outputs}.items(), strict=True):
        # From three deviations below the mean to three above it.
        picture = y[0] if y is x else (y[0] + 3) / 6
        axis.imshow(picture.transpose(1, 2, 0).clip(0, 1), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--height", type=positive, default=60, help="of the pictures, default: 60")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("custom_axes.png"),
        help="where the figure goes, default: custom_axes.png",
    )
    args = parser.parse_args(argv)

    x = photographs(args.height)
    dy = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    print(f"x is {x.shape}: N, C, H, W\n")
    differences, outputs = {}, {}
    for layer, norm in named(*x.shape[1:]):
        differences[repr(layer)] = largest_difference(layer, norm, x, dy)
        print(f"{layer}\n  = {norm}\n    largest difference {differences[repr(layer)]:g}")
        assert differences[repr(layer)] == 0

    print(f"\n{'':<32}{'':<54}{'mean':>6}{'variance':>10}")
    for title, norm in unnamed().items():
        y = outputs[title] = norm(x)
        moments = numbanorm.moments(y, norm.axes)
        mean, var = np.abs(moments.mean).max(), moments.var().mean()
        print(f"{title:<32}{norm!r:<54}{mean:>6.2f}{var:>10.4f}")
        assert mean < 1e-5
    plot(x, outputs, args.output)
    print(f"Figure: {args.output}")
    return differences, outputs


if __name__ == "__main__":
    main()
