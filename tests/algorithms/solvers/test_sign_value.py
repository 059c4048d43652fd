"""Sign-value decomposition against the known optimum, and the refit of its scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.algorithms.solvers import sign_value
from qcli.algorithms.solvers.output_error import output_error
from qcli.core.formats.sign import Sign
from qcli.core.weight import QuantizedWeight
from tests.algorithms.tensors import normal


def magnitudes(tables: dict[str, Tensor]) -> Tensor:
    return tables["out_scale"].float() * tables["in_scale"].float()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["power", "svd", "nmf"])
def test_every_decomposition_reaches_the_optimum(kind: sign_value.SVID, seed: int) -> None:
    weight = 0.05 * normal(48, 80, seed=seed)
    error = float((weight.abs() - magnitudes(sign_value.decompose(weight, kind=kind))).square().sum())
    optimum = float(torch.linalg.svdvals(weight.abs())[1:].square().sum())
    assert error == pytest.approx(optimum, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_signs_and_values_beat_the_best_rank_one_matrix(seed: int) -> None:
    """OneBit's proposition: the error is never above that of the best rank-one approximation of W itself."""
    weight = normal(40, 30, seed=seed) + 0.5 * normal(40, 1, seed=seed + 9) * normal(1, 30, seed=seed + 10)
    tables = sign_value.decompose(weight)
    error = float((Sign().decode(Sign().encode(weight, tables), tables) - weight).square().sum())
    assert error <= float(torch.linalg.svdvals(weight)[1:].square().sum())


def test_importance_weights_columns() -> None:
    weight, importance = normal(40, 30), torch.logspace(-2, 2, 30)

    def error(tables: dict[str, Tensor]) -> float:
        return float(((weight.abs() - magnitudes(tables)).square() * importance).sum())

    weighted = sign_value.decompose(weight, importance)
    assert error(weighted) < 0.999 * error(sign_value.decompose(weight))
    values = torch.linalg.svdvals(weight.abs() * importance.sqrt())
    assert error(weighted) == pytest.approx(float(values[1:].square().sum()), rel=1e-3)


def test_refit_lowers_the_output_error() -> None:
    target = 0.05 * normal(24, 32)
    x = normal(192, 32, seed=5) @ (torch.eye(32) + 0.2 * normal(32, 32, seed=6))
    hessian = x.T @ x / len(x)
    tables = sign_value.decompose(target)
    before = QuantizedWeight(Sign(), (24, 32), Sign().encode(target, tables), tables)
    after = sign_value.refit(target, before, Sign(), hessian)

    def error(dense: Tensor) -> float:
        return output_error(target - dense, hessian)

    assert error(after.dense()) < 0.98 * error(before.dense())
    assert torch.equal(after.codes, before.codes)
    scales = {name: table.float() for name, table in after.tables.items()}
    for row in range(24):  # each output scale is the best for these input scales
        for step in (0.97, 1.03):
            moved = scales["out_scale"].clone()
            moved[row] *= step
            assert error(Sign().decode(after.codes, scales | {"out_scale": moved})) > 0.9999 * error(after.dense())


def test_zeros_are_exact() -> None:
    weight = torch.zeros(3, 32)
    tables = sign_value.decompose(weight)
    assert all(bool(table.isfinite().all()) for table in tables.values())
    assert not Sign().decode(Sign().encode(weight, tables), tables).any()
