"""The teacher's predictions: from the model itself, or from a cache of its most likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qcli.algorithms.training.losses import log_probs_with_remainder
from qcli.distillation.predictions import Predictions, predict
from qcli.models.stream import BlockForward, ModelStream
from qcli.utils.device import matmul_precision
from qcli.utils.progress import Progress

_LIKELY, _CLASSES = "likely", "classes"


class Teacher(nn.Module):
    """The full-precision model, all of its blocks in memory or sharded over processes."""

    def __init__(self, stream: ModelStream, blocks: Sequence[nn.Module], *, fast: bool) -> None:
        super().__init__()
        self.stream, self._blocks, self.fast = stream, nn.ModuleList(blocks), fast

    @torch.no_grad()
    def forward(self, tokens: Tensor, *, hidden: bool) -> Predictions:
        """int64 `[samples, length]`; `hidden` as for `predict`."""
        blocks = (_forward(self.stream, index, block, self.fast) for index, block in enumerate(self._blocks))
        return predict(self.stream, blocks, tokens, hidden=hidden, fast=self.fast)


class TeacherFn(Protocol):
    """The teacher's predictions for samples of the job's tokens."""

    def __call__(self, rows: list[int], *, hidden: bool) -> Predictions:
        """For the samples `rows`; `hidden` as for `predict`."""


class LiveTeacher:
    """Runs the teacher at every call.

    Args:
        tokens: int64 `[samples, length]`.
    """

    def __init__(self, teacher: Teacher, tokens: Tensor) -> None:
        self.teacher, self.tokens = teacher, tokens

    def __call__(self, rows: list[int], *, hidden: bool) -> Predictions:
        predictions: Predictions = self.teacher(self.tokens[rows], hidden=hidden)
        return predictions


class CachedTeacher:
    """The teacher's most likely tokens and the probability of all others together; the model itself is not needed.

    Args:
        tensors: of `cache_predictions`.
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self.tensors, self.device = tensors, device

    def __call__(self, rows: list[int], *, hidden: bool) -> Predictions:
        assert not hidden, "hidden states are not cached"
        likely, classes = (self.tensors[name][rows].flatten(0, 1).to(self.device) for name in (_LIKELY, _CLASSES))
        return Predictions(likely, (), classes.long())


@torch.no_grad()
def cache_predictions(
    teacher: Teacher, tokens: Tensor, top_k: int, samples: int, progress: Progress
) -> dict[str, Tensor]:
    """The tensors of a `CachedTeacher`.

    Args:
        tokens: int64 `[samples, length]`.
        samples: in one pass.

    Returns:
        `likely`, float32 `[samples, length, top_k + 1]`: log-probabilities, of all other tokens together last; and
        `classes`, int32 `[samples, length, top_k]`: which tokens they are of.
    """
    parts: dict[str, list[Tensor]] = {_LIKELY: [], _CLASSES: []}
    batches = tokens.split(samples)
    for done, batch in enumerate(batches):
        progress("teacher predictions", done, len(batches))
        logits = teacher(batch, hidden=False).logits
        classes = logits.topk(top_k).indices
        parts[_LIKELY].append(log_probs_with_remainder(logits, classes).view(*batch.shape, -1).cpu())
        parts[_CLASSES].append(classes.view(*batch.shape, -1).int().cpu())
    progress("teacher predictions", len(batches), len(batches))
    return {name: torch.cat(part) for name, part in parts.items()}


def _forward(stream: ModelStream, index: int, block: nn.Module, fast: bool) -> BlockForward:
    def forward(hidden: Tensor) -> Tensor:
        with matmul_precision(fast=fast, device=stream.device):
            return stream.run_block(block, index, hidden)

    return forward
