"""Llamas of random weights in the shapes of known models, and what a run of qcli costs on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.machine import DEVICE, TINY, clear, synchronize
from benchmarks.memory import Size, write_llama, write_text
from qcli.recipe.load import load_recipe
from qcli.recipe.recipe import Recipe
from qcli.utils.progress import Progress

_TINY = Size(128, 256, 4, 2, 500)
SIZES = {
    "8B": Size(4096, 14336, 32, 8),
    "70B": Size(8192, 28672, 64, 8),
    "135M": Size(576, 1536, 9, 3, 49152),
}
TOKENS = (8, 32) if TINY else (128, 2048)  # samples, and tokens of each


class Model(NamedTuple):
    """A model on disk, and a text for it."""

    folder: Path
    text: Path


def make(folder: Path, size: str, blocks: int) -> Model:
    """A model of one of `SIZES`."""
    shape = _TINY if TINY else SIZES[size]
    model = Model(folder / f"{size}-{blocks}", folder / f"{size}.txt")
    write_llama(model.folder, 2 if TINY else blocks, shape, DEVICE)
    write_text(model.text, TOKENS[0] * TOKENS[1] + 1, shape.vocab)
    return model


def recipe(model: Model, **fields: Any) -> Recipe:
    """A recipe for it; `__` stands for the dots of fields, and each field may be given anew."""
    samples, seq_len = TOKENS
    given: dict[str, Any] = {"model": str(model.folder), "device": DEVICE, "calibration.data": str(model.text)}
    given |= {"calibration.samples": samples, "calibration.seq_len": seq_len}
    return load_recipe(None, given | {key.replace("__", "."): value for key, value in fields.items()})


class Times:
    """A progress that notes when each unit of a stage was done."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.at: list[float] = []
        self.first = ""  # what it said at the start

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == self.stage:
            synchronize()
            self.first = detail if not self.at else self.first
            self.at.append(time.perf_counter())

    @property
    def units(self) -> list[float]:
        """Seconds of each unit."""
        return [round(after - before, 4) for before, after in zip(self.at, self.at[1:], strict=False)]


def measured(run: Callable[[Progress], object], stage: str) -> dict[str, Any]:
    """Seconds of a run and of each unit of a stage, and its peak GPU memory; or why it failed."""
    clear()
    times, begun = Times(stage), time.perf_counter()
    try:
        run(times)
    except Exception as problem:
        return {"failed": f"{type(problem).__name__}: {problem}"[:300], "units": times.units}
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - begun, 2), "units": times.units, "said": times.first}
    if not TINY:
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return row
