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
class Proof:
    """What an engine made of a packed checkpoint.

    Attributes:
        engine: with versions; None: nothing that is installed loads the layout.
        why_not: the reason where there is no engine.
        blocks: number of blocks that ran, the first ones.
        of: number of blocks of the model.
        max_logit_difference: largest absolute difference to the logits of the quantized checkpoint, in float32.
        kl: of the same logits, nats per token.
    """

    engine: str | None
    why_not: str | None = None
    blocks: int = 0
    of: int = 0
    max_logit_difference: float = 0.0
    kl: float = 0.0

    def described(self) -> str:
        """A line for a person."""
        if self.engine is None:
            return f"not tried: {self.why_not}"
        part = "" if self.blocks == self.of else f" the first {self.blocks} of {self.of} blocks:"
        return f"{self.engine},{part} logits differ by at most {self.max_logit_difference:.3g} (KL {self.kl:.3g})"


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
        proof: what the software that the layout is made for made of it.
        loading: how to load it, as Markdown; `DIR` stands for the folder.
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
    proof: Proof
    loading: str

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"out": str(self.out)}
