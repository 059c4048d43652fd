"""How the kernels are cut into programs: found by `benchmarks/gpu`, so that no user waits for a search."""

from __future__ import annotations

from typing import NamedTuple


class Gemv(NamedTuple):
    """Of `gemv`: chunks of 32 columns whose inputs a thread holds, and outputs of a program."""

    chunks: int
    outputs: int


class Matmul(NamedTuple):
    """Of `matmul`: outputs and warps of a program, stages of its pipeline, and programs for each processor."""

    outputs: int
    warps: int
    stages: int
    programs: int


def gemv(bits: int, kind: str) -> Gemv:
    """For a weight of this width and kind of levels. More chunks or outputs take registers that hide latency."""
    return Gemv(chunks=1, outputs=16 if bits <= 2 and kind == "affine" else 8)


def matmul(rows: int) -> Matmul:
    """For so many rows of inputs."""
    return Matmul(outputs=64, warps=4, stages=3, programs=8 if rows <= 64 else 4)
