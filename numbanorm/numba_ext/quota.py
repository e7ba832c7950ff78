"""How many CPUs' time Linux lets the process have: a container's quota, of control groups 1 or 2.

Numba counts the CPUs that the process may run on. A container may run on all of its host's, for a
part of the time: threads beyond that wait for each other, and use it up while they do.
"""

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path


def cpu_quota(root: Path = Path("/")) -> float:
    """Return how many CPUs' time the process may use, infinity if there is no limit.

    A limit of any group around that of the process holds. In a container its path may be that of
    the host, where only the outermost folder is to be seen.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for group in groups:
        _, controllers, path = (*group.split(":", 2), "", "")[:3]
        for folder in _folders(root / "sys/fs/cgroup", controllers):
            group_folder = folder / path.strip("/")
            for place in (group_folder, *group_folder.parents):
                quotas.append(_quota(place))
                if place == folder:
                    break
    return min(quotas)


def _folders(mounts: Path, controllers: str) -> Iterable[Path]:
    """Return where the groups of controllers may be mounted; version 2 has none of its own."""
    if not controllers:
        return [mounts, mounts / "unified"]
    return [mounts / controllers, mounts / "cpu"] if "cpu" in controllers.split(",") else []


def _quota(folder: Path) -> float:
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        # No limit is "max" in version 2, -1 in version 1.
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, " ".join((folder / n).read_text() for n in names).split())
            if quota > 0 < period:
                return quota / period
    return math.inf
