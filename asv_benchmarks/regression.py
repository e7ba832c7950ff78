"""Tell whether a commit is slower than another one: asv continuous with a clear answer.

    python asv_benchmarks/regression.py [BASE [HEAD]] [--factor 1.3] [--bench REGEX]

By default what is checked out is compared with the commit where it left main, and on main with what
was fetched last or the commit before. Both are built and measured in turns, twice each, so that a
machine that drifts drifts for both. What seems slower is measured once more, in twice as many
turns, and counts if it is slower then as well. Ctrl-C shows what both have been measured for. The
exit status is

0   no benchmark is slower by the factor,
1   at least one is,
2   it could not be measured: a commit does not build, a benchmark fails, nothing is to compare; or
    something seems slower while other processes keep the cores busy.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from compare import other_load

HERE = Path(__file__).resolve().parent
SCRATCH = HERE.parent / ".asv"
# All kernels by layout, dtype and what is written to, without other libraries: some minutes.
BENCH = r"^((forward|backward)\.(Layouts|Dtypes|Memory|Threads)|moments\.Kinds)\."


def rows(output: str) -> list[tuple[str, str, str]]:
    """Return the mark, the ratio and the name of every line of asv's table."""
    found = []
    for line in output.splitlines():
        # A | in the name of a benchmark would be part of it.
        cells = [cell.strip() for cell in line.strip().strip("|").split("|", 4)]
        if line.lstrip().startswith("|") and len(cells) == 5 and cells[0] in ("", *"+-!*x"):
            found.append((cells[0], cells[3], cells[4]))
    return found


def verdict(output: str, status: int, factor: float) -> tuple[int, str]:
    """Return the exit status and the message for what ``asv continuous`` printed and returned."""
    table = rows(output)
    slower = [f"{name} ({ratio} times)" for mark, ratio, name in table if mark == "+"]
    # n/a: it failed or was left out; x: the benchmark itself has changed.
    measured = [name for mark, ratio, name in table if ratio != "n/a" and mark not in ("x", "!")]
    if any(mark == "!" for mark, _, _ in table) or (status and not slower):
        return 2, f"COULD NOT MEASURE: asv ended with status {status}, see above"
    if not measured:
        return 2, "COULD NOT MEASURE: no benchmark has a time for both commits"
    of = f"of {len(measured)} benchmarks"
    if slower:
        lines = "\n  ".join(slower)
        return 1, f"REGRESSION: {len(slower)} {of} slower by a factor over {factor}\n  {lines}"
    left_out = len(table) - len(measured)
    rest = f"; {left_out} could not be compared" if left_out else ""
    return 0, f"NO REGRESSION: none {of} is slower by a factor over {factor}{rest}"


def git(*arguments: str) -> str:
    """Return what git prints, or "" where it fails."""
    command = ["git", "-C", str(HERE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def base_of(head: str) -> str:
    """Return where a commit left main, or the one before it if it is the last of main."""
    commit = git("rev-parse", "--verify", head)
    bases = (git("merge-base", main, head) for main in ("main", "origin/main"))
    return next((base for base in bases if base not in ("", commit)), f"{head}~1")


def own_config() -> Path:
    """Write a configuration whose results stay apart from the history in the repository."""
    try:
        from asv.util import load_json
    except ImportError:
        print("COULD NOT MEASURE: asv is not installed: pip install -e '.[bench]'")
        raise SystemExit(2) from None
    config = load_json(HERE / "asv.conf.json", js_comments=True)
    for key in ("repo", "benchmark_dir", "env_dir", "html_dir"):
        config[key] = str((HERE / config[key]).resolve())
    config["results_dir"] = str(SCRATCH / "regression")
    SCRATCH.mkdir(exist_ok=True)
    path = SCRATCH / "regression.conf.json"
    path.write_text(json.dumps(config))
    return path


def asv(*arguments: str) -> tuple[str, int]:
    """Run asv here; return what it prints, which is shown as well, and its exit status."""
    with subprocess.Popen(
        [sys.executable, "-m", "asv", "--config", own_config(), *arguments],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        lines = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines), process.returncode


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base", nargs="?", help="what to compare with")
    parser.add_argument("head", nargs="?", default="HEAD")
    parser.add_argument("--factor", type=float, default=1.3, help="what counts as slower")
    parser.add_argument("--bench", default=BENCH, help="a regular expression of benchmarks")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each commit")
    parser.add_argument(
        "--max-load", type=float, default=0.5, help="cores that others may keep busy"
    )
    options = parser.parse_args(arguments)
    if options.factor <= 1:
        parser.error(f"--factor: more than 1 is needed, got {options.factor}")
    base = options.base or base_of(options.head)
    if git("rev-parse", "--verify", base) == git("rev-parse", "--verify", options.head) != "":
        parser.error(f"{base} and {options.head} are the same commit")
    for role, commit in (("base", base), ("head", options.head)):
        print(f"{role}: {git('log', '-1', '--format=%h %s', commit) or commit}", flush=True)
    # asv would ask for it, and fail where it knows others (dashboard.py --machine).
    known = Path("~/.asv-machine.json").expanduser()
    if not known.exists() or f'"{platform.node()}"' not in known.read_text():
        asv("machine", "--yes")
    loads = [other_load()]

    def measure(bench: str, rounds: int) -> tuple[int, str, str]:
        output, status = asv(
            "continuous", "--factor", str(options.factor), "--no-only-changed", "--show-stderr",
            "--interleave-rounds", "--attribute", f"rounds={rounds}",
            "--bench", bench, base, options.head,
        )  # fmt: skip
        return *verdict(output, status, options.factor), output

    try:
        status, message, output = measure(options.bench, options.rounds)
        if status == 1:
            suspects = [name for mark, _, name in rows(output) if mark == "+"]
            print(f"\n{message}\n\nonce more:", flush=True)
            exactly = "|".join(map(re.escape, suspects))
            status, message, _ = measure(f"^({exactly})$", 2 * options.rounds)
    except KeyboardInterrupt:
        print("\ninterrupted; what has been measured for both so far:", flush=True)
        asv("compare", "--factor", str(options.factor), base, options.head)
        print("COULD NOT MEASURE: interrupted")
        return 2
    loads.append(other_load())
    if status == 1 and max(loads) > options.max_load:
        status, message = 2, f"COULD NOT MEASURE, the machine is not idle (--max-load)\n{message}"
    before, after = (f"{load:.2f}" for load in loads)
    print(f"\nload of other processes: {before}, then {after} cores of {os.cpu_count()}")
    print(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
