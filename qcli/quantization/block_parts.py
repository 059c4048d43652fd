"""The blocks of a run as parts of its folder: which are finished, and their tensors in the order of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qcli.core.weight import QuantizedWeight
from qcli.models.manifest import LayerReport
from qcli.models.quantized import LayerStorage, stored_tensors
from qcli.quantization.block_state import BlockState
from qcli.quantization.plan import Plan
from qcli.utils.dtypes import torch_dtype
from qcli.utils.run_folder import RunParts

_OUTSIDE = "outside"


class BlockParts:
    """One part of the run's folder for each block, and one for the tensors outside the blocks.

    Attributes:
        count: number of blocks.
        resumed: how many an interrupted run had finished.
    """

    def __init__(self, plan: Plan, run: RunParts) -> None:
        self.plan, self.run, self.count = plan, run, len(plan.parts) - 1
        self.resumed = sum(run.done(_name(index)) is not None for index in range(self.count))

    def unfinished(self) -> list[int]:
        """Blocks with layers to quantize that are not finished yet; and the last one where the head still needs what
        leaves it."""
        last = self.plan.last_block
        needed = self.plan.reads_final_norm and not self.outside_done
        return [index for index in range(last + 1) if self.run.done(_name(index)) is None or (needed and index == last)]

    @property
    def outside_done(self) -> bool:
        """Whether everything outside the blocks is written."""
        return self.run.done(_OUTSIDE) is not None

    def saved(self, index: int) -> dict[str, QuantizedWeight] | None:
        """The quantized weights of a finished block by path; None: it is not finished."""
        if (file := self.run.done(_name(index))) is None:
            return None
        tensors = load_file(file)
        return {
            layer.path: LayerStorage(format, layer.shape).restore(layer.name, tensors)
            for layer in self.plan.layers
            if layer.block == index and (format := self.plan.formats[layer.name]) is not None
        }

    def commit(self, block: BlockState) -> None:
        """Write a quantized block: packed weights, and every other tensor as the source or a transform has it."""
        prefix = self.plan.prefix(block.index)
        tensors = self._stored(block, prefix) if self.run.writes else {}
        self.run.commit(_name(block.index), tensors, block.report(prefix))

    def _stored(self, block: BlockState, prefix: str) -> dict[str, Tensor]:
        stored = self.plan.parts[block.index]
        tensors: dict[str, Tensor] = {}
        for path, weight in block.weights.items():
            tensors |= stored_tensors(prefix + path, weight)
        tensors |= self._dense([name for name in stored if name not in tensors])
        for name, tensor in block.rewritten().items():
            tensors[prefix + name] = tensor.to("cpu", stored[prefix + name].torch_dtype).contiguous()
        return {name: tensors[name] for name in stored}

    def commit_dense(self) -> None:
        """Write the blocks in which nothing is quantized, as far as they are missing."""
        for index in range(self.plan.last_block + 1, self.count):
            if self.run.done(_name(index)) is None:
                self.run.commit(_name(index), self._dense([*self.plan.parts[index]]), BlockState(index, []).report(""))

    def commit_outside(self, packed: Mapping[str, Tensor], reports: Sequence[LayerReport]) -> None:
        """Write what is outside the blocks.

        Args:
            packed: tensors of the quantized embedding and head.
            reports: of these layers.
        """
        tensors = {**packed, **self._dense([name for name in self.plan.parts[-1] if name not in packed])}
        rows = [asdict(report) for report in reports]
        self.run.commit(_OUTSIDE, {name: tensors[name] for name in self.plan.parts[-1]}, rows)

    def vocabulary(self) -> list[LayerReport]:
        """The reports of embedding and head, as far as they are quantized."""
        return [LayerReport(**row) for row in self.run.report(_OUTSIDE) or ()]

    def names(self) -> list[str]:
        """All parts of the run that make up the checkpoint, in its order."""
        return [*map(_name, range(self.count)), _OUTSIDE]

    def layers(self) -> list[LayerReport]:
        """The reports of all quantized layers."""
        return [LayerReport(**row) for index in range(self.count) for row in self._report(index)["layers"]]

    def training(self) -> dict[str, dict[str, Any]]:
        """How every training went, by `block N WHAT`."""
        return {
            f"block {index} {what}": outcome
            for index in range(self.count)
            for what, outcome in self._report(index)["training"].items()
        }

    def worst_error(self, index: int) -> float:
        """The highest error of a finished block's layers."""
        return max((row["error"] for row in self._report(index)["layers"]), default=0.0)

    def _report(self, index: int) -> dict[str, Any]:
        report: dict[str, Any] = self.run.report(_name(index))
        return report

    def _dense(self, names: list[str]) -> dict[str, Tensor]:
        """The source's own tensors, in the dtype that the checkpoint stores."""
        tensors, dtype = self.plan.source.read(names), self.plan.source.dense_dtype
        return tensors if dtype is None else {name: t.to(torch_dtype(dtype)) for name, t in tensors.items()}


def _name(index: int) -> str:
    return f"{index:05d}"
