"""Compare the bits of every layer, layout, dtype, mask and mode with those of another state.

    python tests/bits.py [BASE] [--threads N ...] [--only PATTERN ...]

BASE is a commit, or a folder that holds the package; what stands here is compared with it. Each
state does tests/runs.py in a process of its own, once for each number of threads, which must not
matter either. Results that differ are listed, and the exit status is 1; it is 2 if a state could
not run.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "numbanorm"
BASE = "ef09b5a"  # the package as one folder


def folder_of(state):
    """Return the folder of a state; that of a commit stays, and so does what it compiles."""
    if (Path(state) / PACKAGE).is_dir():
        return Path(state).resolve()
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True)
    name = git(["git", "rev-parse", "--verify", "--quiet", f"{state}^{{commit}}"]).stdout.decode()
    if not name:
        print(f"{state!r} is neither a commit nor a folder with {PACKAGE} in it", file=sys.stderr)
        sys.exit(2)
    folder = Path(tempfile.gettempdir()) / f"{PACKAGE}-{name.strip()}"
    if not folder.exists():
        archive = git(["git", "archive", name.strip(), PACKAGE], check=True).stdout
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(unfinished, filter="data")
        unfinished.rename(folder)
    return folder


def digests_of(threads, folder, patterns):
    """Run the state in a folder in a process of its own; return the digests."""
    command = [sys.executable, ROOT / "tests" / "runs.py", str(threads), *patterns]
    most = max(threads, int(os.environ.get("NUMBA_NUM_THREADS", 4)))
    env = {**os.environ, "PYTHONPATH": str(folder), "NUMBA_NUM_THREADS": str(most)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        print(f"{folder} could not run", file=sys.stderr)
        sys.exit(2)
    found = json.loads(done.stdout)
    if Path(found["package"]).parents[1] != folder:
        print(f"{found['package']} was imported instead of {folder}", file=sys.stderr)
        sys.exit(2)
    return found["digests"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", default=BASE)
    parser.add_argument("--threads", nargs="+", type=int, default=[4])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN")
    args = parser.parse_args()
    states = list(itertools.product(args.threads, (folder_of(args.base), ROOT)))
    expected, n, different = digests_of(*states[0], args.only), 0, []
    for threads, folder in states[1:]:
        found = digests_of(threads, folder, args.only)
        for name, arrays in expected.items():
            other = found.get(name, {})
            n += len(arrays)
            wrong = [k for k in {**arrays, **other} if arrays.get(k) != other.get(k)]
            if wrong:
                different.append(f"{name}: {', '.join(wrong)} ({folder}, {threads} threads)")
    print(*different, sep="\n")
    print(f"{len(expected)} combinations, {n} comparisons, {len(different)} different")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
