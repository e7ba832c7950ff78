"""Forward and backward while another process keeps one of the cores busy, beside PyTorch.

    python asv_benchmarks/load.py [--rounds N]

Prints the median and the 95th percentile in ms, without and with that process. PyTorch is tuned, as
in compare.py, and both take turns in one process; PyTorch's idle threads fall asleep in between.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import cases
from compare import TUNED

NAMES = ("batch 64x64x56x56", "batch 32x256x28x28", "batch 64x512x7x7", "layer 16384x768 last")


def timed(step: Callable[[], None], times: list[float]) -> None:
    """Call once, and three times with a clock."""
    step()
    for _ in range(3):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)


def step_of(runner: cases.Runner) -> Callable[[], None]:
    """Return forward and backward in training."""

    def step() -> None:
        runner.train()
        runner.backward()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--case", nargs="+", default=NAMES, help="as for compare.py")
    options = parser.parse_args()
    if not TUNED.items() <= os.environ.items():  # memory settings are read at the start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNED})
    import torch

    import numbanorm

    torch.set_num_threads(numbanorm.get_num_threads())
    steps = {
        case.name: {
            "numbanorm": step_of(cases.numbanorm_runner(case)),
            "PyTorch": step_of(cases.torch_runner(case)),
        }
        for case in cases.choose(options.case, ["plain"])
    }
    busy = f"import os; os.sched_setaffinity(0, [{max(os.sched_getaffinity(0))}])\nwhile True: pass"
    for loaded in (False, True):
        other = subprocess.Popen([sys.executable, "-c", busy]) if loaded else None
        print("with another process" if loaded else "alone", flush=True)
        try:
            for name, libraries in steps.items():
                times: dict[str, list[float]] = {library: [] for library in libraries}
                for _ in range(options.rounds):
                    for library, step in libraries.items():
                        timed(step, times[library])
                        time.sleep(0.02)
                cells = (
                    f"{library} {statistics.median(v):6.2f} {sorted(v)[int(0.95 * len(v))]:6.2f}"
                    for library, v in times.items()
                )
                print(f"  {name:22}", *cells, flush=True)
        finally:
            if other is not None:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main()
