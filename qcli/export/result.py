"""What `qcli pack` reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PackPlan:
    """What `qcli pack` would write; attributes as in `PackResult`.

    Attributes:
        layers: number of quantized layers.
    """

    run: Path
    format: str
    layers: int
    rounded: int
    notes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"run": str(self.run)}


@dataclass(frozen=True)
class PackResult:
    """A packed checkpoint.

    Attributes:
        format: the export target.
        files: number of weight files.
        bits_per_weight: of the quantized layers, every stored table counted.
        model_bits_per_weight: of the whole model.
        bytes: of the weights.
        rounded: number of requantized layers.
        max_logit_difference: largest absolute difference to the logits of the quantized checkpoint, on one batch.
        kl: KL divergence of the same logits, nats per token.
        notes: remarks of the target, by label.
    """

    out: Path
    format: str
    files: int
    bits_per_weight: float
    model_bits_per_weight: float
    bytes: int
    rounded: int
    max_logit_difference: float
    kl: float
    notes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"out": str(self.out)}
