"""Train a recurrent network on words of unequal length, without a norm and with two.

    python rnn.py [--epochs 3] [--seeds 5] [--output rnn.png]

The words are those of Python's reference (`pydoc_data`), each once; a quarter is held out. Letter
by letter the network says which comes next, or that the word ends: h = tanh(norm(W x + U h)).
LayerNorm takes each state by itself. BatchNorm takes the states of all words of the batch that have
not ended yet (a mask leaves out the rest), and its running statistics are of all positions. The
figure shows how many bits are left to know of a letter in the held-out words, over the learning
rate, and, at the rate that is best for each, over the position in the word, with 95 % intervals.

LayerNorm is no better than no norm at the rate that suits both, and bears one that harms the
network without. BatchNorm is behind both everywhere, most at the first letter, where all states of
a batch are the same and have no variance, and at the last ones, which few words reach: other
positions have other statistics.
"""

import argparse
import re
from functools import partial
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from before_after import interval, several
from figures import COLOURS, grid
from nn import SGD, Layer, cross_entropy
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from train_digits import positive

import numbanorm.functional as F

NORMS = ("none", "batch", "layer")
RATES = (0.1, 0.3, 1.0)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = len(LETTERS)
SYMBOLS = END + 1
LENGTHS = range(2, 13)


def words():
    """Return each word once, in the order of the alphabet."""
    found = set(re.findall(r"(?<!\S)[a-z]+(?=[\s.,;:])", " ".join(topics.values())))
    return sorted(word for word in found if len(word) in LENGTHS)


def encode(found):
    """Return what stands before each letter and the letter, (words, positions); -1 is padding."""
    targets = np.full((len(found), max(map(len, found)) + 1), -1)
    for row, word in zip(targets, found, strict=True):
        row[: len(word) + 1] = [*map(LETTERS.index, word), END]
    inputs = np.roll(targets, 1, axis=1)
    inputs[:, 0] = END  # a word begins where another has ended
    return np.where(targets < 0, -1, inputs), targets


class RNN(Layer):
    """A recurrent network whose states are normalised before their activation.

    Parameters
    ----------
    norm : {"none", "batch", "layer"}
        What normalises.
    units : int
        Size of the state.
    rng : numpy.random.Generator
        Draws the initial weights.
    dtype : dtype
        Of the parameters.
    """

    def __init__(self, norm, units=64, *, rng, dtype=np.float32):
        def draw(*shape, gain=units**-0.5):
            return rng.normal(0, gain, shape).astype(dtype)

        ones, zeros = np.ones(units, dtype), np.zeros(units, dtype)
        super().__init__(
            inputs=draw(SYMBOLS, units, gain=1),
            states=draw(units, units),
            weight=ones,
            bias=zeros,
            outputs=draw(units, SYMBOLS),
            output_bias=np.zeros(SYMBOLS, dtype),
        )
        self.norm = norm
        self.running = zeros.copy(), ones.copy()

    def _normalize(self, z, mask):
        """Return the normalised z, and a function that returns its gradients for dy."""
        p = self._parameters
        if self.norm == "none":
            return z + p["bias"], lambda dy: (dy, 0, dy.sum(axis=0))
        if self.norm == "layer":
            y, saved = F.layer_norm_forward(z, z.shape[1], p["weight"], p["bias"])
            return y, partial(F.layer_norm_backward, saved=saved)
        y, saved = F.batch_norm_forward(
            z, *self.running, p["weight"], p["bias"], training=self.training, mask=mask
        )
        return y, partial(F.batch_norm_backward, saved=saved)

    def forward(self, x):
        """Return logits, (words, positions, symbols), for symbols, (words, positions)."""
        p = self._parameters
        start = np.zeros((len(x), p["bias"].size), p["bias"].dtype)
        self._x, self._states, self._backwards = x, [start], []
        for column in x.T:
            z = p["inputs"][column] + self._states[-1] @ p["states"]
            y, backward = self._normalize(z, (column >= 0)[:, None])
            self._states.append(np.tanh(y))
            self._backwards.append(backward)
        return np.stack(self._states[1:], axis=1) @ p["outputs"] + p["output_bias"]

    def backward(self, dlogits):
        """Add the gradients of the parameters, back through time."""
        p, g = self._parameters, self._gradients
        carried = 0
        g["output_bias"] += dlogits.sum(axis=(0, 1))
        for t in reversed(range(len(self._backwards))):
            before, state = self._states[t : t + 2]
            g["outputs"] += state.T @ dlogits[:, t]
            dstate = dlogits[:, t] @ p["outputs"].T + carried
            dz, dweight, dbias = self._backwards[t](dstate * (1 - state**2))
            g["weight"] += dweight
            g["bias"] += dbias
            np.add.at(g["inputs"], self._x[:, t], dz)
            g["states"] += before.T @ dz
            carried = dz @ p["states"].T


