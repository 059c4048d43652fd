"""What a model predicts for every position of some tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qcli.algorithms.training.losses import log_probs_with_remainder
from qcli.models.stream import BlockForward, ModelStream
from qcli.utils.device import matmul_precision


@dataclass(frozen=True)
class Predictions:
    """A model's predictions, and the hidden states behind them.

    Attributes:
        logits: `[tokens, vocabulary]` as the head makes them; or log-probabilities `[tokens, classes + 1]` of
            `classes`, and of all others together last.
        hidden: `[tokens, hidden]` after each block; empty unless requested.
        classes: int64 `[tokens, classes]`: the tokens that `logits` tells apart; None: the whole vocabulary.
    """

    logits: Tensor
    hidden: Sequence[Tensor] = ()
    classes: Tensor | None = None

    def over(self, classes: Tensor | None) -> Tensor:
        """The logits, or log-probabilities over the classes that another model's predictions have."""
        return self.logits if classes is None else log_probs_with_remainder(self.logits, classes)


def predict(
    stream: ModelStream, blocks: Iterable[BlockForward], tokens: Tensor, *, hidden: bool, fast: bool
) -> Predictions:
    """Run int64 tokens `[samples, length]` through blocks between a stream's embedding and its head.

    Args:
        hidden: whether to keep the hidden states after each block.
        fast: whether the head's matrix product may use bf16 or TF32 units; blocks set their own precision.
    """
    kept = []
    for states in stream.hidden_states(tokens, blocks):
        if hidden:
            kept.append(states.flatten(0, -2))
    with matmul_precision(fast=fast, device=stream.device):
        return Predictions(stream.logits(states).flatten(0, 1), kept)
