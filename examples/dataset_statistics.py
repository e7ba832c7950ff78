"""Take channel means and deviations of a data set that does not fit in memory.

    python dataset_statistics.py [--images 8000] [--piece 200] [--output dataset_statistics.png]

The data set is a memory-mapped file of 8-bit crops, 96x96 pixels, from the two photographs that
come with scikit-learn. `numbanorm.moments` goes over it piece by piece and `Moments.merge` puts
the pieces together: the result is that of the whole, and one piece at a time is in memory.

Where Dask is installed, `numbanorm.dask.moments` does the same in threads and in processes. What
Dask's dashboard draws as a graph is shown in words: a task for each piece reads it and returns four
numbers for each channel; a few of those are merged by a task of the next level, and so on to one.

The table has the largest difference to the exact deviations, which come from whole numbers. It
also has a shortcut that is often seen, the average of the pieces' deviations. That is wrong as
soon as pieces differ; here they do, since the file has one photograph's crops after the other's.
"""

import argparse
import sys
import tempfile
import tracemalloc
from fractions import Fraction
from pathlib import Path
from time import perf_counter

import numpy as np
from figures import grid
from sklearn.datasets import load_sample_images
from tqdm import tqdm
from train_digits import positive

from numbanorm import Moments, moments

try:
    import dask
    import dask.array
    from dask.callbacks import Callback
    from dask.diagnostics import ProgressBar
    from dask.utils import key_split

    from numbanorm.dask import moments as dask_moments
except ImportError:
    dask = None

SIZE = 96
CHANNELS = {"red": "#D55E00", "green": "#009E73", "blue": "#0072B2"}


class OnDisk:
    """A memory-mapped array that is cheap to send to another process: it travels as a path."""

    def __init__(self, path):
        self.path = path
        data = np.load(path, mmap_mode="r")
        self.shape, self.dtype, self.ndim = data.shape, data.dtype, data.ndim

    def __getitem__(self, index):
        """Return a part of the array, still on disk."""
        return np.load(self.path, mmap_mode="r")[index]


