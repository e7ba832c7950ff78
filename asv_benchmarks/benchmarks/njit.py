"""Calls of numbanorm.jit from the user's own compiled code, and what they take to compile."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange

from . import prepared

SHAPES = {"32x64": (32, 64), "512x512": (512, 512)}


def _plain(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return (x - x.mean(1)[:, None]) / np.sqrt(x.var(1) + 1e-5)[:, None] * weight + bias


@functools.cache  # asv sets up before each call that it times
def _callers(layer_norm: Any) -> dict[str, Callable[..., Any]]:
    """Return functions that call one 100 times, and return the last y."""

    def calls(x: Any, weight: Any, bias: Any) -> Any:
        for _call in range(100):
            y = layer_norm(x, weight, bias, 1e-5)[0]
        return y

    @njit(parallel=True)
    def calls_in_prange(x: Any, weight: Any, bias: Any) -> Any:
        y = np.empty_like(x)
        for i in prange(100):
            found = layer_norm(x, weight, bias, 1e-5)[0]
            if i == 99:
                y[:] = found
        return y

    return {"njit": njit(calls), "prange": calls_in_prange, "Python": calls}


class Calls:
    """A hundred calls of layer_norm, in a loop and in a parallel one."""

    param_names = ("caller", "shape")
    params = (("njit", "prange", "Python"), tuple(SHAPES))
    # Counted up where what is measured changes.
    version = "1"
    timeout = 120

    def setup(self, caller: str, shape: str) -> None:
        """Compile, and compare the result."""
        jit = prepared.need("numbanorm.jit")
        rng = np.random.default_rng(0)
        m, d = SHAPES[shape]
        self.args = tuple(rng.normal(size=n).astype("float32") for n in ((m, d), d, d))
        self.call = _callers(jit.layer_norm)[caller]
        np.testing.assert_allclose(self.call(*self.args), _plain(*self.args), atol=1e-5)

    def time_100(self, *_: Any) -> None:
        """Time them."""
        self.call(*self.args)

    time_100.pretty_name = "@njit: 100 calls of layer_norm"


USER = """
import time
import numpy as np
from numba import njit
from numbanorm.jit import layer_norm, layer_norm_backward

def nothing(x, weight, bias):
    return x + x.sum(), weight.sum() + bias.sum()

def forward(x, weight, bias):
    y, mean, rstd = layer_norm(x, weight, bias, 1e-5)
    return y + x.sum(), weight.sum() + bias.sum()

def both(x, weight, bias):
    y, mean, rstd = layer_norm(x, weight, bias, 1e-5)
    dx, dweight, dbias = layer_norm_backward(y, x, weight, mean, rstd)
    return dx + x.sum(), dweight.sum() + dbias.sum()

args = np.ones((32, 64), np.float32), np.ones(64), np.zeros(64)
both(*args)  # the kernels
njit(lambda x: x + 1)(args[0])  # Numba is slow to get ready
seconds = []
for function in nothing, {function}:
    start = time.perf_counter()
    njit(function)(*args)
    seconds.append(time.perf_counter() - start)
print(seconds[1] - seconds[0])
"""


class Compile:
    """Seconds that a function of the user's takes longer to compile, in a process of its own."""

    param_names = ("calls",)
    params = (("forward", "both"),)
    timeout = 300
    version = "1"
    unit = "seconds"

    def setup(self, calls: str) -> None:
        """Leave out commits without it."""
        prepared.need("numbanorm.jit")

    def track_compile(self, calls: str) -> float:
        """Return how much longer it takes for what it calls."""
        command = [sys.executable, "-c", USER.format(function=calls)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        return float(ran.stdout)

    track_compile.pretty_name = "@njit: what a call takes longer to compile"
