"""Losses against their definitions."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from qcli.algorithms.training import losses
from qcli.algorithms.training.losses import (
    deviation_aware,
    kl_divergence,
    log_probs_with_remainder,
    normalized_hidden_error,
    relative_hidden_error,
    relative_token_error,
    soft_cross_entropy,
    token_norms,
)
from tests.algorithms.tensors import normal

TOKENS, VOCABULARY = 6, 11


TEACHER, STUDENT = (2 * normal(TOKENS, VOCABULARY, seed=seed) for seed in (1, 2))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_divergence(temperature: float) -> None:
    p, q = ((logits / temperature).softmax(-1) for logits in (TEACHER, STUDENT))
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl_divergence(TEACHER, STUDENT, temperature), expected)
    torch.testing.assert_close(kl_divergence(TEACHER, TEACHER), torch.zeros(TOKENS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("part", [1, 3 * VOCABULARY, 1 << 20])
def test_gradients_of_logits_are_those_of_the_definition(
    part: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of tokens at a time."""
    monkeypatch.setitem(losses.LOGITS_AT_ONCE, "cpu", part)
    scale = normal(TOKENS, seed=3)
    found, expected = (STUDENT.clone().requires_grad_() for _ in range(2))
    kl = kl_divergence(TEACHER, found, temperature)
    p, q = ((logits / temperature).softmax(-1) for logits in (TEACHER, expected))
    definition = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl, definition)
    ((kl + soft_cross_entropy(TEACHER, found)) * scale).sum().backward()
    (definition * scale).sum().backward()
    (-(TEACHER.softmax(-1) * expected.log_softmax(-1)).sum(-1) * scale).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_logits_of_16_bits_are_scored_in_float32() -> None:
    teacher, student = (logits.bfloat16() for logits in (TEACHER, STUDENT))
    student.requires_grad_()
    kl = kl_divergence(teacher, student)
    torch.testing.assert_close(kl, kl_divergence(teacher.float(), student.detach().float()))
    kl.sum().backward()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        student.grad.float(), student.float().softmax(-1) - teacher.float().softmax(-1), rtol=0.01, atol=1e-3
    )


def test_soft_cross_entropy_is_kl_plus_the_teachers_entropy() -> None:
    entropy = soft_cross_entropy(TEACHER, TEACHER)
    torch.testing.assert_close(soft_cross_entropy(TEACHER, STUDENT), kl_divergence(TEACHER, STUDENT) + entropy)


def test_deviation_aware_with_gamma_0_is_plain_distillation() -> None:
    loss = deviation_aware(TEACHER, STUDENT, gamma=0.0, plain=0.0)
    torch.testing.assert_close(loss, kl_divergence(TEACHER, STUDENT))


@pytest.mark.parametrize("ambiguity", ["teacher-student", "teacher"])
def test_deviation_aware_weights_ambiguous_tokens_more(ambiguity: Literal["teacher-student", "teacher"]) -> None:
    kl = kl_divergence(TEACHER, STUDENT)
    c = soft_cross_entropy(TEACHER, TEACHER if ambiguity == "teacher" else STUDENT)
    loss = deviation_aware(TEACHER, STUDENT, gamma=0.5, plain=0.1, ambiguity=ambiguity)
    torch.testing.assert_close(loss, (c / c.mean()).sqrt() * kl + 0.1 * kl)


def test_deviation_aware_weights_pass_gradients_only_if_not_detached() -> None:
    gradients = []
    for detached in (True, False):
        student = STUDENT.clone().requires_grad_()
        deviation_aware(TEACHER, student, gamma=1.0, plain=0.0, detached=detached).mean().backward()
        assert student.grad is not None
        gradients.append(student.grad)
    entropy = soft_cross_entropy(TEACHER, STUDENT)
    weights = (entropy / entropy.mean())[:, None]
    expected = weights * (STUDENT.softmax(-1) - TEACHER.softmax(-1)) / TOKENS
    torch.testing.assert_close(gradients[0], expected)
    assert not torch.allclose(gradients[1], expected)


def test_hidden_errors() -> None:
    teacher, student = ([normal(TOKENS, 5, seed=seed + layer) for layer in range(3)] for seed in (10, 20))
    normalized, relative = torch.zeros(TOKENS), torch.zeros(TOKENS)
    for targets, outputs in zip(teacher, student, strict=True):
        for token in range(TOKENS):
            t, s = targets[token], outputs[token]
            normalized[token] += (t / t.norm() - s / s.norm()).square().sum()
            relative[token] += (t - s).square().sum() / t.square().sum()
    torch.testing.assert_close(normalized_hidden_error(teacher, student), normalized)
    torch.testing.assert_close(relative_hidden_error(teacher, student), relative)
    scaled = [3 * hidden for hidden in teacher]
    torch.testing.assert_close(normalized_hidden_error(teacher, scaled), torch.zeros(TOKENS), rtol=0, atol=1e-6)


def test_token_error_is_relative_to_the_norm_but_less_so_above_the_median() -> None:
    """A token ten times larger than the median counts ten times as much as under `|y|^2`."""
    targets, outputs = normal(3, 4, 5, seed=30), normal(3, 4, 5, seed=31)
    targets[1, 2] *= 10
    norms = targets.norm(dim=-1)
    torch.testing.assert_close(token_norms(targets.double()), norms)
    median = norms.median()
    expected = (outputs - targets).square().sum(-1) / (norms * norms.clamp(max=float(median)))
    torch.testing.assert_close(relative_token_error(outputs, targets, median), expected)


def test_log_probs_with_remainder() -> None:
    classes = TEACHER.topk(4).indices
    probabilities = log_probs_with_remainder(STUDENT, classes).exp()
    p = STUDENT.softmax(-1)
    torch.testing.assert_close(probabilities[:, :4], p.gather(-1, classes))
    torch.testing.assert_close(probabilities[:, 4], 1 - p.gather(-1, classes).sum(-1))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(TOKENS))
