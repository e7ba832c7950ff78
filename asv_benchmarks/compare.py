"""Side by side with what a user would take instead, in one run.

    python asv_benchmarks/compare.py [--case PATTERN] [--rounds N] [--json FILE] [--plot FILE]

Each library runs in a process of its own, since PyTorch's memory settings are read at its start,
and they take turns: a round times every library once for a case, so that a machine that drifts
drifts for all of them. Times are medians over the rounds; ratios are medians of the rounds'
ratios. Before anything is timed, the results of all libraries are compared.

bound
    The fewest passes over memory (see ``PASSES`` in cases.py) at the speed of a copy in the same
    rounds: of x to y for forward, and of dy to dx for backward, the arrays that the layer has.
fresh
    Without ``out=``. What was returned is dropped before the next call, as in a loop.
torch, tuned
    PyTorch as installed, and with ``TUNED``, with which it never meets a fresh page.
mask
    A layer's time with a mask over that without one, which runs beside it.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import cases

TUNED = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}
LIBRARIES: dict[str, dict[str, str]] = {"numbanorm": {}, "torch": {}, "tuned": TUNED, "jax": {}}
PHASES = ("train", "evaluate", "backward")
TICKS = (0.5, 1, 2, 5, 10, 20, 50)  # of the figure


# ---------------------------------------------------------------------------------------------
# In a library's process
# ---------------------------------------------------------------------------------------------


def serve(library: str) -> None:
    """Answer requests from standard input, a line of JSON each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not come between the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the one who asks
    worker = Worker(library)
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            answer = getattr(worker, verb)(*arguments)
        except NotImplementedError:  # a case that the library does not have: a gap in the table
            answer = None
        try:
            print(json.dumps(answer), file=answers)
        except BrokenPipeError:  # who asks has ended
            return


class Worker:
    """A library, and the case that it has ready."""

    def __init__(self, library: str) -> None:
        self.library = "torch" if library == "tuned" else library
        if self.library == "torch":
            import torch

            torch.set_num_threads(os.cpu_count() or 1)
        self.runners: dict[str, cases.Runner] = {}
        self.copies: dict[str, Any] = {}

    def prepare(self, index: int) -> dict[str, Any]:
        """Make the case ready, and return a sample of its results."""
        case = cases.CASES[index]
        self.runners = {"fresh": self._runner(case, True)}
        if self.library == "numbanorm":
            self.runners["out"] = self._runner(case, False)
            if case.masked:
                self.runners["unmasked"] = self._runner(case._replace(masked=False), False)
            x, y, dy, dx = self.runners["out"].arrays
            self.copies = {"copy": copier(x, y), "copy backward": copier(dy, dx)}
        return {name: results_of(runner) for name, runner in self.runners.items()}

    def _runner(self, case: cases.Case, fresh: bool) -> cases.Runner:
        if self.library == "numbanorm":
            return cases.numbanorm_runner(case, fresh)
        return cases.torch_runner(case) if self.library == "torch" else cases.jax_runner(case)

    def time(self, repeat: int) -> dict[str, float]:
        """Return seconds of each phase, the least of ``repeat`` runs."""
        times = {}
        for name, runner in self.runners.items():
            for _ in range(repeat):
                for phase in ("evaluate", "train", "backward"):
                    start = time.perf_counter()
                    kept = getattr(runner, phase)()
                    taken = time.perf_counter() - start
                    del kept
                    key = f"{phase} {name}"
                    times[key] = min(times.get(key, taken), taken)
        for key, copy in self.copies.items():
            for _ in range(repeat):
                start = time.perf_counter()
                copy()
                taken = time.perf_counter() - start
                times[key] = min(times.get(key, taken), taken)
        return times


