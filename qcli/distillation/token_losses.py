"""The training loss of each token, as the options of distillation define it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcli.algorithms.training import losses
from qcli.recipe.distillation import Distillation


def token_losses(
    options: Distillation,
    teacher: Tensor,
    student: Tensor,
    teacher_hidden: Sequence[Tensor] = (),
    student_hidden: Sequence[Tensor] = (),
) -> Tensor:
    """Losses on predictions and hidden states, float32 `[tokens]`.

    Args:
        teacher, student: logits `[tokens, vocabulary]`.
        teacher_hidden, student_hidden: `[tokens, hidden]` after each block; only if `options.needs_hidden`.
    """
    if options.loss == "kl":
        result = losses.kl_divergence(teacher, student, options.temperature)
    elif options.loss == "onebit":
        result = losses.soft_cross_entropy(teacher, student)
    else:
        result = losses.deviation_aware(
            teacher,
            student,
            gamma=options.gamma,
            plain=options.plain,
            ambiguity=options.ambiguity,
            detached=options.detached,
        )
    return result + hidden_losses(options, teacher_hidden, student_hidden) if options.needs_hidden else result


def hidden_losses(options: Distillation, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Losses on hidden states, float32 `[tokens]`; only if `options.needs_hidden`.

    Args:
        teacher, student: `[tokens, hidden]` after each block.
    """
    result = torch.zeros(len(student[0]), device=student[0].device)
    if options.hidden_weight:
        result = result + options.hidden_weight * losses.normalized_hidden_error(teacher, student)
    if options.hidden_mse:
        result = result + options.hidden_mse * losses.relative_hidden_error(teacher, student)
    return result
