"""One block on its way through the loop: its modules, its streams, and what has been decided for its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.training.outcome import Outcome
from qcli.core.weight import QuantizedWeight
from qcli.models.manifest import LayerReport
from qcli.models.stream import ModelStream
from qcli.quantization.statistics import StagedBlock


@dataclass(frozen=True)
class BlockGroup:
    """Linears that are quantized together.

    Attributes:
        number: their group's place in the block's order of computation.
        sets: their paths: one set that reads one input, or one for each of several experts.
    """

    number: int
    sets: tuple[tuple[str, ...], ...]

    @property
    def paths(self) -> list[str]:
        """Of all sets."""
        return [path for paths in self.sets for path in paths]


@dataclass(frozen=True)
class CollectedGroup:
    """Linears that read one input.

    Attributes:
        training: weights by path, and the input statistics of the calibration samples.
        held_out: the same of the held-out samples; None where nothing is refined linear by linear.
        fallbacks: what is amiss with the statistics.
    """

    training: LinearGroup
    held_out: LinearGroup | None = None
    fallbacks: tuple[str, ...] = ()

    def only(self, paths: Sequence[str]) -> CollectedGroup:
        """Some of the linears, with the same statistics."""

        def part(side: LinearGroup) -> LinearGroup:
            return replace(side, weights={path: side.weights[path] for path in paths})

        held_out = None if self.held_out is None else part(self.held_out)
        return CollectedGroup(part(self.training), held_out, self.fallbacks)


@dataclass(frozen=True)
class Streams:
    """The activations that enter a block, once for calibration samples and once for held-out ones.

    Attributes:
        training: whose statistics methods read, and that refinement trains on.
        held_out: that decide which step of a training is kept.
    """

    training: StagedBlock
    held_out: StagedBlock

    def release(self) -> None:
        """Forget what the staged forward passes keep inside the block."""
        self.training.release()
        self.held_out.release()


@dataclass
class BlockState:
    """A block while it is being quantized; layers go by their path in the block.

    Attributes:
        index: number of the block.
        dtype: of the weights that take the place of the original ones in `module`.
        groups: the linears that read one input, in order of computation.
        saved: weights from an interrupted run; None: the block is to be quantized.
        module: the block, whose weights become those that the codes stand for; None where no activations are needed.
        original: the same block in full precision; None where nothing is compared with it.
        quantized_streams: activations of the model as quantized so far.
        original_streams: activations of the full-precision model.
        transformed: tensors of `module` that transforms have rewritten, by name in the block.
        weights: the quantized weights.
        targets: float32 `[out, in]`, on the device or in host memory: what codes were fitted to; the original weight
            where a method names nothing.
        reports: one for each quantized layer.
        training: held-out losses of everything trained, by what it was: `teq`, `refine`, or `refine GROUP`.
    """

    index: int
    groups: list[BlockGroup]
    dtype: torch.dtype = torch.float32
    saved: Mapping[str, QuantizedWeight] | None = None
    module: nn.Module | None = None
    original: nn.Module | None = None
    quantized_streams: Streams | None = None
    original_streams: Streams | None = None
    transformed: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    training: dict[str, Outcome] = field(default_factory=dict)

    def replace(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Continue with these weights in place of the original ones."""
        self.weights |= weights
        if self.module is not None:
            for path, weight in weights.items():
                ModelStream.new_weight(self.module.get_submodule(path), weight.dense().to(self.dtype))

    def release_weights(self) -> None:
        """Free what `module` has for the quantized weights, until they are replaced."""
        if self.module is not None:
            for path, weight in self.weights.items():
                nothing = torch.empty(0, dtype=self.dtype, device=weight.codes.device)
                self.module.get_submodule(path).get_parameter("weight").data = nothing

    def release_original(self) -> None:
        """Free the full-precision block, when its activations have left it."""
        self.original = self.original_streams = None

    def saved_of(self, collected: CollectedGroup) -> dict[str, QuantizedWeight]:
        """The saved weights of these linears; layers that stay dense have none."""
        saved = self.saved or {}
        return {path: saved[path] for path in collected.training.weights if path in saved}

    def rewritten(self) -> dict[str, Tensor]:
        """Tensors that stay dense but are not the source's any more, by name in the block."""
        return {name: t for name, t in self.transformed.items() if name.removesuffix(".weight") not in self.weights}

    def report(self, prefix: str) -> dict[str, Any]:
        """Everything but the weights, as plain data.

        Args:
            prefix: of the block's layers in the model, with which the reports' names begin.
        """
        weights = {prefix + path: weight for path, weight in self.weights.items()}
        rows = [replace(row, facts=(weight := weights[row.name]).format.facts(weight)) for row in self.reports]
        return {
            "layers": [asdict(row) for row in rows],
            "training": {what: asdict(outcome) for what, outcome in self.training.items()},
        }
