"""What `qcli distill` asks of a student, and how it is trained: one validated record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from qcli.utils.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class Distillation(Options):
    """Options of knowledge distillation.

    `kl` is plain distillation; `onebit` the paper's soft cross-entropy and normalised hidden states (arXiv
    2402.11295); `dad` counts ambiguous tokens more (DB-LLM, arXiv 2402.11960; its formula is ours).
    """

    data: str | None = Field(
        default=None, min_length=1, description="text to train on, as under calibration; default: the same text"
    )
    samples: int | None = Field(default=None, ge=1, description="token sequences of it; default: as for calibration")
    seq_len: int | None = Field(default=None, ge=2, description="tokens of a sequence; default: as for calibration")
    loss: Literal["kl", "onebit", "dad"] = Field(default="kl", description="of the student's predictions")
    temperature: float = Field(default=1.0, gt=0, description="of both predictions under kl")
    gamma: float = Field(default=0.1, ge=0, description="of dad: how much ambiguity counts; 0 is kl")
    ambiguity: Literal["teacher-student", "teacher"] = Field(
        default="teacher-student", description="of dad: the entropy that tells ambiguous tokens"
    )
    detached: bool = Field(default=True, description="of dad: no gradient passes through its weights")
    plain: float = Field(default=0.1, ge=0, description="of dad: share of plain kl that is added")
    hidden: float | None = Field(
        default=None, ge=0, description="weight of hidden states, normalised; default: 1 for onebit, else 0"
    )
    hidden_mse: float = Field(default=0.0, ge=0, description="weight of the hidden states' relative squared error")
    scope: Literal["model", "block"] = Field(
        default="model",
        description="what is trained at once: everything, or one block at a time, of which the last one answers for "
        "predictions and the others for hidden states; for models that do not fit",
    )
    teacher_top_k: int | None = Field(
        default=None, ge=1, description="ask the teacher once and remember so many tokens and the mass of the others"
    )
    train: tuple[Literal["tables", "weights"], ...] = Field(
        default=("tables",), strict=False, description="scales, offsets and codebooks, and the weights behind the codes"
    )
    steps: int = Field(default=1000, ge=1, description="of the optimizer, under scope block for each block")
    tables_lr: float = Field(default=2e-3, gt=0, description="learning rate of tables, relative to their size")
    weights_lr: float = Field(default=1e-2, gt=0, description="learning rate of weights, in quantization steps")
    warmup: float = Field(default=0.05, ge=0, le=1, description="share of the steps in which the rates rise")
    clip: float = Field(default=1.0, gt=0, description="largest norm of a step's gradient")
    batch_tokens: int = Field(default=2048, ge=1, description="tokens of one pass through the model")
    accumulate: int = Field(default=1, ge=1, description="passes whose gradients make one step")
    checkpointing: bool = Field(default=True, description="blocks are run again for their gradients, to save memory")
    judgements: int = Field(default=20, ge=1, description="how often held-out text is asked and the state is saved")
    patience: int | None = Field(default=None, ge=1, description="judgements without a better one that end training")

    @model_validator(mode="after")
    def _consistent(self) -> Distillation:
        if not self.train:
            raise ValueError("train must name tables, weights or both")
        if self.teacher_top_k is not None:
            if self.needs_hidden:
                raise ValueError("teacher_top_k remembers no hidden states: set hidden: 0, or leave it out")
            if self.temperature != 1:
                raise ValueError("teacher_top_k remembers probabilities at temperature 1 only")
            if self.scope == "block":
                raise ValueError("teacher_top_k goes with scope: model; by blocks the teacher runs only once anyway")
        return self

    @property
    def hidden_weight(self) -> float:
        """What `hidden` comes to."""
        return (1.0 if self.loss == "onebit" else 0.0) if self.hidden is None else self.hidden

    @property
    def needs_hidden(self) -> bool:
        """Whether hidden states are compared at all."""
        return self.hidden_weight > 0 or self.hidden_mse > 0

    def token_losses(
        self,
        teacher: Tensor,
        student: Tensor,
        teacher_hidden: Sequence[Tensor] = (),
        student_hidden: Sequence[Tensor] = (),
    ) -> Tensor:
        """One number a token.

        Args:
            teacher, student: logits `[tokens, vocabulary]`.
            teacher_hidden, student_hidden: `[tokens, hidden]` after each block; only if `needs_hidden`.
        """
        from qcli.algorithms.training import losses

        if self.loss == "kl":
            found = losses.kl_divergence(teacher, student, self.temperature)
        elif self.loss == "onebit":
            found = losses.cross_entropy(teacher, student)
        else:
            found = losses.deviation_aware(
                teacher,
                student,
                gamma=self.gamma,
                plain=self.plain,
                ambiguity=self.ambiguity,
                detached=self.detached,
            )
        return found + self.hidden_losses(teacher_hidden, student_hidden) if self.needs_hidden else found

    def hidden_losses(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        """What hidden states add to each token's loss; only if `needs_hidden`."""
        import torch

        from qcli.algorithms.training import losses

        found = torch.zeros(len(student[0]), device=student[0].device)
        if self.hidden_weight:
            found = found + self.hidden_weight * losses.hidden_distance(teacher, student)
        if self.hidden_mse:
            found = found + self.hidden_mse * losses.hidden_error(teacher, student)
        return found
