"""See what padding does to BatchNorm's statistics, and how a mask undoes it.

    python masked_sequences.py [--batch-size 16] [--output masked_sequences.png]

The sequences are the sentences in which scikit-learn describes its data sets, of 3 to 50 words. A
word is how often each of the ten commonest letters stands in it. Sentences of a batch are padded
with zeros to one length. With a mask the padding counts for nothing: the statistics, and what
becomes of the real words, are as if the sentences had not been padded at all.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figures import COLOURS, grid
from sklearn import datasets

import numbanorm

LETTERS = "etaoinshrl"
DATASETS = "breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine"


class Errors(NamedTuple):
    """How far a batch is from the truth: its unpadded words, in float64."""

    mean: float  # this and the next in standard deviations of all words
    std: float
    output: float  # of the real words


def sentences():
    """Return each sentence of at least three words as (10 letters, words)."""
    found = []
    for name in DATASETS:
        description = getattr(datasets, f"load_{name}")().DESCR.lower()
        for sentence in re.split(r"\n\s*\n|[.:!?]\s", description):
            words = re.findall(r"[a-z]{2,}|\b[ai]\b", sentence)
            if len(words) >= 3:
                counts = [[word.count(letter) for word in words] for letter in LETTERS]
                found.append(np.array(counts, np.float32))
    return found


def pad(batch, length):
    """Return sentences as (N, letters, length), and a mask (N, 1, length) of the real words."""
    x = np.zeros((len(batch), len(LETTERS), length), np.float32)
    mask = np.zeros((len(batch), 1, length), bool)
    for i, sentence in enumerate(batch):
        x[i, :, : sentence.shape[1]] = sentence
        mask[i, :, : sentence.shape[1]] = True
    return x, mask


def real_words(y, mask):
    """Return y without the padding, as (words, letters)."""
    return y.transpose(0, 2, 1)[mask[:, 0]]


def normalize(x, mask):
    """Return x normalised by a new BatchNorm1d, and the means and standard deviations it took."""
    moments = numbanorm.moments(x, axes=(0, 2), mask=mask)
    y = numbanorm.BatchNorm1d(len(LETTERS))(x, mask=mask)
    return y, moments.mean, moments.std()


def errors(batch, length, unit):
    """Return the share of padding, and without and with mask the errors and the real words."""
    x, mask = pad(batch, length)
    words = np.concatenate(batch, axis=1).T.astype(np.float64)
    mean, std = words.mean(axis=0), words.std(axis=0)
    truth = (words - mean) / np.sqrt(std**2 + 1e-5)
    results = []
    for given in None, mask:
        y, got_mean, got_std = normalize(x, given)
        real = real_words(y, mask)
        differences = (got_mean - mean) / unit, (got_std - std) / unit, real - truth
        results.append((Errors(*(np.abs(d).max() for d in differences)), real))
    return 1 - mask.mean(), results


def batches(found, size, rng):
    """Yield a name, the sentences of each batch, and the length to which all are padded, or 0."""

    def split(order):
        parts = np.array_split(order, max(1, len(found) // size))
        return [[found[i] for i in part] for part in parts]

    lengths = [sentence.shape[1] for sentence in found]
    in_random_order = split(rng.permutation(len(found)))
    yield "sorted by length", split(np.argsort(lengths, kind="stable")), 0
    yield "in random order", in_random_order, 0
    yield "all padded to the longest", in_random_order, max(lengths)


def measure(found, size, rng):
    """Return by name: shares of padding; errors and real words without mask, then with it."""
    unit = np.concatenate(found, axis=1).std(axis=1)
    measured = {}
    for name, groups, length in batches(found, size, rng):
        rows = [errors(g, length or max(s.shape[1] for s in g), unit) for g in groups]
        shares, results = zip(*rows, strict=True)
        measured[name] = np.array(shares), *zip(*results, strict=True)
    return measured


def keeps_padding_out(found):
    """Tell whether NaN in the padding leaves the real words as they are, to the last bit."""
    x, mask = pad(found, max(sentence.shape[1] for sentence in found))
    spoiled = np.where(mask, x, np.float32(np.nan))
    outputs = (real_words(normalize(values, mask)[0], mask) for values in (x, spoiled))
    return np.array_equal(*outputs)


def table(measured):
    """Return the largest errors of all batches as text."""
    header = f"{'mean':>9}{'std':>9}{'output':>9}"
    lines = [f"{'batches':<26}padding{'without mask':>20}{'with mask':>25}"]
    lines += [f"{'':<33}{header} {header}"]
    for name, (shares, *kinds) in measured.items():
        worst = [np.max([found for found, _ in results], axis=0) for results in kinds]
        cells = " ".join("".join(f"{value:>9.2g}" for value in row) for row in worst)
        lines.append(f"{name:<26}{shares.mean():>7.0%}{cells}")
    return "\n".join(lines)


def plot(measured, path):
    """Save the output's error by padding share, and the deviation of the normalised letters."""
    figure, ((left, right),) = grid(1, 2, size=(10, 4))
    kinds = ("without mask", COLOURS["none"], "o"), ("with mask", COLOURS["batch"], "D")
    for k, (label, colour, marker) in enumerate(kinds):
        shares = np.concatenate([shares for shares, *_ in measured.values()])
        found = [e.output for _, *results in measured.values() for e, _ in results[k]]
        left.semilogy(100 * shares, found, marker, color=colour, label=label, alpha=0.7)
        _, *results = measured["in random order"]
        words = np.concatenate([real for _, real in results[k]])
        right.plot(list(LETTERS), words.std(axis=0), marker, color=colour, label=label)
    left.set(
        title="BatchNorm's output against the unpadded truth",
        xlabel="padding, % of the batch",
        ylabel="largest error of a real word",
        xlim=(-3, 100),
    )
    right.axhline(1, color="black", linewidth=0.8, zorder=0)
    right.set(
        title="The normalised letters of all real words",
        xlabel="letter",
        ylabel="standard deviation",
        ylim=(0, None),
    )
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-size", type=positive, default=16, help="default: 16")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("masked_sequences.png"),
        help="where the figure goes, default: masked_sequences.png",
    )
    args = parser.parse_args(argv)

    found = sentences()
    lengths = [sentence.shape[1] for sentence in found]
    print(f"{len(found)} sentences of {min(lengths)} to {max(lengths)} words\n")
    measured = measure(found, args.batch_size, np.random.default_rng(args.seed))
    print(table(measured))
    print("\nLargest errors, against the words without padding in float64.")
    same = "the same" if keeps_padding_out(found) else "different"
    print(f"With a mask and NaN for padding, the outputs of the real words are {same}.")
    plot(measured, args.output)
    print(f"Figure: {args.output}")
    return measured


if __name__ == "__main__":
    main()
