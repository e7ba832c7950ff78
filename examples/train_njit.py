"""Train a network in one `@njit` function, matrix products and all, and beside it in NumPy.

    python train_njit.py [--hidden 128] [--batch-size 32] [--epochs 10] [--rate 0.5] [--seed 0]

The data are the digits that come with scikit-learn; the network is a dense layer, BatchNorm, ReLU
and a second dense layer. `step` is a whole step of training: it is written once, and runs in two
ways. As it stands, it is NumPy. Compiled by Numba it is one function without Python between its
products, sums and comparisons. The functions of `numbanorm.jit` work in both, and give the same
bits; products and exponentials differ in the last place, as NumPy and Numba have their own.
"""

import argparse
from time import perf_counter

import numpy as np
from numba import njit
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm
from train_digits import positive

from numbanorm.jit import batch_norm, batch_norm_backward, batch_norm_inference

EPS = 1e-5
MOMENTUM = 0.1


def step(x, targets, parameters, running_mean, running_var, rate):
    """Take a step of gradient descent, in place; return the loss of the batch."""
    weight_in, weight, bias, weight_out, bias_out = parameters
    n = len(x)
    # Forward.
    h = x @ weight_in
    y, mean, var, rstd = batch_norm(h, weight, bias, EPS)
    a = np.maximum(y, np.float32(0))
    p = np.exp(a @ weight_out + bias_out)  # no logit comes near 88, where it would overflow
    p /= p.sum(axis=1).reshape(n, 1)
    loss = -np.sum(targets * np.log(p)) / n
    # Running statistics.
    running_mean += MOMENTUM * (mean - running_mean)
    running_var += MOMENTUM * (var * n / (n - 1) - running_var)
    # Backward.
    dlogits = (p - targets) / np.float32(n)
    dy = np.where(y > 0, dlogits @ weight_out.T, np.float32(0))
    dh, dweight, dbias = batch_norm_backward(dy, h, weight, mean, rstd)
    # Descent.
    weight_out -= rate * (a.T @ dlogits)
    bias_out -= rate * dlogits.sum(axis=0)
    weight -= rate * dweight
    bias -= rate * dbias
    weight_in -= rate * (x.T @ dh)
    return loss


def predict(x, parameters, running_mean, running_var):
    """Return the digit of each image."""
    weight_in, weight, bias, weight_out, bias_out = parameters
    y = batch_norm_inference(x @ weight_in, weight, bias, running_mean, running_var, EPS)
    return (np.maximum(y, np.float32(0)) @ weight_out + bias_out).argmax(axis=1)


# With cache=True the next start of this script compiles nothing.
WAYS = {"NumPy": (step, predict), "@njit": (njit(cache=True)(step), njit(cache=True)(predict))}


def initial(hidden, rng):
    """Return parameters and running statistics; those of the norm are float64."""
    weight_in = rng.normal(0, np.sqrt(2 / 64), (64, hidden)).astype(np.float32)
    weight_out = rng.normal(0, np.sqrt(2 / hidden), (hidden, 10)).astype(np.float32)
    norm = np.ones(hidden), np.zeros(hidden)
    return (
        (weight_in, *norm, weight_out, np.zeros(10, np.float32)),
        np.zeros(hidden),
        np.ones(hidden),
    )


def train(way, data, args):
    """Return parameters, losses (epochs, batches), test accuracy and seconds per epoch."""
    step, predict = WAYS[way]
    x, x_test, labels, labels_test = data
    targets = np.eye(10, dtype=np.float32)[labels]
    rng = np.random.default_rng(args.seed)
    state = initial(args.hidden, rng)
    size = min(args.batch_size, len(x))
    # Compiles, or loads: on a copy of all that it changes.
    parameters, *running = state
    step(
        x[:size], targets[:size], tuple(p.copy() for p in parameters),
        *(r.copy() for r in running), np.float32(args.rate),
    )  # fmt: skip
    losses, seconds = [], 0.0
    for _ in tqdm(range(args.epochs), desc=way, unit="epoch", disable=None):
        order = rng.permutation(len(x))
        batches = order[: len(x) // size * size].reshape(-1, size)
        start = perf_counter()
        losses.append([step(x[b], targets[b], *state, np.float32(args.rate)) for b in batches])
        seconds += perf_counter() - start
    accuracy = np.mean(predict(x_test, *state) == labels_test)
    return parameters, np.array(losses), accuracy, seconds / args.epochs


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=positive, default=128, help="units, default: 128")
    parser.add_argument("--batch-size", type=positive, default=32, help="default: 32")
    parser.add_argument("--epochs", type=positive, default=10, help="default: 10")
    parser.add_argument("--rate", type=float, default=0.5, help="learning rate, default: 0.5")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)

    digits = load_digits()
    x = (digits.data / 16).astype(np.float32)
    data = train_test_split(x, digits.target, random_state=args.seed, stratify=digits.target)
    runs = {way: train(way, data, args) for way in WAYS}
    print(f"{'':<8}{'loss':>10}{'accuracy':>10}{'seconds per epoch':>20}")
    for way, (_, losses, accuracy, seconds) in runs.items():
        print(f"{way:<8}{losses[-1].mean():>10.4f}{accuracy:>10.3f}{seconds:>20.4f}")
    first, second = (losses[0] for _, losses, _, _ in runs.values())
    print(f"largest difference of a loss in the first epoch {np.abs(first - second).max():.1e}")
    return runs


if __name__ == "__main__":
    main()
