"""A group of layers with inputs, and the output error of a method on it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method


class Case(NamedTuple):
    """Two layers, and the inputs `[tokens, in]` that their statistics are of."""

    group: LinearGroup
    inputs: Tensor
    quantized_inputs: Tensor


@pytest.fixture(scope="module")
def case() -> Case:
    """Correlated inputs of unequal energy; those of the quantized model are noisy."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 96, generator=generator) * (0.2 + 3 * torch.rand(96, generator=generator))
    x = torch.randn(1500, 96, generator=generator) @ mixing / 10
    noisy = x + 0.15 * torch.randn(1500, 96, generator=generator)
    weights = {
        "a": torch.randn(64, 96, generator=generator) * 0.04,
        "b": torch.randn(48, 96, generator=generator) * 0.04,
    }
    return Case(LinearGroup(weights, noisy.T @ noisy / 1500, x.T @ noisy / 1500), x, noisy)


def output_loss(method: Method, case: Case) -> float:
    """Squared error of the full-precision outputs on the quantized model's inputs; asserts that no step fell back."""
    solutions = method.quantize(case.group)
    total = 0.0
    for name, weight in case.group.weights.items():
        solution = solutions[name]
        solution.weight.check()
        assert solution.fallbacks == []
        error = case.inputs @ weight.T - case.quantized_inputs @ solution.weight.dense().T
        total += float(error.square().sum())
    return total
