"""Time two or more states of the code in turns, in one process and on the same arrays.

    python asv_benchmarks/turns.py [BASE] [OTHER ...] [--case PATTERN ...] [--rounds N]

A state is a commit, or a folder that holds the package; by default what stands here is compared
with the last commit. Where memory lies, and how fast it is at the moment, is the same for all of
them: a difference of 2 % shows, which runs of asv do not see. Times are medians, in
milliseconds; ratios are medians of the rounds' ratios to the first state. Before anything is
timed, the results are compared.
"""

import argparse
import contextlib
import importlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import cases
from compare import GROUPS, PHASES, assert_same, bits, copier, results_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "numbanorm"


class State:
    """A state of the package, whose modules are apart from those of the others."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.modules = folder, dict[str, ModuleType]()
        with self.imported():
            file = importlib.import_module(PACKAGE).__file__
        if Path(file or "").resolve().parents[1] != folder.resolve():
            raise ImportError(f"{folder}: there is no {PACKAGE} in it")

    @contextlib.contextmanager
    def imported(self) -> Iterator[None]:
        """Have ``import numbanorm`` mean this one."""
        before = take_modules()
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            sys.path.remove(str(self.folder))
            self.modules = take_modules()
            sys.modules.update(before)

    def runner(self, case: cases.Case, arrays: tuple[np.ndarray, ...]) -> cases.Runner:
        """Return how this state does a case, compiled, on x, y, dy and dx."""
        with self.imported():
            runner = cases.numbanorm_runner(case, arrays=arrays)
            for phase in ("evaluate", "train", "backward"):
                getattr(runner, phase)()
        return runner


def take_modules() -> dict[str, ModuleType]:
    """Remove the package from what is imported, and return its modules."""
    names = [name for name in sys.modules if name.split(".")[0] == PACKAGE]
    return {name: sys.modules.pop(name) for name in names}


def folder_of(state: str, temporary: Path) -> Path:
    """Return the folder of a state, which is written to a temporary one if it is a commit."""
    if (Path(state) / PACKAGE).is_dir():
        return Path(state).resolve()
    folder = temporary / state.replace("/", "_")
    command = ["git", "archive", state, PACKAGE, "pyproject.toml"]
    try:
        archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{state!r} is neither a folder with {PACKAGE} in it nor a commit: "
            f"{error.stderr.decode().strip()}"
        ) from None
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def measure(case: cases.Case, states: list[State], rounds: int) -> dict[str, list[list[float]]]:
    """Return seconds of each phase, of all rounds for each state; and those of copies."""
    x, dy, _, _ = case.data()
    arrays = x, np.ones_like(x), dy, np.ones_like(x)
    runners = [state.runner(case, arrays) for state in states]
    x, y, dy, dx = map(bits, arrays)
    copies = {"copy": copier(x, y), "copy backward": copier(dy, dx)}
    found = [results_of(runner) for runner in runners]
    for other in found:
        assert_same(other, found[0], case.name, tolerance=1e-2 if case.half else 1e-3)
    repeat = max(1, (1 << 21) // case.size)
    times: dict[str, list[list[float]]] = {phase: [[] for _ in states] for phase in PHASES}
    times |= {name: [[]] for name in copies}
    for number in range(rounds):
        # Each is first in turn: what comes after another may find more of its arrays in a cache.
        order = [(number + i) % len(states) for i in range(len(states))]
        for phase in ("evaluate", "train", "backward"):
            for i in order:
                before = runners[i].train if phase == "backward" else None
                times[phase][i].append(seconds(getattr(runners[i], phase), repeat, before))
        for name, copy in copies.items():
            times[name][0].append(seconds(copy, repeat))
    return times


def seconds(
    function: Callable[[], Any], repeat: int, before: Callable[[], Any] | None = None
) -> float:
    """Return the mean time of some calls, each after one of another function."""
    taken = 0.0
    for _ in range(repeat):
        if before is not None:
            before()
        start = time.perf_counter()
        function()
        taken += time.perf_counter() - start
    return taken / repeat


def line(name: str, times: dict[str, list[list[float]]]) -> str:
    """Return the row of a case."""
    copies = [f"{statistics.median(times[key][0]) * 1e3:.3g}" for key in ("copy", "copy backward")]
    cells = ["/".join(copies).rjust(13)]
    for phase in PHASES:
        first, *others = times[phase]
        ratios = (
            f"{statistics.median(b / a for a, b in zip(first, other, strict=True)):.3f}"
            for other in others
        )
        cells.append(f"{statistics.median(first) * 1e3:.3g}".rjust(8) + "  " + " ".join(ratios))
    return f"{name:36}" + "   ".join(cells)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("states", nargs="*", help="commits or folders; HEAD and what stands here")
    parser.add_argument("--case", nargs="*", default=["*"], help="as for compare.py, or several")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=["plain", "masked"],
                        metavar="GROUP", help="as for compare.py")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=20, help="how often each has a turn")
    parser.add_argument("--threads", type=int, help="how many threads each uses")
    options = parser.parse_args(arguments)
    chosen = cases.choose(options.case, options.only)
    if not chosen:
        parser.error(f"--case: none of the cases of {options.only} (--only) fits {options.case}")
    names = options.states or ["HEAD"]
    names += [str(ROOT)] if len(names) == 1 else []
    head = "   ".join(f"{key:>8}  ratio" for key in PHASES)
    print(f"{', '.join(names[1:])} over {names[0]}\n\n{'':36}{'copies':>13}   {head}", flush=True)
    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(KeyboardInterrupt):
        states = [State(folder_of(name, Path(temporary))) for name in names]
        if options.threads:
            for state in states:
                state.modules[PACKAGE].set_num_threads(options.threads)
        for case in chosen:
            # What a state has not compiled yet takes a while.
            print(f"{case.name} ...", end="\r", file=sys.stderr, flush=True)
            print(line(case.name, measure(case, states, options.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