def write(path, images, seed):
    """Write random crops of both photographs, one half after the other, as (images, 3, 96, 96)."""
    data = np.lib.format.open_memmap(path, "w+", np.uint8, (images, len(CHANNELS), SIZE, SIZE))
    rng = np.random.default_rng(seed)
    photographs = [image.transpose(2, 0, 1) for image in load_sample_images().images]
    for n in tqdm(range(images), desc="writing", unit="image", disable=None):
        photograph = photographs[n * len(photographs) // images]
        row, column = rng.integers(np.subtract(photograph.shape[1:], SIZE - 1))
        data[n] = photograph[:, row : row + SIZE, column : column + SIZE]
    data.flush()


def piece_moments(piece):
    """Return the channel moments of some images, in bytes."""
    return moments(piece.astype(np.float32), axes=(0, 2, 3))


def std(merged):
    """Return the deviations of values between 0 and 1."""
    return merged.std() / 255


def in_pieces(data, piece):
    """Return the moments of each piece, in order."""
    starts = tqdm(range(0, data.shape[0], piece), desc="moments", unit="piece", disable=None)
    return [piece_moments(data[start : start + piece]) for start in starts]


def with_dask(data, piece, scheduler):
    """Return the moments of the whole, as Dask takes them, and its task graph in words."""
    array = dask.array.from_array(data, chunks=(piece, -1, -1, -1)).astype(np.float32)
    waits_for = {}

    def begins(graph, state):
        waits_for.update(state["dependencies"])

    watch = Callback(start_state=begins), ProgressBar(out=sys.stderr)
    with dask.config.set(scheduler=scheduler), watch[0], watch[1]:
        merged = dask_moments(array, axes=(0, 2, 3))
    return merged, in_words(waits_for)


def in_words(waits_for):
    """Return what Dask's dashboard draws as a graph: which task waits for which others."""
    merging = [task for task in waits_for if "merge" in key_split(task)]
    reading = {before for task in merging for before in waits_for[task]} - set(merging)
    depth = {}

    def level(task):
        if task not in depth:
            depth[task] = 1 + max((level(before) for before in waits_for[task]), default=-1)
        return depth[task] if task in merging else 0

    levels = max(map(level, merging))
    most = max(len(waits_for[task]) for task in merging)
    return (
        f"{len(reading)} tasks read a piece each and return its moments; "
        f"{len(merging)} tasks on {levels} levels merge up to {most} results each."
    )


def histograms(data, piece):
    """Return how often each of the 256 values stands in each channel."""
    counts = np.zeros((len(CHANNELS), 256), np.int64)
    for start in range(0, data.shape[0], piece):
        for channel, values in enumerate(data[start : start + piece].swapaxes(0, 1)):
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    return counts


def exact_std(counts):
    """Return the exact deviation of values between 0 and 1 from the counts of the bytes."""
    counts = [int(count) for count in counts]
    n = sum(counts)
    mean = Fraction(sum(value * count for value, count in enumerate(counts)), n)
    var = sum(count * (value - mean) ** 2 for value, count in enumerate(counts)) / n
    return float(var) ** 0.5 / 255


def has_dask():
    return dask is not None


def timed(work, *args):
    """Return a result and the seconds it took."""
    start = perf_counter()
    result = work(*args)
    return result, perf_counter() - start


def table(rows, exact):
    """Return the deviations of each channel as text, with their difference to the exact ones."""
    names = "".join(f"{name:>10}" for name in CHANNELS)
    lines = [f"{'deviation':<24}{names}{'difference':>14}{'seconds':>10}"]
    for name, (values, seconds) in {"exact": (exact, None), **rows}.items():
        difference = "" if values is exact else f"{np.abs(values - exact).max():.1e}"
        lines.append(
            f"{name:<24}"
            + "".join(f"{value:>10.6f}" for value in values)
            + f"{difference:>14}"
            + ("" if seconds is None else f"{seconds:>10.2f}")
        )
    return "\n".join(line.rstrip() for line in lines)


def plot(counts, pieces, total, path):
    """Save the histograms, and how the deviations come together over the pieces."""
    figure, axes = grid(1, 2, size=(10, 3.6))
    left, right = axes[0]
    number = np.arange(len(pieces)) + 1
    merged = np.array([std(Moments.merge(pieces[:n])) for n in number])
    average = np.cumsum([std(piece) for piece in pieces], axis=0) / number[:, None]
    for channel, (name, colour) in enumerate(CHANNELS.items()):
        density = counts[channel].reshape(64, 4).sum(axis=1) * 64 / counts[channel].sum()
        left.stairs(density, np.linspace(0, 1, 65), color=colour, linewidth=1.2)
        left.errorbar(
            total.mean[channel] / 255, 0.95 - 0.05 * channel, xerr=std(total)[channel],
            transform=left.get_xaxis_transform(), color=colour, marker="o", capsize=3, label=name,
        )  # fmt: skip
        right.plot(number, merged[:, channel], color=colour, label=name)
        right.plot(number, average[:, channel], color=colour, linestyle="--")
    left.set(title="Values, mean and deviation of each channel", xlabel="value")
    left.set(ylabel="density", yscale="log", ylim=(0.03, 100))
    left.legend(frameon=False, ncols=3, loc="lower center")
    right.set(title="Deviation after so many pieces", xlabel="pieces")
    right.plot([], [], color="black", label="Moments.merge")
    right.plot([], [], color="black", linestyle="--", label="average of deviations")
    right.legend(*(handles[3:] for handles in right.get_legend_handles_labels()), frameon=False)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=positive, default=8000, help="default: 8000")
    parser.add_argument(
        "--piece", type=positive, default=200, help="images at a time, default: 200"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dataset_statistics.png"),
        help="where the figure goes, default: dataset_statistics.png",
    )
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "images.npy"
        write(path, args.images, args.seed)
        data = OnDisk(path)
        # A whole piece and the last one: Numba compiles, which is not to be measured.
        for size in args.piece, args.images % args.piece:
            piece_moments(data[:size])

        tracemalloc.start()
        pieces, seconds = timed(in_pieces, data, args.piece)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        total = Moments.merge(pieces)
        rows = {"Moments.merge": (std(total), seconds)}
        for scheduler in ("threads", "processes") if has_dask() else ():
            (merged, graph), seconds = timed(with_dask, data, args.piece, scheduler)
            rows[f"Dask, {scheduler}"] = std(merged), seconds
        rows["average of deviations"] = np.mean([std(piece) for piece in pieces], axis=0), None
        counts = histograms(data, args.piece)

    exact = np.array([exact_std(channel) for channel in counts])
    size = np.prod(data.shape) / 1e6
    print(f"{args.images} images: {size:.0f} MB as bytes, {4 * size:.0f} MB as float32.")
    print(f"Of these at most {peak / 1e6:.0f} MB were in memory at a time.\n")
    print(table(rows, exact))
    if has_dask():
        print(f"\nDask's graph: {graph}")
    else:
        print("With Dask (pip install 'numbanorm[dask]') there are two more rows.")
    plot(counts, pieces, total, args.output)
    print(f"Figure: {args.output}")
    return {name: values for name, (values, _) in rows.items()}, exact


if __name__ == "__main__":
    main()
