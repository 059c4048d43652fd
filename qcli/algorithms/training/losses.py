"""Losses of gradient training, one number per token: student logits or hidden states against the teacher's.

Shapes: logits `[tokens, vocabulary]`, hidden states `[tokens, hidden]`, results float32 `[tokens]`. Arithmetic is
float32 whatever the dtype of the inputs; the caller averages over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 25}  # in the processor's cache; few launches and about 1 GB


def log_probs_with_remainder(logits: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities of `classes`, and last the log of the total probability of all other tokens.

    Args:
        logits: `[tokens, vocabulary]`.
        classes: int64 `[tokens, classes]`, distinct, fewer than the vocabulary has.

    Returns:
        float32 `[tokens, classes + 1]`; every row is a normalized distribution.
    """
    logits = logits.float()
    remainder = logits.scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, classes), remainder], dim=-1) - logits.logsumexp(-1, keepdim=True)


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(p_teacher || p_student)` in nats, both softened by the temperature T; differentiable in the student's.

    The factor T^2 keeps the gradient's magnitude independent of T (Hinton et al., arXiv 1503.02531, section 2).
    """
    return _divergence(teacher, student, temperature, relative=True)


def soft_cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """`-sum_v p_teacher log p_student` in nats: the logits term of OneBit's loss (arXiv 2402.11295), temperature 1;
    differentiable in the student's."""
    return _divergence(teacher, student, 1.0, relative=False)


def _divergence(teacher: Tensor, student: Tensor, temperature: float, *, relative: bool) -> Tensor:
    result: Tensor = _Divergence.apply(teacher, student, temperature, relative)  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    """KL divergence (`relative`) or cross-entropy, whose gradients are both `p_student - p_teacher`: made in the
    forward pass, some tokens at a time, so that logits are read once and nothing else of their size exists."""

    @staticmethod
    def forward(context: Any, teacher: Tensor, student: Tensor, temperature: float, relative: bool) -> Tensor:
        result = torch.empty(len(student), device=student.device)
        gradient = torch.empty_like(student) if context.needs_input_grad[1] else None
        for part in _parts(student):
            target, own = (_log_probs(logits[part], temperature) for logits in (teacher, student))
            probabilities = target.exp()
            terms = target.sub_(own) if relative else -own
            torch.sum(terms.mul_(probabilities), -1, out=result[part])
            if gradient is not None:
                torch.sub(own.exp_(), probabilities, out=gradient[part])
        context.save_for_backward(gradient)
        context.temperature = temperature
        return result.mul_(temperature**2) if temperature != 1 else result

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        (own,), (of_loss,) = context.saved_tensors, gradients
        factor = of_loss[:, None] * context.temperature
        for part in _parts(own):  # a CPU makes float32 copies of both sides of a product of two dtypes
            own[part] *= factor[part]  # in place: torch would refuse a second backward pass
        return None, own, None, None


def _parts(logits: Tensor) -> Iterator[slice]:
    """Tokens of `[tokens, vocabulary]`, some at a time."""
    step = max(1, LOGITS_AT_ONCE[logits.device.type] // logits.shape[1])
    return (slice(first, first + step) for first in range(0, len(logits), step))


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Float32, a tensor of its own."""
    return (logits if temperature == 1 else logits.float() / temperature).log_softmax(-1, dtype=torch.float32)


def deviation_aware(
    teacher: Tensor,
    student: Tensor,
    *,
    gamma: float,
    plain: float,
    ambiguity: Literal["teacher-student", "teacher"] = "teacher-student",
    detached: bool = True,
) -> Tensor:
    """KL divergence that weights tokens by their ambiguity: DB-LLM's deviation-aware distillation (arXiv 2402.11960).

    `w_t KL_t + plain KL_t` with `w_t = (c_t / mean_t c_t)^gamma`, where `c_t` is the cross-entropy
    `-sum_v p_teacher log p_student` or the teacher's own entropy. The paper weights by teacher-student entropy; this
    formula is ours. `gamma = 0` is the control: plain KL times `1 + plain`.

    Args:
        teacher, student: logits of one batch; the mean of `c` is taken over it.
        gamma: exponent of the weights.
        plain: coefficient of the unweighted KL.
        ambiguity: what `c_t` is, cross-entropy or the teacher's entropy.
        detached: treat the weights as constants; otherwise gradients flow through the numerator `c_t`.
    """
    kl = kl_divergence(teacher, student)
    entropy = soft_cross_entropy(teacher, teacher if ambiguity == "teacher" else student)
    if detached:
        entropy = entropy.detach()
    return (entropy / entropy.detach().mean().clamp(min=1e-12)).pow(gamma) * kl + plain * kl


def normalized_hidden_error(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """`sum_layers || q_T / |q_T| - q_S / |q_S| ||^2`: the hidden-state term of OneBit's loss (arXiv 2402.11295)."""
    errors = [
        (F.normalize(target.float(), dim=-1) - F.normalize(output.float(), dim=-1)).square().sum(-1)
        for target, output in zip(teacher, student, strict=True)
    ]
    return torch.stack(errors).sum(0)


def relative_hidden_error(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """`sum_layers |q_T - q_S|^2 / |q_T|^2` (ours)."""
    errors = [
        (target.float() - output.float()).square().sum(-1) / target.float().square().sum(-1).clamp(min=1e-12)
        for target, output in zip(teacher, student, strict=True)
    ]
    return torch.stack(errors).sum(0)


def relative_token_error(outputs: Tensor, targets: Tensor, median_norm: Tensor) -> Tensor:
    """Squared error relative to the target's size, `|y - y_hat|^2 / (|y| min(|y|, m))` (ours).

    A few tokens have outputs a hundred times larger than the others, and all later tokens attend to them. Divided by
    `|y|^2`, their error weighs so little that training ruins them; divided by `m^2`, nothing else counts.

    Args:
        outputs, targets: `[..., hidden]`, `y_hat` and `y`.
        median_norm: scalar `m`, the median of `|y|` over the training tokens.

    Returns:
        float32 `[...]`.
    """
    norm = token_norms(targets)
    return (outputs.float() - targets.float()).square().sum(-1) / (norm * norm.minimum(median_norm)).clamp(min=1e-12)


def token_norms(outputs: Tensor) -> Tensor:
    """Euclidean norm of each token's vector: `[..., hidden]` -> float32 `[...]`."""
    return outputs.float().square().sum(-1).sqrt()
