"""Sharing out the CPU cores of this machine among the workers that compute on them."""

from __future__ import annotations

import os
from pathlib import Path

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(cpu_max: Path = _CPU_MAX) -> int:
    """Cores that this process may run on: its affinity, and its container's quota if lower."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no control group, or one that says nothing about CPU
    return cores


def threads_per_worker(num_workers: int, cores: int) -> int:
    """CPU threads of each of `num_workers` workers on `cores` cores."""
    return max(1, cores // num_workers)
