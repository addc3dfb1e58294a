"""What this process may use of its machine: cores and memory, a container's limits included."""

import os
from collections.abc import MutableMapping
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def share_cores(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets the threads of an operation sleep, not spin, while they wait for one another.

    Spinning is a little faster on cores of one's own, and ruinous on shared ones: a thread that
    was scheduled away keeps the other spinning in the way of whoever has its core, some hundred
    times a step. OpenMP reads this when torch is loaded, so it must be said before.
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def threads_for(rows: int, threads: int) -> int:
    """How many of two threads compute a step of torch operations over so many rows.

    Threads that sleep while they wait (`share_cores`) are woken some 200 times a step, about
    10 ms in all. Up to 16 rows that is more than a second thread saves; with more threads than
    two they save more.
    """
    return 1 if threads == 2 and rows <= 16 else threads


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores of the affinity mask, fewer where the control group's CPU quota allows fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        return max(1, min(cores or 1, int(quota) // int(period)))
    return cores or 1


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that can still be allocated without swapping or passing the control group's limit."""
    import psutil  # here, so that a model on a GPU computes where psutil is not installed

    available = int(psutil.virtual_memory().available)
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit.isdigit() and used.isdigit():
        available = min(available, max(0, int(limit) - int(used)))
    return available


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _read(path: Path) -> str:
    """A control file's text, or an empty one where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
