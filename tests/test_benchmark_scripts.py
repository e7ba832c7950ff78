"""sweep.py and load.py of asv_benchmarks: that they run, and print what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "asv_benchmarks"


def call(script, *args):
    env = {**os.environ, "NUMBANORM_BENCH_SMALL": "1"}
    return subprocess.run(
        [sys.executable, FOLDER / script, *args],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_sweep():
    done = call("sweep.py", "cache_bytes", "0", "none", "--case", "batch 2x64x4x4", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first.endswith(", 0, none")
    assert [row.split()[2] for row in rows[:3]] == ["train", "evaluate", "backward"]
    for row in rows:
        hot, cold = row.split(" hot ")[1].split(" cold ")
        assert all(float(number) > 0 for number in (hot + cold).split())
        assert len(hot.split()) == len(cold.split()) == 3


def test_sweep_of_an_unknown_threshold():
    done = call("sweep.py", "nonsense", "1")
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_load():
    pytest.importorskip("torch")
    done = call("load.py", "--rounds", "1", "--case", "batch 2x64x4x4")
    assert done.returncode == 0, done.stderr
    alone, row, beside, row_beside = done.stdout.splitlines()
    assert (alone, beside) == ("alone", "with another process")
    for line in (row, row_beside):
        assert line.startswith("  batch 2x64x4x4")
        assert "PyTorch" in line
