"""Low-rank compensation of the solutions of a method."""

from __future__ import annotations

import pytest
import torch

from qcli.algorithms.layer_group import HESSIAN, LinearGroup
from qcli.algorithms.low_rank import LowRankCompensation
from qcli.algorithms.method import Method, Solution
from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.rtn import RTN
from qcli.algorithms.solvers.output_error import output_error
from qcli.core.weight import QuantizedWeight
from qcli.utils.errors import VerificationError
from tests.algorithms.tensors import normal


def solve(method: Method) -> tuple[LinearGroup, dict[str, Solution]]:
    """Two layers with one input, and their solutions; the inputs of the quantized model differ from the original."""
    x = normal(192, 48, seed=1) * torch.logspace(-1.5, 1, 48) @ normal(48, 48, seed=2)
    hessian = x.T @ x / len(x)
    weights = {"q": normal(40, 48) * 0.1, "k": normal(24, 48, seed=1) * 0.1}
    group = LinearGroup(weights, hessian=hessian, cross=hessian + 0.02 * hessian @ normal(48, 48, seed=9) / 7)
    return group, method.quantize(group)


@pytest.mark.parametrize("method", [RTN(bits=3, group_size=16), GPTQLike(bits=2, group_size=16)], ids=lambda m: m.name)
@pytest.mark.parametrize("weighted", [True, False])
def test_every_method_is_compensated(method: Method, weighted: bool) -> None:
    group, solutions = solve(method)
    low_rank = LowRankCompensation(rank=4, weighted=weighted)
    assert low_rank.needs == ({HESSIAN} if weighted else frozenset())
    compensated = low_rank.compensate(method, group, solutions)
    for name, before in solutions.items():
        after = compensated[name]
        assert after.weight.format == low_rank.format(method.format)
        assert (after.target is before.target, after.fallbacks) == (True, before.fallbacks)
        assert torch.equal(after.weight.codes, before.weight.codes)
        after.weight.check()
        target = group.weights[name] if before.target is None else before.target
        hessian = group.hessian if weighted else None
        old, new = (output_error(target - solution.weight.dense(), hessian) for solution in (before, after))
        assert new < 0.9 * old


def test_of_selects_what_the_error_is_measured_against() -> None:
    method = GPTQLike(bits=2, group_size=16)
    group, solutions = solve(method)
    of_target = LowRankCompensation(rank=4).compensate(method, group, solutions)
    of_weight = LowRankCompensation(rank=4, of="weight").compensate(method, group, solutions)
    for name, weight in group.weights.items():
        target = solutions[name].target
        assert target is not None
        for reference, better, worse in ((target, of_target, of_weight), (weight, of_weight, of_target)):
            errors = [
                output_error(reference - choice[name].weight.dense(), group.hessian) for choice in (better, worse)
            ]
            assert errors[0] < errors[1]


@pytest.mark.parametrize("method", [RTN(bits=2, group_size=16), GPTQLike(bits=2, group_size=16)], ids=lambda m: m.name)
def test_more_rounds_are_never_worse_and_keep_the_target(method: Method) -> None:
    group, solutions = solve(method)
    errors: dict[str, list[float]] = {name: [] for name in solutions}
    for rounds in (1, 2, 4):
        compensated = LowRankCompensation(rank=6, rounds=rounds).compensate(method, group, solutions)
        for name, solution in compensated.items():
            assert solution.target is solutions[name].target
            target = group.weights[name] if solution.target is None else solution.target
            errors[name].append(output_error(target - solution.weight.dense(), group.hessian))
    for by_rounds in errors.values():
        assert by_rounds == sorted(by_rounds, reverse=True)
        assert by_rounds[-1] < by_rounds[0]


def test_rtn_is_compensated_without_data() -> None:
    method, weight = RTN(bits=3, group_size=16), normal(40, 48)
    group = LinearGroup({"q": weight})
    solutions = method.quantize(group)
    compensated = LowRankCompensation(rank=4, weighted=False, rounds=2).compensate(method, group, solutions)
    before, after = (output_error(weight - choice["q"].weight.dense(), None) for choice in (solutions, compensated))
    assert after < before


def test_rank_must_be_below_the_shorter_side() -> None:
    low_rank = LowRankCompensation(rank=8)
    assert low_rank.unsupported_reason((64, 9)) is None
    assert low_rank.unsupported_reason((64, 8)) == "low_rank.rank 8 must be below 8, the shorter side of [64, 8]"


def test_weights_that_are_not_finite_are_refused() -> None:
    method = RTN(bits=3, group_size=16)
    group, solutions = solve(method)
    weight = solutions["k"].weight
    tables = {**weight.tables, "weight_scale": weight.tables["weight_scale"] * torch.inf}
    solutions["k"].weight = QuantizedWeight(weight.format, weight.shape, weight.codes, tables)
    with pytest.raises(VerificationError, match="k: the quantized weight holds NaN"):
        LowRankCompensation(rank=8).compensate(method, group, solutions)
