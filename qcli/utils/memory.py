"""Memory of the machine and of this process. Linux answers every question; elsewhere some answers are None.

torch is imported where a device is asked for: the command line imports this module at every start.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGE_BLOCK = 8 << 20
KEPT_HEAP = 128 << 20  # bytes of small freed blocks that stay with the process, where `return_large_blocks` was called


class SystemMemory(NamedTuple):
    """Bytes of RAM: installed, and available to new allocations without swapping."""

    total: int
    available: int


def system_memory() -> SystemMemory | None:
    """RAM of this machine; None where the kernel has no `/proc/meminfo`."""
    fields = _proc_fields("meminfo")
    if fields is None:
        return None
    return SystemMemory(_kibibytes(fields["MemTotal"]), _kibibytes(fields["MemAvailable"]))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None: unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_memory_of_host()


def free_memory_of_host() -> int | None:
    """Bytes of RAM that can still be allocated, within the limit of this control group; None: unknown."""
    memory = system_memory()
    if memory is None:
        return None
    left = _left_in_control_group()
    return memory.available if left is None else min(memory.available, left)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of this process so far: `rss`, resident memory, where the system reports it; `cuda`, GPU memory
    allocated, where a GPU is used."""
    peak = {}
    resident = _peak_resident()
    if resident is not None:
        peak["rss"] = resident
    if device.type == "cuda":
        import torch

        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def return_large_blocks() -> None:
    """Make glibc return large freed blocks to the system at once; no other C library needs it.

    By default glibc raises its mmap threshold to the size of the largest block freed so far and serves later
    allocations up to that size from the heap. Tensors of the next block then do not fit the holes that the last one
    left, which costs a quarter of the peak of a run on the CPU. A fixed threshold turns that off. Smaller blocks stay:
    with a fixed threshold glibc would also return all above 128 kB at the end of the heap, over and over, which took a
    tenth of the time of a training step.
    """
    import ctypes  # late: 10 ms of every start of the command line

    with contextlib.suppress(OSError, AttributeError, TypeError):  # no mallopt; Windows has no CDLL(None)
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_HEAP)


def use_huge_pages() -> None:
    """Have torch ask Linux for huge pages for tensors of 2 MB and more, unless the environment says otherwise.

    Memory that `return_large_blocks` returns is new at every allocation, and the kernel takes a fault for each of its
    pages: with pages of 4 kB that was a sixth of the time of a refinement. torch reads the variable when it first
    allocates a tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _peak_resident() -> int | None:
    """VmHWM counts from the last exec; getrusage, the fall-back, also counts what the parent held before it."""
    status = _proc_fields("self/status")
    if status is not None:
        return _kibibytes(status["VmHWM"])
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _left_in_control_group() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, or `max`: no limit
        return None
    return limit - int(used["anon"])


def _proc_fields(name: str) -> dict[str, str] | None:
    """The `key: value` lines of a file in /proc."""
    try:
        lines = (Path("/proc") / name).read_text().splitlines()
    except OSError:
        return None
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _kibibytes(text: str) -> int:
    return int(text.removesuffix(" kB")) << 10
