"""Seconds of work on a device, and how fast it copies memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch

_COPIED = 256 << 20
_COPIES = 5


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long a piece of work takes; on a GPU between two events, with nothing before it in the queue."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def captured(work: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], bool]:
    """The same work as a CUDA graph, which starts without launches, and whether it could be made one."""
    if device.type != "cuda":
        return work, False
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()  # what happens at first use only stays out of the graph
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:  # it waits for the device
        torch.cuda.synchronize(device)
        return work, False
    return graph.replay, True


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that are read and written when a tensor larger than the caches is copied."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * _COPIED / median(seconds(lambda: target.copy_(source), device) for _ in range(_COPIES))


def load_average() -> float | None:
    """Processes that wanted to run in the last minute; None: the system does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
