"""Progress callbacks of long steps; only the command line draws them."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called at the start of a stage (`done=0`) and after each of its `total` units.

    A stage that continues an interrupted run starts at the units that are done. A total of 0 is that of a step without
    units, such as reading a model's headers; it ends with the next call.
    """

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None: ...


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """A Progress that does nothing."""
