"""Train one convolutional network with each normalisation over batch sizes.

    python batch_size.py [--seeds 3] [--epochs 2] [--processes 2] [--output batch_size.png]

The digits of scikit-learn, three convolutions, plain batches: every network sees the same number
of images, so a small batch means many steps. The learning rate is in proportion to the batch
size. The figure shows the test accuracy, with the standard error over the seeds, and what
SwitchableNorm has learned to use, as the mean over its layers.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from figures import COLOURS, STATISTICS, grid
from nn import SGD, Conv2d, Flatten, Linear, ReLU, Sequential, cross_entropy
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from train_digits import NORMS, digits

import numbanorm

SIZES = (2, 4, 8, 16, 32, 64, 128)


def network(norm, rng):
    """Return the network, and those of its layers that normalise."""
    layers, norms = [], []
    shape = (1, 8, 8)
    for channels, stride in (8, 2), (16, 2), (16, 1):
        layers.append(Conv2d(shape[0], channels, stride=stride, bias=norm == "none", rng=rng))
        shape = (channels, shape[1] // stride, shape[2] // stride)
        if norm != "none":
            norms.append(NORMS[norm](*shape))
            layers.append(norms[-1])
        layers.append(ReLU())
    layers += [Flatten(), Linear(np.prod(shape), 10, gain=0.1, rng=rng)]
    return Sequential(*layers), norms


def train(setting, epochs, rate):
    """Return the test accuracy, and SwitchableNorm's (mean and variance, in, ln and bn)."""
    norm, batch_size, seed = setting
    images, test_images, labels, test_labels = digits(seed)
    rng = np.random.default_rng(seed)
    model, norms = network(norm, rng)
    batches = -(-len(images) // batch_size)
    rates = np.linspace(rate * batch_size / 32, 0, epochs * batches, endpoint=False)
    optimiser = SGD(model, rates[0])
    schedule = iter(rates)
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(images)), batches):
            optimiser.learning_rate = next(schedule)
            model.zero_grad()
            _, dlogits = cross_entropy(model(images[batch]), labels[batch])
            model.backward(dlogits)
            optimiser.step()
    accuracy = np.mean(model.eval()(test_images).argmax(axis=1) == test_labels)
    if norm != "switchable":
        return accuracy, None
    importance = [layer.importance() for layer in norms]
    return accuracy, [
        [np.mean([i[moment][statistic] for i in importance]) for statistic in STATISTICS_MIXED]
        for moment in ("mean", "var")
    ]
