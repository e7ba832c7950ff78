"""Compare SwitchableNorm with each single norm: three tasks, batches of 2 to 64, five seeds.

    python switchable.py [--steps 60] [--seeds 5] [--processes 2] [--output switchable.png]

Digits: scikit-learn's, which is it? Words: those of Python's reference, in which one letter has
been blanked: which? They are sequences with padding, which a mask keeps out of the statistics.
Pixels: the digits on patches of photographs, lighter or darker than these: which pixels are the
digit's? Here SwitchableNorm has the statistics of GroupNorm, too.

Every network has two convolutions with a norm behind each. The learning rate grows with the root of
the batch size and the number of steps falls with it. The figure shows the accuracy, for pixels the
intersection over the union, with 95 % intervals over the seeds, and the weights that SwitchableNorm
has learned, of the mean and the variance together. The table says against which norms it wins and
loses, and ties where the interval of the difference has 0 in it.

Of 36 comparisons SwitchableNorm wins 9, ties in 21 and loses 6. Pixels want InstanceNorm, by far,
and digits do not, and SwitchableNorm is between the best and the worst in both. On digits its
weights move to BN, on pixels to IN, though not far in so few steps; on words they hardly move.
"""

import argparse
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from batch_size import train_all
from before_after import interval, several
from custom_axes import photographs
from figures import COLOURS, STATISTICS, grid
from nn import SGD, Conv2d, Flatten, Linear, ReLU, Sequential, cross_entropy
from rnn import LETTERS, words
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from train_digits import digits, positive

import numbanorm

SIZES = (2, 8, 64)
OVER = ("in", "ln", "bn", "gn")
# Those with the statistics that SwitchableNorm mixes, and a weight for each channel.
NORMS = {
    "batch": numbanorm.BatchNorm2d,
    "layer": lambda c: numbanorm.GroupNorm(1, c),
    "instance": lambda c: numbanorm.InstanceNorm2d(c, affine=True),
    "group": lambda c: numbanorm.GroupNorm(4, c),
    "switchable": numbanorm.SwitchableNorm2d,
}
CHANNELS = 16
LENGTHS = range(3, 9)
PATCH = 10
# Kernel size and stride of the first convolution, classes, and the rate for a batch of 64.
TASKS = {
    "digits": (5, 4, 10, 0.3),
    "words": (3, 1, len(LETTERS), 0.1),
    "pixels": (3, 1, 2, 0.3),
}


@cache
def data(task):
    """Return x, targets and masks or None, in pairs of training and test.

    x is (N, C, H, W), targets are (N,) or (N, H, W) with -1 where nothing is asked.
    """
    rng = np.random.default_rng(0)
    if task == "words":
        return tuple(zip(*map(blanked, train_test_split(spelt(), random_state=0)), strict=True))
    images, test_images, labels, test_labels = digits(0)
    if task == "digits":
        return (images, test_images), (labels, test_labels), (None, None)
    parts = [on_photographs(x, rng) for x in (images, test_images)]
    return *zip(*parts, strict=True), (None, None)


def spelt():
    """Return the words as numbers of letters."""
    return [[*map(LETTERS.index, word)] for word in words() if len(word) in LENGTHS]


def blanked(found):
    """Return each word as often as it has letters, each time with another one blanked."""
    pairs = [(word, i) for word in found for i in range(len(word))]
    n, length = len(pairs), max(LENGTHS)
    x = np.zeros((n, len(LETTERS) + 1, 1, length), np.float32)
    targets, mask = np.full((n, 1, length), -1), np.zeros((n, 1, 1, length), bool)
    for n, (word, i) in enumerate(pairs):
        x[n, word, 0, np.arange(len(word))] = 1
        x[n, :, 0, i] = 0
        x[n, -1, 0, i] = 1
        targets[n, 0, i] = word[i]
        mask[n, ..., : len(word)] = True
    return x, targets, mask