def loss(model, x, targets):
    """Return the cross-entropy of a letter in nats, and the gradient of the logits."""
    logits, real = model(x), targets >= 0
    dlogits = np.zeros_like(logits)
    mean, dlogits[real] = cross_entropy(logits[real], targets[real])
    return mean, dlogits


def bits(model, x, targets):
    """Return the mean cross-entropy in bits of all letters, and of those at each position."""
    positions = [
        cross_entropy(logits[real], target[real])[0]
        for logits, target in zip(model.eval()(x).swapaxes(0, 1), targets.T, strict=True)
        for real in [target >= 0]
    ]
    counts = (targets >= 0).sum(axis=0)
    return np.array([np.average(positions, weights=counts), *positions]) / np.log(2)


# Matrices this small are done sooner than threads are woken.
@threadpool_limits.wrap(limits=1)
def train(data, norm, rate, epochs, seed):
    """Return `bits` of the held-out words after training a new network."""
    x, test_x, targets, test_targets = data
    rng = np.random.default_rng(seed)
    model = RNN(norm, rng=rng)
    batches = len(x) // 32
    rates = np.linspace(rate, 0, epochs * batches, endpoint=False).reshape(epochs, batches)
    optimiser = SGD(model, rate)
    for epoch in rates:
        order = np.array_split(rng.permutation(len(x)), batches)
        for optimiser.learning_rate, batch in zip(epoch, order, strict=True):
            model.train().zero_grad()
            model.backward(loss(model, x[batch], targets[batch])[1])
            optimiser.step()
    return bits(model, test_x, test_targets)


def best_rates(found):
    """Return for each norm the index of the rate that leaves the fewest bits."""
    return found[..., 0].mean(axis=2).argmin(axis=1)


def table(found):
    """Return the bits, (norms, rates, seeds, 1 + positions), as text."""
    header = "".join(f"{f'rate {rate:g}':>16}" for rate in RATES)
    lines = [f"{'bits per letter':<18}{header}{'first letter':>16}{'last':>8}"]
    for norm, rows, best in zip(NORMS, found, best_rates(found), strict=True):
        cells = (f"{row[:, 0].mean():.3f} +- {interval(row[:, 0]):.3f}" for row in rows)
        first, last = rows[best].mean(axis=0)[[1, -1]]
        line = "".join(f"{cell:>16}" for cell in cells)
        lines.append(f"{norm:<18}{line}{first:>16.3f}{last:>8.3f}")
    return "\n".join(lines)


def plot(found, reach, path):
    """Save the bits over the learning rate, and over the position at the best rate."""
    figure, ((left, right),) = grid(1, 2, size=(10, 4))
    for norm, rows, best in zip(NORMS, found, best_rates(found), strict=True):
        style = {"color": COLOURS[norm], "linestyle": "--" if norm == "none" else "-"}
        style |= {"marker": "o", "markersize": 4, "capsize": 3, "label": norm}
        left.errorbar(RATES, rows[:, :, 0].mean(1), interval(rows[:, :, 0]), **style)
        rows = rows[best, :, 1:]
        positions = np.arange(1, rows.shape[1] + 1)
        right.errorbar(positions, rows.mean(axis=0), interval(rows.T), **style)
    left.set_xscale("log")
    left.set_xticks(RATES, RATES)
    left.set_xticks([], minor=True)
    left.set(title="What is left to know of a letter", xlabel="learning rate", ylabel="bits")
    right.set(
        title="At each position, at the best rate", xlabel="letter of the word", ylabel="bits"
    )
    right.set_xticks(positions[::2])
    shares = right.twinx()
    shares.bar(positions, 100 * reach, color="#7F7F7F", alpha=0.2)
    shares.set(ylim=(0, 300), yticks=(0, 100), ylabel="% of words that reach it")
    shares.yaxis.label.set_y(0.17)
    shares.spines[["top", "left"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=positive, default=3, help="default: 3")
    parser.add_argument("--seeds", type=several, default=5, help="how many, default: 5")
    parser.add_argument("--words", type=several, help="how many, default: all")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("rnn.png"),
        help="where the figure goes, default: rnn.png",
    )
    args = parser.parse_args(argv)

    found = np.random.default_rng(0).permutation(words())[: args.words]
    print(f"{len(found)} words of {min(map(len, found))} to {max(map(len, found))} letters")
    x, targets = encode(found)
    data = train_test_split(x, targets, test_size=0.25, random_state=0)
    settings = list(product(NORMS, RATES, range(args.seeds)))
    # A rate that is too large for a network ends in overflow: that is a result, too.
    with np.errstate(all="ignore"):
        results = [
            train(data, norm, rate, args.epochs, seed)
            for norm, rate, seed in tqdm(settings, unit="network", disable=None)
        ]
    results = np.reshape(results, (len(NORMS), len(RATES), args.seeds, -1))
    print(table(results))
    plot(results, np.mean(targets >= 0, axis=0), args.output)
    print(f"Figure: {args.output}")
    return results


if __name__ == "__main__":
    main()
