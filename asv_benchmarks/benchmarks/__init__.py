"""What asv measures at every commit; see docs/benchmarks.md.

asv imports this package into a process that it then forks for each benchmark, whatever commit is
installed: nothing here may fail where an old commit lacks something, and no thread may start.
"""

import contextlib
import hashlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# Kept between processes: asv runs every benchmark in one of its own.
SCRATCH = Path(os.environ.get("NUMBA_CACHE_DIR") or HERE.parents[1] / ".asv" / "scratch")


def _digest_of_package() -> str:
    digest = hashlib.sha256()
    spec = find_spec("numbanorm")
    if spec is not None and spec.origin is not None:
        for source in sorted(Path(spec.origin).parent.rglob("*.py")):
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


if "ASV_COMMIT" in os.environ:
    # All wheels have files of the same date, by which Numba's own cache, which early commits use,
    # would take the machine code of one commit for that of another.
    os.environ["NUMBA_CACHE_DIR"] = str(SCRATCH / "kernels" / _digest_of_package())

# Done once and not in every benchmark, after NUMBA_CACHE_DIR is set, which Numba reads when it is
# imported. Numba is slow to get ready for its first kernel; what does that is no public name.
for _library in ("numbanorm", "torch"):
    with contextlib.suppress(ImportError):
        __import__(_library)
with contextlib.suppress(ImportError, AttributeError):
    from numba.core.registry import cpu_target

    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
