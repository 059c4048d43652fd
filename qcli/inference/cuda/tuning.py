"""How the kernels are cut into programs: found by `benchmarks/gpu`, so that no user waits for a search."""

from __future__ import annotations

from typing import NamedTuple


class Gemv(NamedTuple):
    """Of `gemv`: chunks of 32 columns whose inputs a thread holds, outputs of a program, and the registers that a
    thread may use at most."""

    chunks: int
    outputs: int
    registers: int = 255


class Matmul(NamedTuple):
    """Of `matmul`: outputs and warps of a program, stages of its pipeline, and programs for each processor."""

    outputs: int
    warps: int
    stages: int
    programs: int


def gemv(bits: int) -> Gemv:
    """For a weight of this width."""
    return Gemv(chunks=1, outputs=16)


def matmul(bits: int, rows: int) -> Matmul:
    """For a weight of this width and so many rows of inputs."""
    return Matmul(outputs=64, warps=4, stages=3, programs=8)
