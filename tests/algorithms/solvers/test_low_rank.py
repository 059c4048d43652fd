"""Low-rank factors against the SVD, the optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.algorithms.solvers.low_rank import fit_factors, leading_directions
from qcli.algorithms.solvers.output_error import output_error
from qcli.core.formats.affine import Affine
from qcli.core.formats.low_rank import FactorBits, LowRank
from tests.algorithms.tensors import normal

BASE = Affine(bits=3, group_size=16, zero_point="integer")


def correlated(inputs: int) -> Tensor:
    """The Hessian of correlated inputs of unequal energy, as those of a layer are."""
    x = normal(4 * inputs, inputs, seed=1) * torch.logspace(-1.5, 1, inputs) @ normal(inputs, inputs, seed=2)
    return x.T @ x / len(x)


def remaining(error: Tensor, hessian: Tensor | None, rank: int, bits: FactorBits = 16) -> float:
    """The output error that is left with factors of this rank."""
    format = LowRank.around(BASE, rank, bits)
    return output_error(error - format.product(fit_factors(error, hessian, format)), hessian)


def optimum(error: Tensor, hessian: Tensor, rank: int) -> float:
    """The singular values of `E L` beyond the rank: no factors leave less."""
    values, vectors = torch.linalg.eigh(hessian.double())
    singular = torch.linalg.svdvals(error.double() @ (vectors * values.clamp(min=0).sqrt()))
    return float(singular[rank:].square().sum())


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (300, 260)], ids=str)
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_reach_the_optimum(shape: tuple[int, int], rank: int) -> None:
    """(300, 260) is larger than what the iteration solves exactly."""
    error, hessian, identity = normal(*shape) * 0.01, correlated(shape[1]), torch.eye(shape[1])
    assert remaining(error, hessian, rank) == pytest.approx(optimum(error, hessian, rank), rel=1e-3)
    plain = remaining(error, identity, rank)
    assert plain == pytest.approx(optimum(error, identity, rank), rel=1e-3)
    assert remaining(error, None, rank) == pytest.approx(plain)


def test_no_neighbouring_factors_are_better() -> None:
    error, hessian, format = normal(20, 24) * 0.1, correlated(24), LowRank.around(BASE, 3, 16)
    tables = fit_factors(error, hessian, format)
    a, b = format.factor("a", tables), format.factor("b", tables)
    best = output_error(error - a @ b, hessian)
    for seed in range(50):
        for size in (1e-2, 1e-1):
            other_a = a + size * a.abs().mean() * normal(20, 3, seed=seed)
            other_b = b + size * b.abs().mean() * normal(3, 24, seed=100 + seed)
            assert output_error(error - other_a @ other_b, hessian) > best


def test_weighting_and_rank_help_and_8_bits_cost_little() -> None:
    error, hessian = normal(64, 48) * 0.01, correlated(48)
    weighted = [remaining(error, hessian, rank) for rank in (1, 2, 4, 8, 16)]
    assert weighted == sorted(weighted, reverse=True)
    assert weighted[0] < output_error(error, hessian)
    format = LowRank.around(BASE, 8, 16)
    plain = output_error(error - format.product(fit_factors(error, None, format)), hessian)
    assert weighted[3] < 0.8 * plain
    assert weighted[3] < remaining(error, hessian, 8, bits=8) < 1.01 * weighted[3]


def test_dead_inputs_make_a_singular_hessian() -> None:
    error, hessian = normal(24, 20) * 0.01, correlated(20)
    hessian[3], hessian[:, 3] = 0, 0
    assert remaining(error, hessian, 4, bits=8) < output_error(error, hessian)


def test_errors_of_lower_rank_than_the_factors() -> None:
    hessian = correlated(20)
    error = normal(24, 2) @ normal(2, 20, seed=3)
    assert remaining(error, hessian, 4) < 1e-5 * output_error(error, hessian)
    assert remaining(torch.zeros(24, 20), hessian, 4, bits=8) == 0


def test_a_huge_outlier_channel() -> None:
    error, hessian = normal(24, 20) * 0.01, correlated(20)
    hessian[5, 5] += 1e6 * float(hessian.diagonal().mean())
    directions, exact = leading_directions(error, hessian, 4), error.double()
    left = output_error(exact - directions @ (directions.T @ exact), hessian.double())
    assert left == pytest.approx(optimum(error, hessian, 4), rel=1e-6)
    assert remaining(error, hessian, 4, bits=8) < 1e-3 * output_error(error, hessian)


def test_directions_are_deterministic_and_leave_the_global_random_state_alone() -> None:
    error, state = normal(300, 40), torch.random.get_rng_state()
    first = leading_directions(error, None, 4)
    assert torch.equal(first, leading_directions(error, None, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(first.T @ first, torch.eye(4, dtype=torch.float64))
