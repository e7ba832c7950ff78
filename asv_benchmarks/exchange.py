"""Time what processes exchange in a forward and its backward, by channels.

    mpiexec -n 4 --bind-to none python exchange.py [--channels 16 256 4096] [--calls 200]

A BatchNorm of two samples, once with the communicator and once alone, in turns: the medians'
difference is what the exchange costs, with all that is done about it. `mpiexec -n 1` shows what is
left where nobody else is there.
"""

import argparse
import json
import os
from pathlib import Path
from time import perf_counter

# One thread each, as the processes are to be timed and not how they share the cores.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
from mpi4py import MPI

import numbanorm


def step(layer: numbanorm.Norm, x: np.ndarray, dy: np.ndarray) -> float:
    """Return the seconds of a forward and a backward."""
    start = perf_counter()
    layer(x)
    layer.backward(dy)
    return perf_counter() - start


def measure(channels: int, calls: int) -> dict[str, float]:
    """Return the median microseconds with and without the exchange, of the slowest process."""
    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.rank)
    x, dy = rng.standard_normal((2, 2, channels), np.float32)
    layers = {
        "shared": numbanorm.BatchNorm1d(channels, comm=comm),
        "alone": numbanorm.BatchNorm1d(channels),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(calls + 5):
        for name, layer in layers.items():
            comm.Barrier()
            seconds[name].append(step(layer, x, dy))
    medians = {name: 1e6 * float(np.median(times[5:])) for name, times in seconds.items()}
    found = {name: comm.allreduce(value, MPI.MAX) for name, value in medians.items()}
    # All processes together have had one batch.
    everyone = np.concatenate(comm.allgather(x)).astype(np.float64)
    exact = (x - everyone.mean(0)) / np.sqrt(everyone.var(0) + 1e-5)
    np.testing.assert_allclose(layers["shared"](x), exact, rtol=1e-4, atol=1e-4)
    return {**found, "exchange": found["shared"] - found["alone"]}


def main(argv: list[str] | None = None) -> None:
    """Measure, and let the first process print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 256, 4096])
    parser.add_argument("--calls", type=int, default=200, help="default: 200")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args(argv)
    rows = {channels: measure(channels, args.calls) for channels in args.channels}
    comm = MPI.COMM_WORLD
    if comm.rank:
        return
    print(f"Processes: {comm.size}. Microseconds of a forward and a backward, medians.")
    print(f"{'channels':>10}{'alone':>10}{'shared':>10}{'exchange':>10}")
    for channels, row in rows.items():
        print(
            f"{channels:>10}" + "".join(f"{row[k]:>10.1f}" for k in ("alone", "shared", "exchange"))
        )
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
