"""Where the measurements of this folder run: on the GPU, or, to find errors of the scripts, on a CPU at tiny sizes.

QCLI_TINY=1 chooses the CPU. What is measured then means nothing; results are marked `tiny`.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import common

TINY = os.environ.get("QCLI_TINY") == "1"
DEVICE = "cpu" if TINY else "cuda"
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


def save(name: str, content: dict[str, Any]) -> None:
    """Write a result."""
    common.save(name, {**({"tiny": True} if TINY else {}), **content})


def synchronize() -> None:
    """Wait for the GPU."""
    if not TINY:
        torch.cuda.synchronize()


def clear() -> None:
    """Free what is cached on the GPU, and count its peak memory anew."""
    gc.collect()
    if not TINY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(1.0)  # what max_memory has set


class Calls:
    """Calls that are done again and again: in one CUDA graph, or on a CPU one after another."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls, self.graph = calls, None
        if TINY:
            return
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def microseconds(self) -> float:
        """Of one call, on average over all."""
        if self.graph is None:
            begun = time.perf_counter()
            for call in self.calls:
                call()
            return (time.perf_counter() - begun) * 1e6 / len(self.calls)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000 / len(self.calls)
