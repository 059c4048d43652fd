"""What a distillation gave."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcli.algorithms.training.outcome import Outcome


@dataclass(frozen=True)
class DistillationResult:
    """A finished checkpoint.

    Attributes:
        outcome: how the training went, in held-out loss.
        measure: what that loss is, in nats per token.
        blocks: with scope `block`, how the training of each block went.
        plot: file name of the loss curve; None: matplotlib is not installed.
        seconds: wall-clock time.
        peak_memory: bytes, by kind of memory.
    """

    out: Path
    student: str
    teacher: str
    outcome: Outcome
    measure: str
    blocks: list[Outcome]
    plot: str | None
    bits_per_weight: float
    bytes: int
    seconds: float
    peak_memory: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"out": str(self.out)}
