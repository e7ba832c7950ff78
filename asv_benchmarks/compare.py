"""Side by side with what a user would take instead, in one run.

    python asv_benchmarks/compare.py [--only GROUP ...] [--case PATTERN] [--rounds N] [--cold]
                                     [--with compile] [--json FILE] [--plot FILE]
    python asv_benchmarks/compare.py --load FILE [--plot FILE]

Each library runs in a process of its own, since PyTorch's memory settings are read at its start,
and they take turns: a round times every library once for a case, so that a machine that drifts
drifts for all of them. Times are medians over the rounds; ratios are medians of the rounds'
ratios. Before anything is timed, the results of all libraries are compared. All have as many
threads as affinity and a container's quota allow; of PyTorch, the call of the layer is timed, and
the derivative of its output, with nothing around them.

``--json`` keeps all numbers, with the machine, the day and the versions. ``--load`` prints and
draws what is kept as if it had been measured now. The tables in the README and docs/performance.md
are those of ``compare-amd-epyc-zen4.json``, beside this file.

The groups are "plain" and "masked", which are those without --only; "half" (16 bits: "bfloat16",
"float16"); and "fused", a norm with activation, residual or both ("fused bfloat16", "ReLU family
float32", "ReLU family + residual float32", ...); and "odd", shapes that layers are not made for.

bound
    The fewest passes over memory (see ``PASSES`` in cases.py) at the speed of a copy in the same
    rounds: of x to y for forward, and of dy to dx for backward, the arrays that the layer has.
fresh
    Without ``out=``. What was returned is dropped after the backward, as in a loop.
torch, tuned
    PyTorch as installed, and with ``TUNED``, with which it never meets a fresh page. Fused cases
    are ``relu(layer(x) + residual)``.
in_place, compile, converted
    PyTorch tuned with in-place addition and activation, through ``torch.compile``, and with the
    layers of ``numbanorm.torch``; only ``--with`` them, as they leave gaps, and compiling takes
    half a minute a case.
cold
    Into ``out=``, after the caches were flushed and some milliseconds' pause, for every library.
base
    A layer's time over that of another one which runs beside it: with a mask over without one, of
    16 bits over float32, norm with activation and residual over the norm alone.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import cases
from report import PHASES, report

TUNED = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}
LIBRARIES: dict[str, dict[str, str]] = {
    "numbanorm": {}, "torch": {}, "tuned": TUNED, "jax": {}, "in_place": TUNED, "compile": TUNED,
    "converted": TUNED,
}  # fmt: skip
ASKED_FOR = ("in_place", "compile", "converted")
GROUPS = list(dict.fromkeys(group for case in cases.CASES for group in case.groups))
# Of two samples of results; those of 16 bits differ where others round in between, too.
TOLERANCE = {"float16": 2e-2, "bfloat16": 0.1, "float32": 2e-3, "float64": 2e-3}
FLUSH = 1 << 27  # bytes, more than any cache of a few cores
PAUSE = 0.005  # seconds


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
        self.library = library
        self.runners: dict[str, cases.Runner] = {}
        self.copies: dict[str, Any] = {}

    def threads(self, n: int | None) -> int:
        """Use a number of threads, or that which numbanorm has by itself; return it."""
        if self.library == "numbanorm":
            import numba

            import numbanorm

            if n is not None:
                numbanorm.set_num_threads(n)
            # The first commits that asv measures have no such function.
            n = n or getattr(numbanorm, "get_num_threads", numba.get_num_threads)()
        assert n is not None
        if self.library == "jax":
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])
        elif self.library != "numbanorm":
            import torch

            torch.set_num_threads(n)
        self.pool, self.flushed = (
            ThreadPoolExecutor(n),
            np.array_split(np.ones(FLUSH // 4, "f4"), n),
        )
        return n

    def prepare(self, index: int) -> dict[str, Any]:
        """Make the case ready, and return a sample of its results."""
        case = cases.CASES[index]
        self.runners, self.copies = {}, {}  # before others take memory
        self.runners["fresh"] = self._runner(case, True)
        if self.library == "numbanorm":
            self.runners["out"] = self._runner(case, False)
            if case.base is not None:
                self.runners["base"] = self._runner(case.base, False)
            x, y, dy, dx = map(bits, self.runners["out"].arrays)
            self.copies = {"copy": copier(x, y), "copy backward": copier(dy, dx)}
        return {name: results_of(runner) for name, runner in self.runners.items()}

    def _runner(self, case: cases.Case, fresh: bool) -> cases.Runner:
        if self.library == "numbanorm":
            return cases.numbanorm_runner(case, fresh)
        if self.library == "jax":
            return cases.jax_runner(case)
        if self.library == "in_place" and not case.fused:
            raise NotImplementedError("nothing is in place")
        return cases.torch_runner(
            case,
            self.library == "in_place",
            self.library == "compile",
            converted=self.library == "converted",
        )

    def time(self, repeat: int) -> dict[str, float]:
        """Return seconds of each phase, the least of ``repeat`` runs."""
        times: dict[str, float] = {}
        for name, runner in self.runners.items():
            for _ in range(repeat):
                for key, taken in self._run(name, runner).items():
                    times[key] = min(times.get(key, taken), taken)
        for key, copy in self.copies.items():
            for _ in range(repeat):
                start = time.perf_counter()
                copy()
                taken = time.perf_counter() - start
                times[key] = min(times.get(key, taken), taken)
        return times

    def time_cold(self) -> dict[str, float]:
        """Return seconds of each phase, where other layers came between."""
        name = "out" if "out" in self.runners else "fresh"
        times = self._run(name, self.runners[name], self._cool)
        return {key.replace(name, "cold"): taken for key, taken in times.items()}

    def _cool(self) -> None:
        """Flush the caches and let the threads fall asleep."""
        list(self.pool.map(lambda part: np.negative(part, out=part), self.flushed))
        time.sleep(PAUSE)

    def _run(self, name: str, runner: cases.Runner, before: Any = lambda: None) -> dict[str, float]:
        times, kept = {}, []
        for phase in ("evaluate", "train", "backward"):
            function = getattr(runner, phase)
            before()
            start = time.perf_counter()
            kept.append(function())
            times[f"{phase} {name}"] = time.perf_counter() - start
            if phase != "train":  # y is there until dx is
                kept.clear()
        return times


def bits(array: np.ndarray) -> np.ndarray:
    """Return an array as Numba can copy it, which has no floats of 16 bits."""
    return array.view("uint16") if array.itemsize == 2 else array


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
    y = sample(runner.array(runner.train()))
    back = runner.backward()
    dx = [
        v for d in (back if isinstance(back, tuple) else (back,)) for v in sample(runner.array(d))
    ]
    parameters = [sample(gradient) for gradient in runner.gradients()]
    evaluated = sample(runner.array(runner.evaluate()))
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


def start(names: list[str], threads: int | None = None) -> list[Library]:
    """Start the processes, with the same number of threads for all, by default numbanorm's."""
    libraries = [Library(name) for name in names]
    for library in libraries:
        threads = library.ask("threads", threads)
    return libraries


