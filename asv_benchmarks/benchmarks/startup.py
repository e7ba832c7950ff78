"""Start-up, each in a fresh interpreter: import, and the first forward and backward."""

import os
import subprocess
import sys
import textwrap

import cases

from . import HERE, by, prepared

CASES = {
    "batch": cases.Case("batch", cases.IMAGES["small 32x32"]),
    "layer": cases.Case("layer", cases.ROWS["narrow"], "last"),
}
EMPTY_CACHE = """
import os, tempfile
folder = tempfile.TemporaryDirectory()
os.environ["NUMBA_CACHE_DIR"] = folder.name
"""
CALL = "runner.train(); runner.backward()"


def _make(layer: str) -> str:
    case = CASES[layer]
    return f"""
import sys
sys.path.insert(0, {str(HERE.parent)!r})
import cases
runner = cases.numbanorm_runner(cases.Case({case.layer!r}, {case.shape!r}, {case.layout!r}))
"""


class Import:
    """Importing."""

    version = "1"
    rounds = 1
    repeat = 5
    warmup_time = 0

    def setup(self) -> None:
        """Leave out commits that cannot be imported."""
        prepared.need("numbanorm", "Norm")

    def timeraw_numbanorm(self) -> str:
        """Time all of it."""
        return "import numbanorm"

    def timeraw_beyond_numba_and_numpy(self) -> tuple[str, str]:
        """Time what comes on top."""
        return "import numbanorm", "import numba, numpy"

    timeraw_numbanorm.pretty_name = "Import of numbanorm"
    timeraw_beyond_numba_and_numpy.pretty_name = "Import, beyond Numba's and NumPy's"


class FirstCall(by.Prepared):
    """The first forward and backward of a layer."""

    param_names = ("layer",)
    params = (tuple(CASES),)
    repeat = 3
    warmup_time = 0

    def setup(self, layer: str) -> None:
        """Fill the cache, and compare the results."""
        self.ready(CASES[layer])

    def timeraw_warm_cache(self, layer: str) -> tuple[str, str]:
        """Time it where everything has been compiled."""
        return CALL, _make(layer)

    def timeraw_cold_cache(self, layer: str) -> tuple[str, str]:
        """Time it where nothing has been compiled."""
        return CALL, EMPTY_CACHE + _make(layer)

    timeraw_warm_cache.pretty_name = "First call, kernels on disk"
    timeraw_cold_cache.pretty_name = "First call, nothing compiled"
    timeraw_cold_cache.repeat = 1

    def track_compile(self, layer: str) -> float:
        """Return how much of it Numba compiles for, with an empty cache; if it tells."""
        try:
            prepared.need("numba.core.event", "install_timer")  # no public name
        except NotImplementedError:
            return float("nan")
        timed = textwrap.dedent(
            f"""
            from numba.core import event
            with event.install_timer("numba:compiler_lock", print):
                {CALL}
            """
        )
        code = EMPTY_CACHE + _make(layer) + timed
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        return float(ran.stdout)

    track_compile.unit = "seconds"
    track_compile.pretty_name = "First call, nothing compiled: Numba"
