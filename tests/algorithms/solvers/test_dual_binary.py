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


def test_the_published_split_and_its_planes() -> None:
    """Levels -s, 0, s, 2s with s half of the largest magnitude; the zeros of its planes and its error on Gaussians, in
    groups of 64, as the paper's split gives them: 0.74 and 0.51, 0.170; the searched start needs more additions."""
    weight, format = normal(256, 256), DualBinary(group_size=64)
    tables = dual_binary.published(weight, format)
    codes = format.encode(weight, tables)
    for row in range(0, 256, 37):
        for group in range(4):
            values = weight[row, 64 * group : 64 * group + 64]
            s = float(values.abs().max()) / 2
            levels = torch.tensor([-s, 0.0, s, 2 * s])
            nearest = levels[(values[:, None] - levels).abs().argmin(1)]
            decoded = format.decode(codes, tables)[row, 64 * group : 64 * group + 64]
            torch.testing.assert_close(decoded, nearest, rtol=1e-3, atol=1e-6)
    quantized = QuantizedWeight(format, (256, 256), codes, tables)
    quantized.check()
    facts = format.facts(quantized)
    assert facts["zeros_plane1"] == pytest.approx(0.74, abs=0.02)
    assert facts["zeros_plane2"] == pytest.approx(0.51, abs=0.03)
    error = (quantized.dense() - weight).square().mean() / weight.square().mean()
    assert float(error) == pytest.approx(0.170, abs=0.01)
    searched = dual_binary.fit(weight, format)
    fitted = QuantizedWeight(format, (256, 256), format.encode(weight, searched), searched)
    assert format.facts(fitted)["additions_per_weight"] > facts["additions_per_weight"] + 0.1


def test_the_published_split_of_zeros_and_ragged_groups() -> None:
    weight, format = torch.cat([torch.zeros(1, 24), -normal(1, 24).abs()]), DualBinary(group_size=16)
    tables = dual_binary.published(weight, format)
    quantized = QuantizedWeight(format, (2, 24), format.encode(weight, tables), tables)
    quantized.check()
    assert not quantized.dense()[0].any()
    torch.testing.assert_close(tables["alpha1"][1, 1], weight[1, 16:].abs().max().half())


def test_alphas_at_fixed_planes_are_least_squares() -> None:
    groups, importance = normal(2, 16, 5), torch.rand(2, 1, 16, generator=torch.Generator().manual_seed(1)) + 0.1
    first, second = ((normal(2, 16, 5, seed=seed) > 0).float() for seed in (2, 3))
    alphas = dual_binary._fit_groups(groups, importance, first, second)
    for row in range(5):
        for group in range(2):
            root = importance[group, 0].sqrt()
            design = torch.stack([first[group, :, row], second[group, :, row]], 1) * root[:, None]
            expected = torch.linalg.lstsq(design, (groups[group, :, row] * root)[:, None]).solution[:, 0]
            actual = torch.stack([alpha[group, row] for alpha in alphas])
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
