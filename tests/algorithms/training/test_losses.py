"""Distillation losses against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.algorithms.training.losses import (
    cross_entropy,
    deviation_aware,
    hidden_distance,
    hidden_error,
    kl_divergence,
    listed,
)

TOKENS, VOCABULARY = 6, 11


def drawn(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEACHER, STUDENT = drawn(TOKENS, VOCABULARY, seed=1), drawn(TOKENS, VOCABULARY, seed=2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_its_definition(temperature: float) -> None:
    p, q = ((logits / temperature).softmax(-1) for logits in (TEACHER, STUDENT))
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl_divergence(TEACHER, STUDENT, temperature), expected)
    torch.testing.assert_close(kl_divergence(TEACHER, TEACHER), torch.zeros(TOKENS), rtol=0, atol=1e-6)


def test_soft_cross_entropy_is_kl_and_the_teachers_entropy() -> None:
    entropy = cross_entropy(TEACHER, TEACHER)
    torch.testing.assert_close(cross_entropy(TEACHER, STUDENT), kl_divergence(TEACHER, STUDENT) + entropy)


def test_no_gamma_is_plain_distillation() -> None:
    found = deviation_aware(TEACHER, STUDENT, gamma=0.0, plain=0.0)
    torch.testing.assert_close(found, kl_divergence(TEACHER, STUDENT))


@pytest.mark.parametrize("ambiguity", ["teacher-student", "teacher"])
def test_ambiguous_tokens_count_more(ambiguity: str) -> None:
    kl, c = kl_divergence(TEACHER, STUDENT), cross_entropy(TEACHER, STUDENT if ambiguity != "teacher" else TEACHER)
    found = deviation_aware(TEACHER, STUDENT, gamma=0.5, plain=0.1, ambiguity=ambiguity)  # type: ignore[arg-type]
    torch.testing.assert_close(found, (c / c.mean()).sqrt() * kl + 0.1 * kl)


def test_weights_pass_a_gradient_only_when_asked_to() -> None:
    gradients = []
    for detached in (True, False):
        student = STUDENT.clone().requires_grad_()
        deviation_aware(TEACHER, student, gamma=1.0, plain=0.0, detached=detached).mean().backward()
        assert student.grad is not None
        gradients.append(student.grad)
    entropy = cross_entropy(TEACHER, STUDENT)
    weights = (entropy / entropy.mean())[:, None]
    by_hand = weights * (STUDENT.softmax(-1) - TEACHER.softmax(-1)) / TOKENS
    torch.testing.assert_close(gradients[0], by_hand)
    assert not torch.allclose(gradients[1], by_hand)


def test_hidden_losses_are_their_definitions() -> None:
    teacher, student = ([drawn(TOKENS, 5, seed=seed + n) for n in range(3)] for seed in (10, 20))
    distance, error = torch.zeros(TOKENS), torch.zeros(TOKENS)
    for wanted, found in zip(teacher, student, strict=True):
        for token in range(TOKENS):
            t, s = wanted[token], found[token]
            distance[token] += (t / t.norm() - s / s.norm()).square().sum()
            error[token] += (t - s).square().sum() / t.square().sum()
    torch.testing.assert_close(hidden_distance(teacher, student), distance)
    torch.testing.assert_close(hidden_error(teacher, student), error)
    scaled = [3 * found for found in teacher]
    torch.testing.assert_close(hidden_distance(teacher, scaled), torch.zeros(TOKENS), rtol=0, atol=1e-6)


def test_listed_tokens_and_the_rest() -> None:
    classes = TEACHER.topk(4).indices
    found = listed(STUDENT, classes).exp()
    p = STUDENT.softmax(-1)
    torch.testing.assert_close(found[:, :4], p.gather(-1, classes))
    torch.testing.assert_close(found[:, 4], 1 - p.gather(-1, classes).sum(-1))
    torch.testing.assert_close(found.sum(-1), torch.ones(TOKENS))
