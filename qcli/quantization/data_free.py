"""Quantization from weights alone: no text, no activations, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qcli.algorithms.layer_group import LinearGroup
from qcli.core.weight import QuantizedWeight
from qcli.quantization.block_state import BlockGroup, BlockState, CollectedGroup
from qcli.quantization.layer_report import layer_report
from qcli.quantization.plan import Plan
from qcli.quantization.solve import solve


class DataFree:
    """The `BlockQuantizer` of methods that read weights alone: nothing depends on other layers."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device

    def route(self, unfinished: Sequence[int]) -> Sequence[int]:
        """Finished blocks are left alone."""
        return unfinished

    def load(self, index: int, saved: dict[str, QuantizedWeight] | None) -> BlockState:
        """Nothing is read yet; every layer is a group of its own."""
        groups = [BlockGroup(number, ((path,),)) for number, path in enumerate(self.plan.methods_of(index))]
        return BlockState(index, groups, saved=saved)

    def transform(self, block: BlockState) -> None:
        """Transforms take data."""

    def collect(self, block: BlockState, group: BlockGroup) -> list[CollectedGroup]:
        """Read the weight of one layer."""
        (path,), source = group.paths, self.plan.source
        name = f"{self.plan.prefix(block.index)}{path}.weight"
        weight = source.read([name])[name].to(self.device)
        weight = (weight.T if source.family.conv1d else weight).float().contiguous()
        return [CollectedGroup(LinearGroup({path: weight}))]

    def solve(self, block: BlockState, collected: CollectedGroup) -> dict[str, QuantizedWeight]:
        """Quantize one layer."""
        ((path, weight),) = collected.training.weights.items()
        method = self.plan.methods_of(block.index)[path]
        solution = solve(method, self.plan.recipe.low_rank, collected.training)[path]
        name = self.plan.prefix(block.index) + path
        block.reports.append(layer_report(name, method, solution, weight, collected.training))
        return {path: solution.weight}

    def advance_original(self, block: BlockState) -> None:
        """There are no activations."""

    def refine(self, block: BlockState) -> None:
        """Refinement takes data."""

    def advance(self, block: BlockState) -> None:
        """There are no activations."""