def installed(name: str) -> bool:
    """Tell whether a library can be imported."""
    from importlib.util import find_spec

    return find_spec(name if name in ("numbanorm", "jax") else "torch") is not None


def check(case: cases.Case, results: dict[str, dict[str, Any] | None]) -> None:
    """Raise unless all libraries found the same."""
    ours = results["numbanorm"]
    assert ours is not None
    for name, theirs in results.items():
        if theirs is None:
            continue
        for variant, found in theirs.items():
            # Others have no masks.
            no_mask = case.masked and (name != "numbanorm" or variant == "base")
            if variant == "base" and not no_mask:
                continue
            expected = ours["base" if no_mask else "out"]
            # JAX has no running statistics here.
            keys = ("y", "dx") if name == "jax" else ("y", "dx", "evaluated")
            # Others round in between; of millions, some are on the other side of a kink then.
            # Some of PyTorch's sums of a parameter's gradient are taken in 16 bits.
            share = 0.85 if case.half else 0.95 if case.fused else 1.0
            where = f"{case.name}, {name} ({variant})"
            assert_same(found, expected, where, keys, TOLERANCE[case.dtype], share)


def assert_same(
    found: dict[str, Any],
    expected: dict[str, Any],
    where: str,
    keys: tuple[str, ...] = ("y", "dx", "evaluated"),
    tolerance: float = 2e-3,
    share: float = 1.0,
) -> None:
    """Raise unless a share of two samples is the same, gradients of parameters by their size."""
    pairs = {key: (found[key], expected[key]) for key in keys}
    scaled = [
        np.array([theirs, ours]) / (np.abs(ours).max() + 1)
        for theirs, ours in zip(found["parameters"], expected["parameters"], strict=True)
    ]
    pairs["gradients of parameters"] = tuple(np.concatenate([np.empty((2, 0)), *scaled], axis=1))
    for key, (theirs, ours) in pairs.items():
        if np.isclose(theirs, ours, rtol=tolerance, atol=tolerance).mean() < share:
            np.testing.assert_allclose(
                theirs, ours, rtol=tolerance, atol=tolerance, err_msg=f"{where}: {key}"
            )