def copier(x: np.ndarray, y: np.ndarray) -> Any:
    """Return a function that copies x to y, in parallel."""
    import numba

    @numba.njit(parallel=True, nogil=True, cache=True)
    def copy(source: Any, target: Any) -> None:
        n = source.shape[0]
        part = 1 << 15
        for i in numba.prange((n + part - 1) // part):
            a, b = source[i * part : (i + 1) * part], target[i * part : (i + 1) * part]
            for j in range(a.shape[0]):
                b[j] = a[j]

    source, target = x.reshape(-1), y.reshape(-1)
    copy(source, target)
    return lambda: copy(source, target)


def results_of(runner: cases.Runner) -> dict[str, Any]:
    """Run all phases once, and return a sample of what came out."""
    y = sample(runner.train())
    dx = sample(runner.backward())
    parameters = [gradient.astype(float).tolist() for gradient in runner.gradients()]
    evaluated = sample(runner.evaluate())
    return {"y": y, "dx": dx, "evaluated": evaluated, "parameters": parameters}


def sample(array: np.ndarray) -> list[float]:
    """Return values from all over an array."""
    flat = np.asarray(array).reshape(-1)
    return [float(v) for v in flat[:: max(1, flat.size // 997)]]


# ---------------------------------------------------------------------------------------------
# In the process that asks
# ---------------------------------------------------------------------------------------------


class Library:
    """A process that serves one library."""

    def __init__(self, name: str) -> None:
        environment = {**os.environ, **LIBRARIES[name]}
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.answer()

    def answer(self) -> Any:
        """Return the next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended")
        return json.loads(line)

    def ask(self, *request: Any) -> Any:
        """Send a request and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()


def installed(name: str) -> bool:
    """Tell whether a library can be imported."""
    from importlib.util import find_spec

    return find_spec("torch" if name == "tuned" else name) is not None


def check(case: cases.Case, results: dict[str, dict[str, Any] | None]) -> None:
    """Raise unless all libraries found the same."""
    ours = results["numbanorm"]
    assert ours is not None
    for name, theirs in results.items():
        if theirs is None:
            continue
        for variant, found in theirs.items():
            # Others have no masks.
            no_mask = case.masked and (name != "numbanorm" or variant == "unmasked")
            expected = ours["unmasked" if no_mask else "out"]
            # JAX has no running statistics here.
            keys = ("y", "dx") if name == "jax" else ("y", "dx", "evaluated")
            assert_same(found, expected, f"{case.name}, {name} ({variant})", keys)


def assert_same(
    found: dict[str, Any],
    expected: dict[str, Any],
    where: str,
    keys: tuple[str, ...] = ("y", "dx", "evaluated"),
    tolerance: float = 2e-3,
) -> None:
    """Raise unless two samples of results are the same, gradients of parameters by their size."""
    for key in keys:
        np.testing.assert_allclose(
            found[key], expected[key], rtol=tolerance, atol=tolerance, err_msg=f"{where}: {key}"
        )
    for theirs, ours in zip(found["parameters"], expected["parameters"], strict=True):
        scale = np.abs(ours).max() + 1
        np.testing.assert_allclose(
            np.divide(theirs, scale), np.divide(ours, scale), atol=tolerance,
            err_msg=f"{where}: gradients of parameters",
        )  # fmt: skip


def measure(case: cases.Case, libraries: list[Library], rounds: int) -> dict[str, Any]:
    """Return the medians of a case, in seconds, and the medians of ratios."""
    index = cases.CASES.index(case)
    results = {library.name: library.ask("prepare", index) for library in libraries}
    check(case, results)
    able = [library for library in libraries if results[library.name] is not None]
    # Small cases are over before a clock has their measure.
    repeat = 3 if case.size > 1 << 22 else 20 if case.size > 1 << 18 else 200
    history: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for library in able:
            times = library.ask("time", repeat)
            # The first round warms up.
            if number:
                for key, seconds in times.items():
                    history.setdefault(f"{library.name} {key}", []).append(seconds)
            # PyTorch's idle threads spin for a while after its turn.
            time.sleep(0.02)
    row: dict[str, Any] = {"case": case.name, "bytes": case.size, "layer": case.layer}
    row["seconds"] = {key: statistics.median(values) for key, values in history.items()}

    def total(prefix: str, variant: str) -> list[float]:
        parts = (history[f"{prefix} {phase} {variant}"] for phase in ("train", "backward"))
        return [a + b for a, b in zip(*parts, strict=True)]

    def ratio(mine: list[float], theirs: list[float]) -> float:
        return statistics.median(t / m for m, t in zip(mine, theirs, strict=True))

    out, fresh = total("numbanorm", "out"), total("numbanorm", "fresh")
    copies = ("copy", "copy", "copy backward")
    row["bound"] = {
        phase: n / 2 * ratio(history[f"numbanorm {phase} out"], history[f"numbanorm {copy}"])
        for phase, copy, n in zip(PHASES, copies, cases.PASSES[case.layer], strict=True)
    }
    row["mask"] = ratio(total("numbanorm", "unmasked"), out) if case.masked else None
    row["ratios"] = {}
    for library in able[1:]:
        theirs = total(library.name, "fresh")
        evaluated = [history[f"{name} evaluate {v}"] for name, v in
                     (("numbanorm", "out"), (library.name, "fresh"))]  # fmt: skip
        row["ratios"][library.name] = {
            "out": ratio(out, theirs),
            "fresh": ratio(fresh, theirs),
            "evaluate": ratio(*evaluated),
        }
    return row


def other_load() -> float:
    """Return the cores that other processes keep busy, over half a second."""

    def busy() -> float:
        with contextlib.suppress(OSError):
            fields = [float(v) for v in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
            return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        return float("nan")

    start, before = time.perf_counter(), busy()
    time.sleep(0.5)
    return (busy() - before) / (time.perf_counter() - start)


def milliseconds(row: dict[str, Any], key: str) -> str:
    """Return a time for the table."""
    seconds = row["seconds"].get(key)
    return "-" if seconds is None else f"{seconds * 1e3:.3g}"


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return all rows as text."""
    head = ["case", "copy", "train", "eval", "back", "of bound t/e/b", "fresh t+b", "x mask"]
    for name in names:
        head += [f"{name} t+b", "x out", "x fresh", "x eval"]
    lines = [head]
    for row in rows:
        bound = "/".join(f"{row['bound'][phase]:.2f}" for phase in PHASES)
        fresh = sum(row["seconds"][f"numbanorm {phase} fresh"] for phase in ("train", "backward"))
        line = [row["case"], milliseconds(row, "numbanorm copy")]
        line += [milliseconds(row, f"numbanorm {phase} out") for phase in PHASES]
        line += [bound, f"{fresh * 1e3:.3g}", "-" if row["mask"] is None else f"{row['mask']:.2f}"]
        for name in names:
            ratios = row["ratios"].get(name)
            if ratios is None:
                line += ["-"] * 4
                continue
            both = sum(row["seconds"][f"{name} {phase} fresh"] for phase in ("train", "backward"))
            line += [f"{both * 1e3:.3g}"]
            line += [f"{ratios[key]:.2f}" for key in ("out", "fresh", "evaluate")]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def summary(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return geometric means of the ratios, and the worst."""
    lines = []
    for name in names:
        for key in ("out", "fresh", "evaluate"):
            found = {
                row["case"]: row["ratios"][name][key]
                for row in rows
                if name in row["ratios"] and row["mask"] is None
            }
            if found:
                mean = statistics.geometric_mean(found.values())
                least = min(found, key=found.__getitem__)
                lines.append(
                    f"{name}, {key}: geometric mean {mean:.2f}, least {found[least]:.2f} ({least})"
                )
    masked = {row["case"]: row["mask"] for row in rows if row["mask"] is not None}
    if masked:
        mean, most = statistics.geometric_mean(masked.values()), max(masked, key=masked.__getitem__)
        lines.append(f"mask: geometric mean {mean:.2f}, most {masked[most]:.2f} ({most})")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], names: list[str], path: str) -> None:
    """Draw forward and backward of every case as bars, PyTorch's time over ours."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["mask"] is None][::-1]
    figure = Figure(figsize=(8, 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        # A case that a library does not have has no bar.
        values = [row["ratios"].get(name, {}).get("out", 1.0) for row in rows]
        labels = {"torch": "PyTorch as installed", "tuned": "PyTorch tuned", "jax": "JAX"}
        positions = [r + 0.4 - (i + 0.5) * height for r in range(len(rows))]
        axes.barh(positions, [v - 1 for v in values], height, left=1, label=labels[name])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=7)
    axes.set(
        xlabel="times faster, forward and backward in training, into out=",
        xscale="log",
        xlim=(TICKS[0], TICKS[-1]),
        ylim=(-0.6, len(rows) - 0.4),
    )
    axes.set_xticks(TICKS, TICKS)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", default="*", help="cases whose name fits, as 'batch *56x56*'")
    parser.add_argument("--rounds", type=int, default=7, help="how often each library has a turn")
    parser.add_argument("--json", help="a file for all numbers")
    parser.add_argument("--plot", help="a file for a figure")
    parser.add_argument("--without", nargs="*", default=[], choices=list(LIBRARIES)[1:])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
        return 0
    from tqdm import tqdm  # asv's environments have none

    chosen = [case for case in cases.CASES if fnmatch.fnmatch(case.name, options.case)]
    if not chosen:
        parser.error(f"--case: none of {len(cases.CASES)} cases fits {options.case!r}")
    names = [n for n in LIBRARIES if n not in options.without and installed(n)]
    print(f"load of other processes: {other_load():.2f} cores of {os.cpu_count()}", flush=True)
    rows = []
    # Shown at once: libraries take seconds to import.
    with tqdm(total=len(chosen), unit="case") as bar, contextlib.suppress(KeyboardInterrupt):
        libraries = [Library(name) for name in names]
        for case in chosen:
            bar.set_postfix_str(case.name)
            rows.append(measure(case, libraries, options.rounds))
            bar.update()
    if not rows:
        return 130
    if len(rows) < len(chosen):
        print(f"interrupted: {len(rows)} of {len(chosen)} cases")
    print(f"load of other processes: {other_load():.2f} cores of {os.cpu_count()}\n")
    print("milliseconds; x: that library's time over ours, forward + backward in training\n")
    print(table(rows, names[1:]))
    print("\n" + summary(rows, names[1:]))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    if options.plot:
        plot(rows, names[1:], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