def on_photographs(images, rng):
    """Return the digits on patches of photographs, and which pixels are theirs."""
    grey = photographs(213).mean(axis=1)
    x = np.empty((len(images), 1, PATCH, PATCH), np.float32)
    targets = np.zeros((len(images), PATCH, PATCH), int)
    for patch, target, (digit,) in zip(x, targets, images, strict=True):
        n, i, j = rng.integers((len(grey), *(np.array(grey.shape[1:]) - PATCH)))
        row, column = rng.integers(PATCH - len(digit) + 1, size=2)
        place = slice(row, row + len(digit)), slice(column, column + len(digit))
        patch[0] = grey[n, i : i + PATCH, j : j + PATCH]
        patch[0][place] += rng.choice([-1, 1]) * rng.uniform(0.2, 0.6) * digit
        target[place] = digit > 0.5
    return x, targets


class Network(Sequential):
    """Two convolutions, each with a norm that takes a mask, and what asks for the classes.

    Parameters
    ----------
    task, norm : str
        Of `TASKS` and `NORMS`.
    channels : int
        Of x.
    rng : numpy.random.Generator
        Draws the initial weights.
    """

    def __init__(self, task, norm, channels, rng):
        kernel_size, stride, classes, _ = TASKS[task]
        options = (
            {"over": OVER, "num_groups": 4} if (task, norm) == ("pixels", "switchable") else {}
        )
        self.norms = [NORMS[norm](CHANNELS, **options) for _ in range(2)]
        first = Conv2d(channels, CHANNELS, kernel_size, stride=stride, bias=False, rng=rng)
        second = Conv2d(CHANNELS, CHANNELS, bias=False, rng=rng)
        if task == "digits":
            head = Flatten(), Linear(CHANNELS * 4, classes, gain=0.1, rng=rng)
        else:
            head = (Conv2d(CHANNELS, classes, 1, rng=rng),)
        super().__init__(first, self.norms[0], ReLU(), second, self.norms[1], ReLU(), *head)

    def forward(self, x, mask=None):
        """Return logits, (N, classes) or (N, classes, H, W)."""
        for layer in self.layers:
            x = layer(x, mask=mask) if layer in self.norms else layer(x)
        return x


def loss(model, x, targets, mask):
    """Return the mean cross-entropy where something is asked, and the gradient of the logits."""
    logits, asked = model.forward(x, mask), targets >= 0
    dlogits = np.zeros_like(logits)
    mean, np.moveaxis(dlogits, 1, -1)[asked] = cross_entropy(
        np.moveaxis(logits, 1, -1)[asked], targets[asked]
    )
    return mean, dlogits


def score(task, model, x, targets, mask):
    """Return the accuracy, of pixels the intersection over the union."""
    found, asked = model.eval().forward(x, mask).argmax(axis=1), targets >= 0
    found, targets = found[asked], targets[asked]
    if task == "pixels":
        return np.sum(found & targets) / np.sum(found | targets)
    return np.mean(found == targets)


# Matrices this small are done sooner than threads are woken.
@threadpool_limits.wrap(limits=1)
def train(setting, steps):
    """Return the score, and SwitchableNorm's weights, (layers, statistics), NaN without."""
    task, size, norm, seed = setting
    (x, test_x), (targets, test_targets), (mask, test_mask) = data(task)
    rng = np.random.default_rng(seed)
    model = Network(task, norm, x.shape[1], rng)
    root = np.sqrt(size / 64)
    rate = TASKS[task][-1] * root
    optimiser = SGD(model, rate)
    for optimiser.learning_rate in np.linspace(rate, 0, round(steps / root), endpoint=False):
        batch = rng.choice(len(x), size, replace=False)
        model.zero_grad()
        _, dlogits = loss(model, x[batch], targets[batch], None if mask is None else mask[batch])
        model.backward(dlogits)
        optimiser.step()
    weights = np.full((2, len(OVER)), np.nan)
    if norm == "switchable":
        for row, layer in zip(weights, model.norms, strict=True):
            moments = layer.importance().values()
            row[:] = [np.mean([m.get(k, np.nan) for m in moments]) for k in OVER]
    return score(task, model, test_x, test_targets, test_mask), weights


def against(scores):
    """Return by how much the last row, SwitchableNorm, is ahead of each other: mean, interval."""
    differences = scores[-1] - scores[:-1]
    return differences.mean(axis=-1), interval(differences)


def verdict(mean, half):
    """Say what a difference and its interval amount to."""
    return "ties" if abs(mean) <= half else "wins" if mean > 0 else "loses"


