"""What quantizing a model gave."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcli.models.contents import stored_contents
from qcli.models.facts import mean_facts
from qcli.models.manifest import LayerReport
from qcli.quantization.plan import Plan


@dataclass(frozen=True)
class Result:
    """A finished checkpoint.

    Attributes:
        plan: what was written; its recipe leaves nothing open.
        layers: one report for each quantized layer.
        vocabulary: reports of embedding and head, as far as they are quantized.
        training: held-out losses before and after, best step and steps, by block and what was trained.
        tokens_sha256: of the calibration tokens; None: none were used.
        seconds: wall-clock time.
        peak_memory: bytes, by kind of memory.
        resumed_blocks: how many blocks an interrupted run had finished.
        dense: layers that an override leaves dense.
        processes: how many shared the work; times and memory are those of the main one.
        allocation: what was predicted and measured where bits were chosen automatically.
    """

    out: Path
    plan: Plan
    layers: list[LayerReport]
    training: dict[str, dict[str, Any]]
    tokens_sha256: str | None
    seconds: float
    peak_memory: dict[str, int]
    resumed_blocks: int = 0
    dense: list[str] = field(default_factory=list)
    processes: int = 1
    vocabulary: list[LayerReport] = field(default_factory=list)
    allocation: dict[str, Any] | None = None

    @property
    def fallbacks(self) -> dict[str, list[str]]:
        """By layer, or by what was trained, where there were any."""
        layers = {layer.name: layer.fallbacks for layer in [*self.layers, *self.vocabulary] if layer.fallbacks}
        stopped = {what: outcome["stopped"] for what, outcome in self.training.items()}
        return layers | {what: [reason] for what, reason in stopped.items() if reason is not None}

    @property
    def facts(self) -> dict[str, float]:
        """Mean of each of the layers' `facts` over their weights."""
        return mean_facts(self.layers, {layer.name: layer.shape for layer in self.plan.layers})

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "out": str(self.out),
            "model": self.plan.recipe.model,
            "bits_per_weight": self.plan.bits_per_weight,
            "model_bits_per_weight": self.plan.model_bits_per_weight,
            "bytes": self.plan.bytes,
            "source_bytes": self.plan.source.bytes(),
            "contents": self.plan.contents,
            "source_contents": stored_contents(self.plan.source, self.plan.modules),
            "smaller": self.plan.smaller,
            "source_quantized_as": self.plan.source.quantized_as,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "processes": self.processes,
            "resumed_blocks": self.resumed_blocks,
            "fallbacks": self.fallbacks,
            "dense": self.dense,
            "training": self.training,
            "unscaled": self.plan.unscaled,
            "allocation": self.allocation,
            "facts": self.facts,
            "layers": [asdict(layer) for layer in self.layers],
            "vocabulary": [asdict(layer) for layer in self.vocabulary],
        }
