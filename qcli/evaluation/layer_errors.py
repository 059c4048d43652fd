"""Where a model loses what it loses: the error of every layer and block against a baseline, on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcli.models.stream import ModelStream
from qcli.utils.progress import Progress


@dataclass(frozen=True)
class BlockErrors:
    """Relative squared errors of outputs, sums over tokens.

    Attributes:
        own: of the block on the inputs that the baseline's block gets.
        accumulated: of what leaves the block, after all the errors before it.
        layers: of each linear on the inputs that the baseline's linear gets, by path in the block.
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
    ours = [model.embed(batch).cpu() for batch in batches]
    theirs = [baseline.embed(batch).cpu() for batch in batches]
    found = []
    for index in range(baseline.n_blocks):
        progress("errors by layer", index, baseline.n_blocks)
        block, reference = model.load_block(index), baseline.load_block(index)
        layers = {path: _Sums() for group in baseline.family.groups for path in group.linears}
        for path, sums in layers.items():
            reference.get_submodule(path).register_forward_hook(_Compare(block.get_submodule(path), sums))
        own, accumulated = _Sums(), _Sums()
        for number, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            target = baseline.run_block(reference, index, its)
            own.add(model.run_block(block, index, its), target)
            output = model.run_block(block, index, mine)
            accumulated.add(output, target)
            ours[number], theirs[number] = output.cpu(), target.cpu()
        errors = {path: sums.relative for path, sums in layers.items()}
        found.append(BlockErrors(index, own.relative, accumulated.relative, errors))
    progress("errors by layer", baseline.n_blocks, baseline.n_blocks)
    return found


class _Sums:
    """Squared error and size of outputs, float64."""

    def __init__(self) -> None:
        self.error = self.size = 0.0

    def add(self, found: Tensor, target: Tensor) -> None:
        self.error += float((found.double() - target.double()).square().sum())
        self.size += float(target.double().square().sum())

    @property
    def relative(self) -> float:
        return self.error / self.size if self.size else 0.0


class _Compare:
    """A forward hook that gives another linear the same input."""

    def __init__(self, other: nn.Module, sums: _Sums) -> None:
        self.other, self.sums = other, sums

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.sums.add(self.other(*args), output)


def by_kind(blocks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean error of each kind of linear over blocks, the worst first."""
    kinds: dict[str, list[float]] = {}
    for block in blocks:
        for path, error in block["layers"].items():
            kinds.setdefault(path, []).append(error)
    means = {path: sum(errors) / len(errors) for path, errors in kinds.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))