def table(scores, weights, sizes):
    """Return scores, (tasks, sizes, norms, seeds), in percent, and the weights as text."""
    places = [
        (f"{task}, {size}", 100 * scores[t, s], weights[t, s].mean(axis=0))
        for (t, task), (s, size) in product(enumerate(TASKS), enumerate(sizes))
    ]

    def header(text, columns):
        return f"{text:<20}" + "".join(f"{column:>21}" for column in columns)

    lines = [header("task, batch size", NORMS)]
    for place, found, _ in places:
        cells = (f"{v.mean():.1f} +- {interval(v):.1f}" for v in found)
        lines.append(header(place, cells))
    lines += ["", header("switchable less", list(NORMS)[:-1])]
    verdicts = []
    for place, found, _ in places:
        pairs = list(zip(*against(found), strict=True))
        verdicts.append([verdict(*pair) for pair in pairs])
        cells = (
            f"{v} {mean:.1f} +- {half:.1f}"
            for v, (mean, half) in zip(verdicts[-1], pairs, strict=True)
        )
        lines.append(header(place, cells))
    for kind in "wins", "ties", "loses":
        lines.append(header(kind, (column.count(kind) for column in zip(*verdicts, strict=True))))
    lines += ["", header("weights, layers 1, 2", OVER)]
    for place, _, (first, second) in places:
        pairs = zip(first, second, strict=True)
        lines.append(header(place, ("" if np.isnan(a) else f"{a:.2f} {b:.2f}" for a, b in pairs)))
    return "\n".join(lines)


def plot(scores, weights, sizes, path):
    """Save the scores and the weights over batch sizes, a column for each task."""
    figure, axes = grid(2, len(TASKS), size=(11, 6), sharex=True, height_ratios=(3, 2))
    for t, (task, (above, below)) in enumerate(zip(TASKS, axes.T, strict=True)):
        for k, norm in enumerate(NORMS):
            values = 100 * scores[t, :, k]
            # Side by side, so that the intervals are seen.
            places = np.array(sizes) * 2 ** (0.08 * (k - 2))
            style = {"color": COLOURS[norm], "marker": "o", "markersize": 4, "label": norm}
            above.errorbar(places, values.mean(axis=1), interval(values), capsize=2, **style)
        for k, statistic in enumerate(OVER):
            for layer, line in enumerate(("-", "--")):
                values = weights[t, :, :, layer, k]
                style = {"color": STATISTICS[statistic], "linestyle": line, "marker": "o"}
                label = statistic.upper() if layer == 0 else None
                below.plot(sizes, values.mean(axis=1), markersize=4, label=label, **style)
        measure = "intersection over union" if task == "pixels" else "accuracy"
        above.set_title(f"{task}: {measure} in %", fontsize=11)
        below.set_xscale("log", base=2)
        below.set_xticks(sizes, sizes)
        below.set_xlabel("batch size")
        below.sharey(axes[1, 0])
    axes[0, 0].legend(frameon=False)
    axes[1, 0].set_ylabel("SwitchableNorm's weights,\nlayers 1 (—) and 2 (- -)")
    axes[1, -1].legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=positive, nargs="+", default=SIZES, help="batch sizes")
    parser.add_argument("--steps", type=positive, default=60, help="for a batch of 64, default: 60")
    parser.add_argument("--seeds", type=several, default=5, help="how many, default: 5")
    parser.add_argument("--processes", type=positive, default=2, help="default: 2")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("switchable.png"),
        help="where the figure goes, default: switchable.png",
    )
    args = parser.parse_args(argv)

    sizes = sorted(args.sizes)
    settings = list(product(TASKS, sizes, NORMS, range(args.seeds)))
    scores, weights = train_all(train, settings, args.processes, steps=args.steps)
    shape = len(TASKS), len(sizes), len(NORMS), args.seeds
    scores = scores.reshape(shape)
    weights = weights.reshape(*shape, *weights.shape[1:])[:, :, list(NORMS).index("switchable")]
    print(table(scores, weights, sizes))
    plot(scores, weights, sizes, args.output)
    print(f"Figure: {args.output}")
    return scores, weights


if __name__ == "__main__":
    main()
