"""The plan of the house, DESIGN.md's rooms: imports run strictly downwards."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, LAYOUTS, normal

from numbanorm import _cache, _kernels

PACKAGE = Path(__file__).parents[1] / "numbanorm"

# A module imports from lower levels only.
LEVEL = {
    "_axes": 0,
    "_cache": 0,
    "_launch": 0,
    "_views": 0,
    "_lines": 1,
    "_vectors": 2,
    "_kernels": 3,
    "_threads": 4,
    "_checks": 4,
    "_memory": 4,
    "moments": 5,
    "_normalize": 6,
    "_running": 7,
    "functional": 8,
    "norm": 9,
    "layers": 10,
    "switchable": 10,
    "inference": 10,
    "recalibrate": 10,
    "plot": 10,
    "torch": 11,
    "_warmup": 11,
    "__init__": 12,
    "__main__": 13,
}
# Nothing that runs at import may come from an optional dependency.
OPTIONAL = ("torch", "matplotlib", "sklearn", "tqdm")


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


MODULES = sorted(PACKAGE.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_run_downwards(path):
    assert path.stem in LEVEL, f"give {path.name} a place in the house"
    for name, where in imported(path):
        root, _, rest = name.partition(".")
        module = rest.split(".")[0]
        if root == "numbanorm" and module in LEVEL:
            assert LEVEL[module] < LEVEL[path.stem], f"{where} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_only_one_file_imports_torch(path):
    if path.stem != "torch":
        assert [w for name, w in imported(path) if name.split(".")[0] == "torch"] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_kernels_stand_in_one_file(path):
    # The compile cache of a kernel does not notice when a function in another file changes.
    compiling = (
        "_cache",
        "_kernels",
        "_launch",
        "_lines",
        "_threads",
        "_vectors",
        "_views",
        "_warmup",
        "__main__",
    )
    if path.stem not in compiling:
        assert [w for name, w in imported(path) if name.split(".")[0] == "numba"] == []


def test_each_kernel_is_compiled_once_for_a_type():
    # A signature costs a second or two: whatever the strides, a kernel sees float32 or float64,
    # and a mask or none; one of rows writes past the caches, or does not.
    for case in CASES:
        for dtype in (np.float32, np.float64):
            layer, x = case.layer(dtype), case.input(dtype)
            for mask in (None, normal(*case.shape) < 0.5):
                for layout in LAYOUTS.values() if x.ndim > 1 else ():
                    for training in (True, False):
                        layer.train(training)(layout(x), mask=mask)
                        layer.backward(layout(x))
    counts = {
        name: len(kernel.signatures)
        for name, kernel in vars(_kernels).items()
        if isinstance(getattr(kernel, "_cache", None), _cache.KernelCache)
    }
    assert counts
    either = (
        "apply_rows", "backward_rows",
        "forward_groups", "backward_groups", "forward_elements", "backward_elements",
        "forward_element_columns", "backward_element_columns",
    )  # fmt: skip
    most = {name: 8 if name in either else 4 for name in counts}
    assert {name: n for name, n in counts.items() if n > most[name]} == {}


def test_import_brings_nothing_optional():
    code = f"import sys, numbanorm; print([m for m in {OPTIONAL} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
