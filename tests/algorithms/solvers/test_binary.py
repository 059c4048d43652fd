"""Scales of binary planes against what is known to be best."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.algorithms.solvers import binary
from qcli.core.formats.dual_binary import DualBinary, Levels
from qcli.core.formats.sign import Sign
from qcli.core.weight import QuantizedWeight


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def magnitudes(tables: dict[str, Tensor]) -> Tensor:
    return tables["out_scale"].float() * tables["in_scale"].float()


def hessian(inputs: int) -> Tensor:
    x = drawn(6 * inputs, inputs, seed=5) @ (torch.eye(inputs) + 0.2 * drawn(inputs, inputs, seed=6))
    return x.T @ x / len(x)


@pytest.mark.parametrize("seed", range(3))
def test_all_three_decompositions_agree(seed: int) -> None:
    weight = 0.05 * drawn(48, 80, seed=seed)
    found = [magnitudes(binary.sign_value(weight, kind=kind)) for kind in ("power", "svd", "nmf")]
    values = torch.linalg.svdvals(weight.abs())
    best = float(values[1:].square().sum())
    for candidate in found:
        assert float((weight.abs() - candidate).square().sum()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_signs_and_values_beat_the_best_rank_one_matrix(seed: int) -> None:
    """OneBit's proposition: the error is never above that of the best rank-one approximation of W itself."""
    weight = drawn(40, 30, seed=seed) + 0.5 * drawn(40, 1, seed=seed + 9) * drawn(1, 30, seed=seed + 10)
    tables = binary.sign_value(weight)
    error = float((Sign().decode(Sign().encode(weight, tables), tables) - weight).square().sum())
    assert error <= float(torch.linalg.svdvals(weight)[1:].square().sum())


def test_importance_weighs_columns() -> None:
    weight, heavy = drawn(40, 30), torch.logspace(-2, 2, 30)

    def error(tables: dict[str, Tensor]) -> float:
        return float(((weight.abs() - magnitudes(tables)).square() * heavy).sum())

    found = binary.sign_value(weight, heavy)
    assert error(found) < 0.999 * error(binary.sign_value(weight))
    values = torch.linalg.svdvals(weight.abs() * heavy.sqrt())
    assert error(found) == pytest.approx(float(values[1:].square().sum()), rel=1e-3)


def test_refit_of_both_scales_lowers_the_output_error() -> None:
    target, moment = 0.05 * drawn(24, 32), hessian(32)
    tables = binary.sign_value(target)
    given = QuantizedWeight(Sign(), (24, 32), Sign().encode(target, tables), tables)
    found = binary.refit_signs(target, given, Sign(), moment)

    def error(dense: Tensor) -> float:
        return float(((target - dense) @ moment * (target - dense)).sum())

    assert error(found.dense()) < 0.98 * error(given.dense())
    assert torch.equal(found.codes, given.codes)
    scales = {name: table.float() for name, table in found.tables.items()}
    for row in range(24):  # each output scale is the best there is for these input scales
        for step in (0.97, 1.03):
            moved = scales["out_scale"].clone()
            moved[row] *= step
            assert error(Sign().decode(found.codes, scales | {"out_scale": moved})) > 0.9999 * error(found.dense())


@pytest.mark.parametrize(("levels", "at_most"), [("fdb", 0.142), ("symmetric", 0.118)])
def test_gaussian_error_is_near_what_free_pairs_reach(levels: Levels, at_most: float) -> None:
    """The design has .170 for absmax / 2, .149 for the best INT2 scale and .137 for the best free pair of fdb."""
    weight, format = drawn(256, 256), DualBinary(group_size=64, levels=levels)
    tables = binary.dual_binary(weight, format)
    error = (format.decode(format.encode(weight, tables), tables) - weight).square().mean() / weight.square().mean()
    assert float(error) < at_most


def test_alphas_of_fixed_planes_are_least_squares() -> None:
    groups, heavy = drawn(5, 2, 16), torch.rand(1, 2, 16, generator=torch.Generator().manual_seed(1)) + 0.1
    first, second = ((drawn(5, 2, 16, seed=seed) > 0).float() for seed in (2, 3))
    alphas = binary._two_by_two(groups, heavy, first, second)
    for row in range(5):
        for group in range(2):
            root = heavy[0, group].sqrt()
            design = torch.stack([first[row, group], second[row, group]], 1) * root[:, None]
            solved = torch.linalg.lstsq(design, (groups[row, group] * root)[:, None]).solution[:, 0]
            found = torch.stack([alpha[row, group] for alpha in alphas])
            torch.testing.assert_close(found, solved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("levels", ["fdb", "symmetric"])
def test_refit_of_planes_helps_every_row_or_leaves_it(levels: Levels) -> None:
    target, moment, format = 0.05 * drawn(24, 64), hessian(64), DualBinary(group_size=16, levels=levels)
    tables = binary.dual_binary(target, format, moment.diagonal())
    given = QuantizedWeight(format, (24, 64), format.encode(target, tables), tables)
    found, kept = binary.refit_planes(target, given, format, moment)
    found.check()
    assert kept == 0

    def errors(weight: QuantizedWeight) -> Tensor:
        difference = target - weight.dense()
        return (difference @ moment * difference).sum(1)

    assert bool((errors(found) <= errors(given)).all())
    assert float(errors(found).sum()) < 0.95 * float(errors(given).sum())


def test_weights_of_zeros_are_exact() -> None:
    weight, format = torch.zeros(3, 32), DualBinary(group_size=16)
    tables = binary.dual_binary(weight, format)
    found = QuantizedWeight(format, (3, 32), format.encode(weight, tables), tables)
    found.check()
    assert not found.dense().any()
    signs = binary.sign_value(weight)
    assert all(bool(table.isfinite().all()) for table in signs.values())
    assert not Sign().decode(Sign().encode(weight, signs), signs).any()
