"""What processes exchange in a forward and its backward, by channels and processes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import HERE, prepared

SMALL = "NUMBANORM_BENCH_SMALL" in os.environ


def mpiexec() -> list[str]:
    """Return the command that starts processes, or leave the benchmark out."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    program = shutil.which("mpiexec", path=beside)
    if program is None:
        raise NotImplementedError("mpiexec is not there")
    version = subprocess.run([program, "--version"], capture_output=True, check=True).stdout
    options = (
        ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        if b"Open MPI" in version
        else []
    )
    return [program, *options]


class Exchange:
    """Medians of BatchNorm with a communicator, less those without."""

    param_names = ("channels", "processes")
    params = ((16, 256, 4096), (1, 2, 4))
    # Counted up where what is measured changes.
    version = "1"
    unit = "us"
    timeout = 300

    def setup(self, channels: int, processes: int) -> None:
        """Leave out what has no processes."""
        prepared.need("mpi4py")
        prepared.need("numbanorm", "sum_gradients")
        self.command = [*mpiexec(), "-n", str(processes), sys.executable, "-m", "mpi4py"]

    def track_exchange(self, channels: int, processes: int) -> float:
        """Return the microseconds of the slowest process."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "exchange.json"
            script, calls = HERE.parent / "exchange.py", "5" if SMALL else "300"
            options = ["--channels", str(channels), "--calls", calls, "--json", str(file)]
            command = [*self.command, str(script), *options]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            microseconds: float = json.loads(file.read_text())[str(channels)]["exchange"]
            return round(microseconds, 1)

    track_exchange.pretty_name = "Processes: what an exchange adds to a step"
