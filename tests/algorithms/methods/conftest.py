"""A layer's own objective."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method

Case = tuple[LinearGroup, Tensor, Tensor]


@pytest.fixture(scope="module")
def case() -> Case:
    """Two linears on correlated inputs, full-precision and noisy."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=generator) * (0.2 + 3 * torch.rand(96, generator=generator))
    x = torch.randn(1500, 96, generator=generator) @ mix / 10
    noisy = x + 0.15 * torch.randn(1500, 96, generator=generator)
    weights = {
        "a": torch.randn(64, 96, generator=generator) * 0.04,
        "b": torch.randn(48, 96, generator=generator) * 0.04,
    }
    return LinearGroup(weights, noisy.T @ noisy / 1500, x.T @ noisy / 1500), x, noisy


def loss(method: Method, case: Case) -> float:
    """Squared error of the outputs on the inputs the layers will get; no step may have failed."""
    group, x, noisy = case
    solutions = method.quantize(group)
    total = 0.0
    for name, weight in group.weights.items():
        solution = solutions[name]
        solution.weight.check()
        assert solution.fallbacks == []
        total += float((x @ weight.T - noisy @ solution.weight.dense().T).square().sum())
    return total
