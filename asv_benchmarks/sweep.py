"""One threshold of numbanorm.tuning at several values, which take turns: hot, and after a pause.

    python asv_benchmarks/sweep.py cache_bytes 0 8388608 none --case 'batch 64x512x7x7*'

Prints milliseconds of training, evaluation and backward with the value in force, and how long each
other value takes over that: medians of the rounds' ratios. The caches are flushed and the threads
fall asleep before what is "cold", as in compare.py. ``none`` is None.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import cases
from compare import PHASES, Worker


def measure(case: cases.Case, settings: list[Any], rounds: int, worker: Worker) -> dict[Any, Any]:
    """Return seconds of each phase and temperature, a list of the rounds for each setting."""
    from numbanorm import tuning

    def timed(setting: Any, runner: cases.Runner, phase: str) -> float:
        tuning._stack.append(setting)
        try:
            start = time.perf_counter()
            getattr(runner, phase)()
            return time.perf_counter() - start
        finally:
            tuning._stack.remove(setting)

    first = cases.numbanorm_runner(case)
    runners = [first, *(cases.numbanorm_runner(case, arrays=first.arrays) for _ in settings[1:])]
    times: dict[Any, Any] = {}
    for number in range(rounds + 1):
        for setting, runner in zip(settings, runners, strict=True):
            hot: dict[str, float] = {}
            for _ in range(4):  # the first finds what the others left
                hot = {
                    phase: min(timed(setting, runner, phase), hot.get(phase, 1e9))
                    for phase in ("evaluate", "train", "backward")
                }
            found = {(phase, "hot"): seconds for phase, seconds in hot.items()}
            for phase in ("evaluate", "train", "backward"):
                worker._cool()
                found[phase, "cold"] = timed(setting, runner, phase)
            if number:  # the first round compiles
                for key, seconds in found.items():
                    times.setdefault(key, {}).setdefault(setting, []).append(seconds)
    return times


def main() -> None:
    """Measure and print."""
    from numbanorm import tuning

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [field.name for field in dataclasses.fields(tuning.Tuning)]
    parser.add_argument("threshold", choices=names, metavar="threshold", help=", ".join(names))
    parser.add_argument("values", nargs="+", help="numbers, or none")
    parser.add_argument("--case", nargs="+", default=["batch *"], help="as for compare.py")
    parser.add_argument("--only", nargs="+", default=["plain"], help="as for compare.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    worker = Worker("numbanorm")
    worker.threads(options.threads)
    usual = tuning.tuning()
    settings = [usual] + [
        dataclasses.replace(usual, **{options.threshold: None if value == "none" else int(value)})
        for value in options.values
    ]
    print(f"{options.threshold}: {getattr(usual, options.threshold)}, {', '.join(options.values)}")
    for case in cases.choose(options.case, options.only):
        times = measure(case, settings, options.rounds, worker)
        for phase in PHASES:
            cells = []
            for state in ("hot", "cold"):
                first, *others = (times[phase, state][setting] for setting in settings)
                ratios = (
                    f"{statistics.median(b / a for a, b in zip(first, other, strict=True)):.2f}"
                    for other in others
                )
                cells.append(f"{state} {statistics.median(first) * 1e3:7.3f}  {' '.join(ratios)}")
            print(f"{case.name:28} {phase:9} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
