"""What a student is asked for, token by token: the teacher's predictions, and hidden states like the teacher's.

All take logits `[tokens, vocabulary]` or hidden states `[tokens, hidden]` and give one number a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def listed(logits: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities of some tokens and of all others together: `[tokens, vocabulary]` -> `[tokens, classes + 1]`.

    Args:
        classes: int64 `[tokens, classes]`, fewer than the vocabulary has.
    """
    logits = logits.float()
    others = logits.scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, classes), others], dim=-1) - logits.logsumexp(-1, keepdim=True)


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(teacher || student)` of predictions at temperature T, nats: the factor keeps the size of its gradient."""
    wanted, found = (logits.float().div(temperature).log_softmax(-1) for logits in (teacher, student))
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1) * temperature**2


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """`-sum p_teacher log p_student`, nats: the first term of OneBit's loss (arXiv 2402.11295), at temperature 1."""
    return -(teacher.float().softmax(-1) * student.float().log_softmax(-1)).sum(-1)


def deviation_aware(
    teacher: Tensor,
    student: Tensor,
    *,
    gamma: float,
    plain: float,
    ambiguity: Literal["teacher-student", "teacher"] = "teacher-student",
    detached: bool = True,
) -> Tensor:
    """KL that counts more where predictions are ambiguous (DB-LLM's DAD, arXiv 2402.11960; the formula is ours).

    `w_t KL_t + plain KL_t`, `w_t = (c_t / mean c)^gamma` with the entropy `c_t = -sum p_teacher log p_student`
    (`teacher`: of the teacher alone). `gamma = 0` is plain distillation, the control.

    Args:
        detached: whether no gradient passes through the weights.
    """
    kl = kl_divergence(teacher, student)
    entropy = cross_entropy(teacher, teacher if ambiguity == "teacher" else student)
    if detached:
        entropy = entropy.detach()
    return (entropy / entropy.detach().mean().clamp(min=1e-12)).pow(gamma) * kl + plain * kl


def hidden_distance(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """`sum over layers |q_T / |q_T| - q_S / |q_S||^2`: the second term of OneBit's loss."""
    distances = [
        (F.normalize(wanted.float(), dim=-1) - F.normalize(found.float(), dim=-1)).square().sum(-1)
        for wanted, found in zip(teacher, student, strict=True)
    ]
    return torch.stack(distances).sum(0)


def hidden_error(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Squared errors of hidden states relative to the teacher's size, summed over layers."""
    errors = [
        (wanted.float() - found.float()).square().sum(-1) / wanted.float().square().sum(-1).clamp(min=1e-12)
        for wanted, found in zip(teacher, student, strict=True)
    ]
    return torch.stack(errors).sum(0)


def token_errors(outputs: Tensor, targets: Tensor, median: Tensor) -> Tensor:
    """Relative squared error of each token, `|y - y^|^2 / (|y| min(|y|, m))`, `m` the median of `|y|` (ours).

    The few tokens whose outputs are a hundred times the others' size carry the attention of all that follow. Relative
    to `|y|^2` they count for nothing, and training ruins them; relative to `m^2` nothing else counts.

    Args:
        outputs, targets: `[..., hidden]`.
    """
    length = token_lengths(targets)
    return (outputs.float() - targets.float()).square().sum(-1) / (length * length.minimum(median)).clamp(min=1e-12)


def token_lengths(outputs: Tensor) -> Tensor:
    """`|y|` of each token, float32."""
    return outputs.float().square().sum(-1).sqrt()
