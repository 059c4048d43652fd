"""The block loop: every block of a model, quantized in turn. Everything that quantization does is called from here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from qcli.core.weight import QuantizedWeight
from qcli.quantization.block_parts import BlockParts
from qcli.quantization.block_state import BlockGroup, BlockState, CollectedGroup
from qcli.utils.distributed import Processes
from qcli.utils.progress import Progress


class BlockQuantizer(Protocol):
    """The steps of the loop: `DataFree` where methods read weights alone, `Sequential` where they read activations."""

    def route(self, unfinished: Sequence[int]) -> Sequence[int]:
        """The blocks to walk through, in order, so that the unfinished ones can be quantized."""

    def load(self, index: int, saved: dict[str, QuantizedWeight] | None) -> BlockState:
        """Block `index` as the source has it, and what an interrupted run saved of it."""

    def transform(self, block: BlockState) -> None:
        """Fit the recipe's transforms, unless an interrupted run has, and fold them into the weights."""

    def collect(self, block: BlockState, group: BlockGroup) -> list[CollectedGroup]:
        """Weights of linears that read one input, and the statistics of that input; earlier groups are quantized. Of
        experts each has inputs of its own."""

    def solve(self, block: BlockState, collected: CollectedGroup) -> dict[str, QuantizedWeight]:
        """Quantize the group: the method, low-rank compensation, and refinement linear by linear."""

    def advance_original(self, block: BlockState) -> None:
        """Move the full-precision activations through the block: the targets of its reconstruction."""

    def refine(self, block: BlockState) -> None:
        """Reconstruct the block's output by gradient, all of its layers together."""

    def advance(self, block: BlockState) -> None:
        """Move the quantized activations through the block."""


def quantize_blocks_apart(
    quantizer: BlockQuantizer, parts: BlockParts, processes: Processes, progress: Progress
) -> None:
    """Quantize blocks that do not depend on each other, each in one of several processes; the main one commits all."""
    unfinished = quantizer.route(parts.unfinished())
    for first in range(0, len(unfinished), processes.world_size):
        own = unfinished[first : first + processes.world_size][processes.rank : processes.rank + 1]
        blocks = [_solved(quantizer, quantizer.load(index, None)) for index in own]
        for block in itertools.chain.from_iterable(processes.to_main(blocks)):
            parts.commit(block)
            progress("quantize", block.index + 1, parts.count, _detail(parts, block.index))


def quantize_blocks(quantizer: BlockQuantizer, parts: BlockParts, progress: Progress) -> None:
    """Quantize every unfinished block and commit it to the run's folder.

    A resumed run walks the same lines: a block that was saved gets its saved weights in place of solved ones, since
    the activations that later blocks read pass through it.
    """
    done = parts.resumed
    for index in quantizer.route(parts.unfinished()):
        block = _solved(quantizer, quantizer.load(index, parts.saved(index)))
        if block.saved is None:
            quantizer.refine(block)
            parts.commit(block)
            done += 1
        quantizer.advance(block)
        detail = _detail(parts, index) if block.saved is None else f"block {index} was done before"
        progress("quantize", done, parts.count, detail)


def _solved(quantizer: BlockQuantizer, block: BlockState) -> BlockState:
    """The block with all of its groups quantized."""
    quantizer.transform(block)
    for group in block.groups:
        for collected in quantizer.collect(block, group):
            block.replace(quantizer.solve(block, collected) if block.saved is None else block.saved_of(collected))
    quantizer.advance_original(block)
    return block


def _detail(parts: BlockParts, index: int) -> str:
    return f"worst layer error {parts.worst_error(index):.2g}"
