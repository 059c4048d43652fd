"""Kernels of error feedback and of training beside the torch operations that they replace, at a layer of 14336 x 4096.

Milliseconds of a whole weight, interleaved, median of rounds; for training also the GB/s of the bytes that the kernels
must move: latents (and their units) twice, the gradient of the latents, and the value and its gradient in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.machine import DEVICE, TINY, save, synchronize
from benchmarks.operations import FEEDBACK, TRAINED
from qcli.algorithms.solvers import feedback_kernel
from qcli.algorithms.solvers.feedback import quantize_columns
from qcli.core.weight import Format
from qcli.utils import triton_kernels
from tests.inference.weights import random_weight

SHAPE = (32, 160) if TINY else (14336, 4096)
ROWS = (16,) if TINY else (8, 16, 32, 64)  # of a program of error feedback
_WARM = 1 if TINY else 3


def feedback(format: Format) -> Callable[[], object]:
    """Error feedback on a whole weight."""
    weight = random_weight(format, SHAPE).to(DEVICE)
    dense, columns = weight.dense(), torch.arange(SHAPE[1], device=DEVICE)
    factor = torch.eye(SHAPE[1], device=DEVICE) + torch.rand(SHAPE[1], SHAPE[1], device=DEVICE).triu(1) / SHAPE[1]
    return lambda: quantize_columns(dense, factor, columns, format, [(SHAPE[0], weight.tables)])


def training(format: Format) -> tuple[Callable[[], object], int]:
    """Forward and backward pass of fake quantization, and the bytes that it must move."""
    weight = random_weight(format, SHAPE).to(DEVICE)
    tables = {name: table.requires_grad_() for name, table in format.float_tables(weight.tables).items()}
    latents, units = format.trained_latents(weight, weight.dense())
    latents.requires_grad_()
    gradient = torch.ones(SHAPE, dtype=torch.bfloat16, device=DEVICE)

    def step() -> None:
        format.fake_quantize(latents, units, tables, torch.bfloat16).backward(gradient)
        latents.grad = None

    return step, latents.numel() * (2 * 4 * (1 if units is None else 2) + 4 + 2 + 2)


def compared(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(_WARM + rounds):
        for name, run in arms.items():
            synchronize()
            begun = time.perf_counter()
            run()
            synchronize()
            if number >= _WARM:
                seconds[name].append(time.perf_counter() - begun)
    return {name: round(1000 * statistics.median(values), 3) for name, values in seconds.items()}


def with_kernels(run: Callable[[], object], rows: int | None = None) -> Callable[[], object]:
    """The same by kernels; `rows` of error feedback in a program."""

    def call() -> None:
        chosen = feedback_kernel.ROWS if rows is None else rows
        with mock.patch.object(triton_kernels, "DEVICES", {DEVICE}), mock.patch.object(feedback_kernel, "ROWS", chosen):
            run()

    return call


def without_kernels(run: Callable[[], object]) -> Callable[[], object]:
    """The same by torch's operations."""

    def call() -> None:
        with mock.patch.object(triton_kernels, "DEVICES", set()):
            run()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1 if TINY else 5)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, format in TRAINED.items():
        step, moved = training(format)
        found = compared({"torch": without_kernels(step), "kernels": with_kernels(step)}, given.rounds)
        rows.append({"what": "training", "format": name, **found, "gb_per_s": round(moved / found["kernels"] / 1e6)})
        print(rows[-1], flush=True)
    for name, format in FEEDBACK.items():
        run = feedback(format)
        arms = {"torch": without_kernels(run)} | {f"kernels, {size} rows": with_kernels(run, size) for size in ROWS}
        rows.append({"what": "error feedback", "format": name, **compared(arms, given.rounds)})
        print(rows[-1], flush=True)
    save("gpu_kernels", {"what": __doc__, "shape": list(SHAPE), "rows": rows})


if __name__ == "__main__":
    main()
