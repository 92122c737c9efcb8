"""How many cores this process may use: what the machine, its affinity and its control group leave.

Decides nothing but the number. Must never know what it is for.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["core_count"]

CGROUP = Path("/sys/fs/cgroup")


def core_count(cgroup: Path = CGROUP) -> int:
    """Cores of this process, or what ``OMP_NUM_THREADS`` says; at least 1.

    A container's limit is a share of time, not a set of cores: Python and torch count the machine's 64 where the quota
    is 2, and 64 threads on 2 cores' time are stopped for most of each period (Linux: ``cpu.max``, before that
    ``cpu.cfs_quota_us``). A share is rounded up: half a core needs one thread.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said):
        return int(said)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _share(cgroup)
    return cores if share is None else max(1, min(cores, math.ceil(share)))


def _share(cgroup: Path) -> float | None:
    """Cores' worth of time that the control group grants, or ``None`` where it sets no limit."""
    try:
        if (cgroup / "cpu.max").is_file():  # version 2
            quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
