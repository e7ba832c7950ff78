"""Make a case ready: everything is compiled and every result compared before a clock runs.

asv_runner runs ``setup()`` before every single timed call, so that what is slow here is done once
in a process, and what does not change from commit to commit is kept on disk.
"""

import functools
import hashlib
import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import cases
import compare
import plain

from . import SCRATCH

TOLERANCE = {"float32": 2e-3, "float64": 1e-8, "float16": 4e-3, "bfloat16": 3e-2}


def need(library: str, name: str | None = None) -> Any:
    """Import a library; what is not installed, or what a commit of old lacks, is no failure.

    asv leaves a benchmark out whose setup raises NotImplementedError.
    """
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        # asv names the commit that it has installed; without one, this is the checkout itself.
        if library != "numbanorm" or "ASV_COMMIT" in os.environ:
            raise NotImplementedError(f"{library} cannot be imported") from error
        raise
    if name is not None and not hasattr(module, name):
        raise NotImplementedError(f"{library} has no {name}")
    return module


@functools.lru_cache(maxsize=1)
def runner(case: cases.Case, library: str = "numbanorm", fresh: bool = False) -> cases.Runner:
    """Return how a library does a case, after its results have been compared with NumPy's."""
    need(library, "Norm" if library == "numbanorm" else None)
    if case.dtype == "bfloat16":
        need("ml_dtypes")
    try:
        if library == "numbanorm":
            made = cases.numbanorm_runner(case, fresh)
        else:
            made = cases.torch_runner(case) if library == "torch" else plain.runner(case)
        found = compare.results_of(made)
    except TypeError as error:
        # A commit of old has no such argument, or no 16 bits.
        if library != "numbanorm" or "ASV_COMMIT" not in os.environ:
            raise
        raise NotImplementedError(f"numbanorm has no {case.name}") from error
    # Others round in between, and then are on the other side of a kink.
    share = 0.95 if case.half or case.fused else 1.0
    where = f"{case.name}, {library}"
    compare.assert_same(found, expected(case), where, tolerance=TOLERANCE[case.dtype], share=share)
    return made


def expected(case: cases.Case) -> Any:
    """Return what NumPy finds in float64, computed once for all commits."""
    sources = [Path(str(module.__file__)).read_bytes() for module in (cases, compare, plain)]
    digest = hashlib.sha256(b"".join([*sources, repr(case).encode()])).hexdigest()[:24]
    path = SCRATCH / "expected" / f"{digest}.json"
    if not path.exists():
        results = compare.results_of(plain.runner(case, "float64"))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be about to do the same.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(results, file)
        os.replace(file.name, path)
    return json.loads(path.read_text())
