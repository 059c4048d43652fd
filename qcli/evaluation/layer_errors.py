"""Where a model loses quality: the output error of every layer and block against a baseline, on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcli.models.stream import ModelStream
from qcli.utils.progress import Progress
from qcli.utils.stored_batches import BatchMemory


@dataclass(frozen=True)
class BlockErrors:
    """Relative squared errors of outputs, sums over tokens.

    Attributes:
        own: of the block on the inputs of the baseline's block.
        accumulated: of the block's output in the model itself, errors of earlier blocks included.
        layers: of each linear on the inputs of the baseline's linear, by path in the block.
    """

    block: int
    own: float
    accumulated: float
    layers: dict[str, float]


@torch.no_grad()
def layer_errors(
    model: ModelStream, baseline: ModelStream, batches: Sequence[Tensor], progress: Progress
) -> list[BlockErrors]:
    """Run both models side by side, a block of each in memory.

    Args:
        batches: int64 `[samples, length]` each.
    """
    memory = BatchMemory(baseline.device, on_host=baseline.device.type != "cpu")
    model_hidden, baseline_hidden = (memory.store(map(stream.embed, batches)) for stream in (model, baseline))
    blocks = []
    for index in range(baseline.n_blocks):
        progress("errors by layer", index, baseline.n_blocks)
        block, reference = model.load_block(index), baseline.load_block(index)
        layers = {path: _Sums() for path in baseline.family.paths_of(index)}
        for path, sums in layers.items():
            reference.get_submodule(path).register_forward_hook(_Compare(block.get_submodule(path), sums))
        own, accumulated = _Sums(), _Sums()
        for number, (actual, expected) in enumerate(zip(model_hidden, baseline_hidden, strict=True)):
            target = baseline.run_block(reference, index, expected)
            own.add(model.run_block(block, index, expected), target)
            output = model.run_block(block, index, actual)
            accumulated.add(output, target)
            model_hidden[number], baseline_hidden[number] = output, target
        errors = {path: sums.relative for path, sums in layers.items()}
        blocks.append(BlockErrors(index, own.relative, accumulated.relative, errors))
    progress("errors by layer", baseline.n_blocks, baseline.n_blocks)
    return blocks


class _Sums:
    """Sums of squared errors and squared targets, float64."""

    def __init__(self) -> None:
        self.error = self.size = 0.0

    def add(self, output: Tensor, target: Tensor) -> None:
        self.error += float((output.double() - target.double()).square().sum())
        self.size += float(target.double().square().sum())

    @property
    def relative(self) -> float:
        return self.error / self.size if self.size else 0.0


class _Compare:
    """A forward hook that runs another linear on the same input and compares the outputs."""

    def __init__(self, other: nn.Module, sums: _Sums) -> None:
        self.other, self.sums = other, sums

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.sums.add(self.other(*args), output)


def by_kind(blocks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean error of each kind of linear over all blocks, the largest first."""
    kinds: dict[str, list[float]] = {}
    for block in blocks:
        for path, error in block["layers"].items():
            kinds.setdefault(path, []).append(error)
    means = {path: sum(errors) / len(errors) for path, errors in kinds.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))
