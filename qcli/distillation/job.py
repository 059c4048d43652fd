"""What a distillation works with, whichever way it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcli.algorithms.training.loop import Schedule
from qcli.models.native import NativeSource
from qcli.models.open import ModelSource
from qcli.models.stream import ModelStream
from qcli.recipe.distillation import Distillation
from qcli.utils.progress import Progress


@dataclass(frozen=True)
class DistillationJob:
    """Student, teacher, tokens and options of a distillation.

    Attributes:
        student: the quantized checkpoint.
        teacher: the model it was made from.
        tokens: int64 `[samples, length]`; the last `held_out` are not trained on.
        seed: of the samples' order.
        device, dtype: of both models.
        fast: whether their matrix products may use bf16 or TF32 units.
        on_host: whether hidden states wait in host memory, block by block.
    """

    student: NativeSource
    teacher: ModelSource
    tokens: Tensor
    held_out: int
    options: Distillation
    seed: str
    device: torch.device
    dtype: torch.dtype
    fast: bool
    progress: Progress
    on_host: bool = False

    def stream(self, source: ModelSource) -> ModelStream:
        """A stream of the student or the teacher."""
        stream = ModelStream(source, device=self.device, dtype=self.dtype)
        if (head := stream.model.get_output_embeddings()) is not None:  # some models do not say which it is
            stream.round_linears(head, self.linear_dtype)
        return stream

    @property
    def linear_dtype(self) -> torch.dtype:
        """That weights of frozen linear layers are multiplied in."""
        return torch.bfloat16 if self.fast else self.dtype

    @property
    def n_training(self) -> int:
        """Number of training samples; the held-out ones follow them."""
        return len(self.tokens) - self.held_out

    @property
    def pass_samples(self) -> int:
        """Samples in one pass through the model."""
        return max(1, self.options.batch_tokens // self.tokens.shape[1])

    @property
    def schedule(self) -> Schedule:
        """The optimizer's."""
        options = self.options
        return Schedule(
            options.steps,
            options.warmup,
            evaluations=options.judgements,
            clip=options.clip,
            patience=options.patience,
        )
