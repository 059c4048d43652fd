"""Scales of two binary planes against brute force and published figures."""

from __future__ import annotations

import pytest
import torch

from qcli.algorithms.solvers import dual_binary
from qcli.algorithms.solvers.output_error import row_output_errors
from qcli.core.formats.dual_binary import DualBinary, Levels
from qcli.core.weight import QuantizedWeight
from tests.algorithms.tensors import normal


@pytest.mark.parametrize(("levels", "bound"), [("fdb", 0.142), ("symmetric", 0.118)])
def test_gaussian_error_is_near_that_of_the_best_pair(levels: Levels, bound: float) -> None:
    """Relative squared error of fdb: 0.170 for `absmax / 2`, 0.149 for the best INT2 scale, 0.137 for the best pair."""
    weight, format = normal(256, 256), DualBinary(group_size=64, levels=levels)
    tables = dual_binary.fit(weight, format)
    error = (format.decode(format.encode(weight, tables), tables) - weight).square().mean() / weight.square().mean()
    assert float(error) < bound


def test_alphas_at_fixed_planes_are_least_squares() -> None:
    groups, importance = normal(5, 2, 16), torch.rand(1, 2, 16, generator=torch.Generator().manual_seed(1)) + 0.1
    first, second = ((normal(5, 2, 16, seed=seed) > 0).float() for seed in (2, 3))
    alphas = dual_binary._fit_groups(groups, importance, first, second)
    for row in range(5):
        for group in range(2):
            root = importance[0, group].sqrt()
            design = torch.stack([first[row, group], second[row, group]], 1) * root[:, None]
            expected = torch.linalg.lstsq(design, (groups[row, group] * root)[:, None]).solution[:, 0]
            actual = torch.stack([alpha[row, group] for alpha in alphas])
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("levels", ["fdb", "symmetric"])
def test_refit_improves_every_row_or_leaves_it(levels: Levels) -> None:
    target, format = 0.05 * normal(24, 64), DualBinary(group_size=16, levels=levels)
    x = normal(384, 64, seed=5) @ (torch.eye(64) + 0.2 * normal(64, 64, seed=6))
    hessian = x.T @ x / len(x)
    tables = dual_binary.fit(target, format, hessian.diagonal())
    before = QuantizedWeight(format, (24, 64), format.encode(target, tables), tables)
    after, unusable = dual_binary.refit(target, before, format, hessian)
    after.check()
    assert unusable == 0
    old, new = (row_output_errors(target - weight.dense(), hessian) for weight in (before, after))
    assert bool((new <= old).all())
    assert float(new.sum()) < 0.95 * float(old.sum())


def test_zeros_are_exact() -> None:
    weight, format = torch.zeros(3, 32), DualBinary(group_size=16)
    tables = dual_binary.fit(weight, format)
    quantized = QuantizedWeight(format, (3, 32), format.encode(weight, tables), tables)
    quantized.check()
    assert not quantized.dense().any()