def measure(
    case: cases.Case, libraries: list[Library], rounds: int, cold: bool = False
) -> dict[str, Any]:
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
            times = library.ask("time", repeat) | (library.ask("time_cold") if cold else {})
            # The first round warms up.
            if number:
                for key, seconds in times.items():
                    history.setdefault(f"{library.name} {key}", []).append(seconds)
            # PyTorch's idle threads spin for a while after its turn.
            time.sleep(0.02)
    row: dict[str, Any] = {"case": case.name, "bytes": case.size, "layer": case.layer}
    row["groups"] = case.groups
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
        for phase, copy, n in zip(PHASES, copies, case.passes, strict=True)
    }
    row["base"] = None if case.base is None else ratio(total("numbanorm", "base"), out)
    row["ratios"] = {}
    for library in able[1:]:
        theirs = total(library.name, "fresh")

        def evaluated(mine: str, their: str, name: str = library.name) -> float:
            return ratio(*(history[f"{key} evaluate {v}"]
                           for key, v in (("numbanorm", mine), (name, their))))  # fmt: skip

        row["ratios"][library.name] = {
            "out": ratio(out, theirs),
            "fresh": ratio(fresh, theirs),
            "evaluate": evaluated("out", "fresh"),
        }
        if cold:
            row["ratios"][library.name] |= {
                "cold": ratio(total("numbanorm", "cold"), total(library.name, "cold")),
                "cold evaluate": evaluated("cold", "cold"),
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


def circumstances(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Return what the numbers depend on: the machine, the day and the versions."""
    models = [line for line in read("/proc/cpuinfo").split("\n") if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for name in ("numbanorm", "numba", "numpy", "torch", "jax"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        versions |= {"commit": found} if found else {}
    return {
        "machine": options.machine,
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "avx512": " avx512f " in read("/proc/cpuinfo"),
        "cores": len(os.sched_getaffinity(0)),
        "date": date.today().isoformat(),
        "versions": versions,
        # Of files, the names: folders are this machine's own.
        "command": shlex.join(["compare.py", *(a.rpartition(os.sep)[2] for a in arguments)]),
    }


def read(path: str) -> str:
    """Return the text of a file, or nothing."""
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def rounded(value: Any) -> Any:
    """Return the same with four digits of each number."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", default="*", help="cases whose name fits, as 'batch *56x56*'")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, metavar="GROUP", default=["plain", "masked"],
        help=f"groups of cases, of {', '.join(GROUPS)}",
    )  # fmt: skip
    parser.add_argument("--cold", action="store_true", help="with cold caches as well")
    parser.add_argument("--threads", type=int, help="of every library, by default as many as may")
    parser.add_argument("--rounds", type=int, default=7, help="how often each library has a turn")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    parser.add_argument(
        "--machine", default=platform.node() or "unknown", help="the name of this one in --json"
    )
    parser.add_argument("--load", type=Path, help="a file of --json, instead of measuring")
    parser.add_argument("--plot", help="a file for a figure")
    parser.add_argument("--without", nargs="*", default=[], choices=list(LIBRARIES)[1:])
    parser.add_argument("--with", nargs="*", default=[], choices=ASKED_FOR, dest="also")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
        return 0
    if options.load:
        try:
            kept = json.loads(options.load.read_text())
            rows = kept.pop("rows")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"--load: a file that --json has written is needed: {error!r}")
        print("\n".join(f"{key}: {value}" for key, value in kept.items()), end="\n\n")
        report(rows, options.plot)
        return 0
    from tqdm import tqdm  # asv's environments have none

    chosen = cases.choose([options.case], options.only)
    if not chosen:
        groups = ", ".join(options.only)
        parser.error(f"--case: none of the cases of {groups} (--only) fits {options.case!r}")
    left_out = {*options.without, *ASKED_FOR} - {*options.also}
    names = [n for n in LIBRARIES if n not in left_out and installed(n)]
    print(f"load of other processes: {other_load():.2f} cores of {os.cpu_count()}", flush=True)
    rows = []
    # Shown at once: libraries take seconds to import.
    with tqdm(total=len(chosen), unit="case") as bar, contextlib.suppress(KeyboardInterrupt):
        libraries = start(names, options.threads)
        for case in chosen:
            bar.set_postfix_str(case.name)
            rows.append(rounded(measure(case, libraries, options.rounds, options.cold)))
            bar.update()
    if not rows:
        return 130
    if len(rows) < len(chosen):
        print(f"interrupted: {len(rows)} of {len(chosen)} cases")
    print(f"load of other processes: {other_load():.2f} cores of {os.cpu_count()}\n")
    if options.json:
        kept = circumstances(options, sys.argv[1:] if arguments is None else arguments)
        lines = ",\n".join(json.dumps(row) for row in rows)
        # A row of the table is a line of the file.
        options.json.write_text(f'{json.dumps(kept)[:-1]}, "rows": [\n{lines}\n]}}\n')
    report(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
