"""A quantized model that can be trained, and the model that teaches it.

Both run whole, over the same tokens. A block of the student makes its weights of codes and tables each time it runs,
so dense weights of one block exist at a time, and what a block consists of can be sharded over processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qcli.algorithms.training.losses import listed
from qcli.algorithms.training.trainable_weight import TrainedWeight
from qcli.models.stream import BlockForward, ModelStream
from qcli.utils.device import matmul_precision


@dataclass(frozen=True)
class Predictions:
    """What a model says at every position of some tokens.

    Attributes:
        logits: `[tokens, vocabulary]`; or log-probabilities `[tokens, classes + 1]` of `classes` and of all others.
        hidden: `[tokens, hidden]` after each block, if asked for.
        classes: int64 `[tokens, classes]`: the tokens that `logits` tells apart; None: all.
    """

    logits: Tensor
    hidden: Sequence[Tensor] = ()
    classes: Tensor | None = None

    def over(self, classes: Tensor | None) -> Tensor:
        """Logits as they are, or what they say of the tokens that another model lists."""
        return self.logits if classes is None else listed(self.logits, classes)


class StudentBlock(nn.Module):
    """Block `index` of a stream with trained weights in place of its own.

    Args:
        layers: by path; of a module in the block.
        checkpointing: the block runs again for its gradients instead of keeping what they need.
        fast: whether its matrix products may use bf16 or TF32 units; those that weights are made by never do.
    """

    def __init__(
        self, stream: ModelStream, index: int, layers: Mapping[str, TrainedWeight], *, checkpointing: bool, fast: bool
    ) -> None:
        super().__init__()
        self.stream, self.index, self.checkpointing, self.fast = stream, index, checkpointing, fast
        self.block = stream.load_block(index)
        for path in layers:
            self.block.get_submodule(path).register_parameter("weight", None)
        self.paths = list(layers)
        self._layers = nn.ModuleList(layers.values())

    @property
    def layers(self) -> dict[str, TrainedWeight]:
        """By path."""
        return dict(zip(self.paths, cast("Iterable[TrainedWeight]", self._layers), strict=True))

    def forward(self, hidden: Tensor, final: bool) -> Tensor:
        """`[batch, length, hidden]` -> the same shape; `final`: with weights exactly as they will be stored."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self._run(hidden, final)
        return cast("Tensor", checkpoint(self._run, hidden, final, use_reentrant=False))

    def _run(self, hidden: Tensor, final: bool) -> Tensor:
        with matmul_precision(fast=False):
            weights = {path: layer.dense(final=final) for path, layer in self.layers.items()}
        with matmul_precision(fast=self.fast, device=self.stream.device):
            return self.stream.run_block(self.block, self.index, hidden, weights)


class Student(nn.Module):
    """Trained blocks between a stream's embedding and its head."""

    def __init__(self, stream: ModelStream, blocks: Sequence[StudentBlock], *, fast: bool) -> None:
        super().__init__()
        self.stream, self._blocks, self.fast = stream, nn.ModuleList(blocks), fast

    @property
    def blocks(self) -> list[StudentBlock]:
        """In order."""
        return list(cast("Iterable[StudentBlock]", self._blocks))

    def forward(self, tokens: Tensor, *, final: bool, hidden: bool) -> Predictions:
        """int64 `[samples, length]`; `final` as for `StudentBlock`; `hidden`: with hidden states."""
        blocks = (_fixed(block, final) for block in self.blocks)
        return _predict(self.stream, blocks, tokens, hidden=hidden, fast=self.fast)


class Teacher(nn.Module):
    """A model as its source has it."""

    def __init__(self, stream: ModelStream, blocks: Sequence[nn.Module], *, fast: bool) -> None:
        super().__init__()
        self.stream, self._blocks, self.fast = stream, nn.ModuleList(blocks), fast

    @torch.no_grad()
    def forward(self, tokens: Tensor, *, hidden: bool) -> Predictions:
        """int64 `[samples, length]`; `hidden`: with hidden states."""
        blocks = (_as_is(self.stream, index, block, self.fast) for index, block in enumerate(self._blocks))
        return _predict(self.stream, blocks, tokens, hidden=hidden, fast=self.fast)


def _fixed(block: StudentBlock, final: bool) -> BlockForward:
    return lambda hidden: cast("Tensor", block(hidden, final))


def _as_is(stream: ModelStream, index: int, block: nn.Module, fast: bool) -> BlockForward:
    def run(hidden: Tensor) -> Tensor:
        with matmul_precision(fast=fast, device=stream.device):
            return stream.run_block(block, index, hidden)

    return run


def _predict(
    stream: ModelStream, blocks: Iterable[BlockForward], tokens: Tensor, *, hidden: bool, fast: bool
) -> Predictions:
    after = []
    for state in stream.hidden_states(tokens, blocks):
        if hidden:
            after.append(state.flatten(0, -2))
    with matmul_precision(fast=fast, device=stream.device):
        return Predictions(stream.logits(state).float().flatten(0, 1), after)
