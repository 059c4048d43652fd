"""Options of knowledge distillation: the text, the loss and the optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from qcli.recipe.texts import AnyText
from qcli.utils.options import Options


class Distillation(Options):
    """Options of knowledge distillation.

    `kl` is plain distillation; `onebit` is the soft cross-entropy and the normalized hidden states of OneBit (arXiv
    2402.11295); `dad` weights ambiguous tokens more, as DB-LLM does (arXiv 2402.11960; the formula is ours).
    """

    data: AnyText | None = Field(
        default=None,
        description="training text, named as in calibration.data; default: the calibration text",
    )
    samples: int | None = Field(default=None, ge=1, description="number of sequences; default: as for calibration")
    seq_len: int | None = Field(default=None, ge=2, description="tokens per sequence; default: as for calibration")
    loss: Literal["kl", "onebit", "dad"] = Field(default="kl", description="loss on the student's predictions")
    temperature: float = Field(default=1.0, gt=0, description="kl: temperature of both predictions")
    gamma: float = Field(default=0.1, ge=0, description="dad: exponent of a token's ambiguity in its weight; 0 is kl")
    ambiguity: Literal["teacher-student", "teacher"] = Field(
        default="teacher-student",
        description="dad: what measures ambiguity: the cross-entropy of teacher and student, or the teacher's entropy",
    )
    detached: bool = Field(default=True, description="dad: no gradient through the token weights")
    plain: float = Field(default=0.1, ge=0, description="dad: weight of the plain kl that is added")
    hidden: float | None = Field(
        default=None,
        ge=0,
        description="weight of the distance of normalized hidden states; default: 1 for onebit, else 0",
    )
    hidden_mse: float = Field(default=0.0, ge=0, description="weight of the relative squared error of hidden states")
    scope: Literal["model", "block"] = Field(
        default="model",
        description="train the whole model, or block by block for models that do not fit in memory: the last block is "
        "trained on predictions, the others on hidden states",
    )
    teacher_top_k: int | None = Field(
        default=None,
        ge=1,
        description="run the teacher once and cache its k most likely tokens and the mass of the others",
    )
    train: tuple[Literal["tables", "weights"], ...] = Field(
        default=("tables",),
        strict=False,
        description="tables: scales, offsets and codebooks; weights: the latent weights behind the codes; biases of "
        "the layers are trained with either",
    )
    steps: int = Field(default=1000, ge=1, description="optimizer steps; with scope block, for each block")
    tables_lr: float = Field(default=2e-3, gt=0, description="learning rate of tables, relative to their magnitude")
    weights_lr: float = Field(default=1e-2, gt=0, description="learning rate of latent weights, in quantization steps")
    warmup: float = Field(
        default=0.05, ge=0, le=1, description="fraction of the steps in which the learning rates rise"
    )
    clip: float = Field(default=1.0, gt=0, description="maximum gradient norm")
    batch_tokens: int = Field(default=2048, ge=1, description="tokens per forward pass")
    accumulate: int = Field(default=1, ge=1, description="gradient accumulation: passes per step")
    checkpointing: bool = Field(
        default=True, description="activation checkpointing: recompute blocks in the backward pass to save memory"
    )
    judgements: int = Field(
        default=20, ge=1, description="number of evaluations on held-out samples, each of which saves the state"
    )
    patience: int | None = Field(default=None, ge=1, description="early-stopping patience, in evaluations")

    @model_validator(mode="after")
    def _consistent(self) -> Distillation:
        if not self.train:
            raise ValueError("train must name tables, weights or both")
        if self.teacher_top_k is not None:
            if self.needs_hidden:
                raise ValueError("teacher_top_k caches no hidden states: set hidden: 0, or leave teacher_top_k out")
            if self.temperature != 1:
                raise ValueError("teacher_top_k caches probabilities at temperature 1 only")
            if self.scope == "block":
                raise ValueError("teacher_top_k needs scope: model; block by block the teacher runs only once anyway")
        return self

    @property
    def hidden_weight(self) -> float:
        """`hidden`, or its default for the loss."""
        return (1.0 if self.loss == "onebit" else 0.0) if self.hidden is None else self.hidden

    @property
    def needs_hidden(self) -> bool:
        """Whether the loss reads hidden states."""
        return self.hidden_weight > 0 or self.hidden_mse > 0
