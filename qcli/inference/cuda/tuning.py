"""How the kernels are cut into programs: found by `benchmarks/gpu`, so that no user waits for a search."""

from __future__ import annotations

from typing import NamedTuple


class Gemv(NamedTuple):
    """Of `gemv`: outputs computed at a time by a program, and warps at work on each processor."""

    outputs: int
    warps: int


class Matmul(NamedTuple):
    """Of `matmul`: outputs and warps of a program, stages of its pipeline, and programs for each processor."""

    outputs: int
    warps: int
    stages: int
    programs: int


def gemv(bits: int, rows: int) -> Gemv:
    """For a weight of this width and so many rows of inputs."""
    return Gemv(outputs=8 if bits <= 2 and rows == 1 else 4, warps=32)


def matmul(bits: int, rows: int) -> Matmul:
    """For a weight of this width and so many rows of inputs."""
    return Matmul(outputs=64, warps=4, stages=3, programs=2)
