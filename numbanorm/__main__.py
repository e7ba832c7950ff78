"""``python -m numbanorm`` shows what is at work; ``python -m numbanorm warmup`` compiles it all."""

import argparse
import importlib.metadata
import platform
import sys
import time
from pathlib import Path

import numba

import numbanorm
from numbanorm import warmup as warming
from numbanorm.numba_ext import cache, threads
from numbanorm.tuning import tuning


def show() -> None:
    """Print versions, the threading layer, threads, what is streamed, and the compile cache."""
    rows = [("numbanorm", numbanorm.__version__), ("Python", platform.python_version())]
    for package in ("numba", "llvmlite", "numpy", "scipy", "tbb"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    try:
        numba.get_num_threads()  # starts the threads
        layer = threads.threading_layer()
    except ValueError as error:
        layer = str(error)
    rows.append(("threading layer", str(layer)))
    most = numba.config.NUMBA_NUM_THREADS
    rows.append(("threads", f"{numbanorm.get_num_threads()} of at most {most}"))
    least = tuning().stream_bytes / (1 << 20)
    rows.append(("streaming stores", f"outputs of {least:.3g} MiB or more"))
    rows += [("compile cache", describe(folder)) for folder in cache.folders()]
    for name, value in rows:
        print(f"{name:<16} {value}")


def describe(folder: Path) -> str:
    """Return what a folder of the compile cache holds, and whether it takes more."""
    n = sum(1 for _ in folder.glob("*.nbc"))
    return f"{folder} ({n} kernels{'' if cache.is_writable(folder) else ', cannot be written to'})"


def warmup(everything: bool) -> int:
    """Compile kernels into the cache; return the exit status."""
    writable = [folder for folder in cache.folders() if cache.is_writable(folder)]
    if not writable:
        show()
        print("Set the environment variable NUMBA_CACHE_DIR to a folder that can be written to.")
        return 1
    start = time.perf_counter()
    kinds = "float32, float64"
    if everything:
        kinds += ", float16, bfloat16, with and without an activation and a residual"
    print(f"compiling for {kinds}", flush=True)
    n = warming.warmup(everything)
    print(f"{n} kernels in {time.perf_counter() - start:.0f} s: {describe(writable[0])}")
    return 0


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m numbanorm",
        description="Show versions, the threading layer, the number of threads and the compile "
        "cache; or compile everything into that cache.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["warmup"],
        help="compile all kernels, for float32 and float64, so that no process needs to wait",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="with warmup: for float16 and bfloat16, and with activations and residuals, too",
    )
    arguments = parser.parse_args()
    if arguments.command == "warmup":
        return warmup(arguments.all)
    if arguments.all:
        parser.error("--all: it goes with warmup")
    show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
