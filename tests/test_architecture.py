"""The plan of the house, DESIGN.md's rooms: imports run strictly downwards."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import numba
import numpy as np
import pytest
from cases import CASES, LAYOUTS, normal

from numbanorm.numba_ext.jit import KERNELS

PACKAGE = Path(__file__).parents[1] / "numbanorm"

# A room imports from lower rooms only; within a room, modules make no circle.
ROOMS = (
    ("tuning",),
    ("numba_ext",),
    ("kernels",),
    ("core",),
    ("methods",),
    ("moments", "functional"),
    ("recalibrate", "inference", "plot", "gradients", "dask", "sklearn", "jit"),
    ("layers",),
    ("torch", "warmup"),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
# Nothing that runs at import may come from an optional dependency.
OPTIONAL = ("torch", "matplotlib", "sklearn", "tqdm", "mpi4py", "dask")


def imported(path):
    """Yield (module, where) of all imports; those of the package without its name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = "numbanorm" if node.level else ""
            base = ".".join(p for p in (package, node.module) if p)
            names = [base] if base != "numbanorm" else [f"{base}.{a.name}" for a in node.names]
        else:
            continue
        yield from ((name, where) for name in names)


MODULES = sorted(PACKAGE.rglob("*.py"))
modules = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))


def room_of(path):
    """Return the top-level name that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@modules
def test_imports_run_downwards(path):
    room = room_of(path)
    assert room in LEVEL, f"give {path.name} a place in the house"
    for name, where in imported(path):
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if root == "numbanorm" and other in LEVEL and other != room:
            assert LEVEL[other] <= LEVEL[room], f"{where} imports {name}"


def test_imports_make_no_circle():
    names = {".".join(("numbanorm", *path.relative_to(PACKAGE).with_suffix("").parts)): path
             for path in MODULES}  # fmt: skip
    graph = {
        name: {
            other
            for other, _ in imported(path)
            for other in (other, other.rpartition(".")[0])
            if other in names and other != name
        }
        for name, path in names.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@modules
def test_only_one_room_imports_torch(path):
    if room_of(path) != "torch":
        assert [w for name, w in imported(path) if name.split(".")[0] == "torch"] == []


@modules
def test_only_one_room_knows_the_insides_of_numba(path):
    insides = ("numba.core", "numba.np", "numba.misc", "llvmlite")
    if room_of(path) != "numba_ext":
        assert [w for name, w in imported(path) if name.startswith(insides)] == []


@modules
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 650


def is_plain(signature):
    """Tell whether a signature has neither 16 bits nor an activation, as other tests have."""
    arrays = [arg for arg in signature if isinstance(arg, numba.types.Array)]
    halves = any(array.dtype.bitwidth == 16 for array in arrays if array.dtype.name != "bool")
    fused = any(isinstance(a, numba.types.Tuple) and "Tuple" in str(a.types[0]) for a in signature)
    return not halves and not fused


def test_each_kernel_is_compiled_once_for_a_type():
    # A signature costs a second or two: whatever the strides, a kernel sees float32 or float64,
    # and a mask or none; some are called in forward and in backward.
    for case in CASES:
        for dtype in (np.float32, np.float64):
            layer, x = case.layer(dtype), case.input(dtype)
            for mask in (None, normal(*case.shape) < 0.5):
                for layout in LAYOUTS.values() if x.ndim > 1 else ():
                    for training in (True, False):
                        layer.train(training)(layout(x), mask=mask)
                        layer.backward(layout(x))
    counts = {name: sum(map(is_plain, kernel.signatures)) for name, kernel in KERNELS.items()}
    assert counts
    both = "reduce_rows", "reduce_columns", "apply_rows", "apply_columns", "group_rows"
    most = {name: 8 if name in both else 4 for name in counts}
    assert {name: n for name, n in counts.items() if n > most[name]} == {}


def test_import_brings_nothing_optional():
    code = f"import sys, numbanorm; print([m for m in {OPTIONAL} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
