"""Memory of this process: what it has used at most, and what is still free."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at the peak so far: resident memory, and GPU memory allocated where a GPU is used."""
    peak = {"rss": _peak_resident()}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def _peak_resident() -> int:
    """Of this program alone: what the system counts for the process goes back to whatever started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) << 10
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not in a group, or `max`: no limit
        return free
    return min(free, limit - int(used["anon"]))
