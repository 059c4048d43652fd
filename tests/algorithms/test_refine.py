"""Reconstruction of single weights: it lowers the held-out error of every format, or leaves the weight alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.refine import Refine
from qcli.algorithms.solvers import codebook, grid
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook, TableBits
from qcli.core.formats.low_rank import FactorBits, LowRank
from qcli.core.formats.sign import Sign
from qcli.core.weight import QuantizedWeight
from qcli.quantization.objectives import LinearObjective
from tests.algorithms.tensors import normal

OUT, IN, TOKENS = 12, 64, 400


def rounded(weight: Tensor, format: Affine) -> QuantizedWeight:
    codes, tables = grid.round_to_minmax(weight, format)
    return QuantizedWeight(format, (weight.shape[0], weight.shape[1]), codes, tables)


def with_low_rank(weight: QuantizedWeight, bits: FactorBits | None) -> QuantizedWeight:
    """`weight` with random factors of rank 2; as it is without `bits`."""
    if bits is None:
        return weight
    format = LowRank.around(weight.format, 2, bits)
    a, b = 0.01 * normal(OUT, 2, seed=5), 0.1 * normal(2, IN, seed=6)
    return format.wrap(weight, format.round_factor("a", a) | format.round_factor("b", b))


@pytest.fixture
def layer() -> tuple[LinearGroup, LinearGroup]:
    """A linear with the statistics of its correlated inputs, on training and on held-out samples."""
    mixing, weight = normal(IN, IN, seed=1) / 8, normal(OUT, IN, seed=2)

    def statistics(seed: int) -> LinearGroup:
        original = normal(TOKENS, IN, seed=seed) @ mixing
        quantized = original + 0.05 * normal(TOKENS, IN, seed=seed + 1)
        return LinearGroup({"w": weight}, quantized.T @ quantized / TOKENS, original.T @ quantized / TOKENS)

    return statistics(10), statistics(20)


@pytest.mark.parametrize("train", [("tables",), ("weights",), ("tables", "weights")])
@pytest.mark.parametrize("low_rank", [None, 8, 16])
def test_held_out_error_falls(
    layer: tuple[LinearGroup, LinearGroup], train: tuple[Literal["tables", "weights"], ...], low_rank: FactorBits | None
) -> None:
    group, held_out = layer
    initial = with_low_rank(rounded(group.weights["w"], Affine(bits=2, group_size=32, zero_point="float")), low_rank)
    objective = LinearObjective(group, held_out)
    refine = Refine(scope="linear", steps=80, train=train, weights_lr=1e-2)
    refined, outcome = refine.refine({"w": initial}, dict(group.weights), objective)
    weight = refined["w"]
    weight.check()
    assert weight.format == initial.format
    assert outcome.after == pytest.approx(objective.held_out({"w": weight.dense()}))
    assert outcome.after < 0.97 * outcome.before
    assert torch.equal(weight.codes, initial.codes) is (train == ("tables",))
    unchanged = [torch.equal(table, initial.tables[name]) for name, table in weight.tables.items()]
    assert all(unchanged) is (train == ("weights",))


@pytest.mark.parametrize("table_bits", [8, 16])
@pytest.mark.parametrize("low_rank", [None, 8, 16])
def test_all_tables_of_codebooks_are_refined(
    layer: tuple[LinearGroup, LinearGroup], table_bits: TableBits, low_rank: FactorBits | None
) -> None:
    group, held_out = layer
    weight, format = group.weights["w"], Codebook(bits=2, group_size=16, rank=2, table_bits=table_bits)
    tables = codebook.fit(weight, format)
    initial = with_low_rank(QuantizedWeight(format, (OUT, IN), format.encode(weight, tables), tables), low_rank)
    objective = LinearObjective(group, held_out)
    refined, outcome = Refine(scope="linear", steps=60).refine({"w": initial}, dict(group.weights), objective)
    refined["w"].check()
    assert outcome.after == pytest.approx(objective.held_out({"w": refined["w"].dense()}))
    assert outcome.after < 0.99 * outcome.before
    after, before = (initial.format.float_tables(weight.tables) for weight in (refined["w"], initial))
    assert all(not torch.equal(after[name], table) for name, table in before.items())


def test_linear_objective_is_the_output_error() -> None:
    weight, quantized = normal(OUT, IN), normal(OUT, IN, seed=1)
    original, inputs = normal(TOKENS, IN, seed=2), normal(TOKENS, IN, seed=3)
    residual_error = normal(TOKENS, OUT, seed=4)
    gap = (original - inputs) @ weight.T + residual_error
    group = LinearGroup({"w": weight}, inputs.T @ inputs / TOKENS, output_gap=gap.T @ inputs / TOKENS)
    objective = LinearObjective(group, group)
    scale = (inputs @ weight.T).square().sum() / TOKENS

    def expected(candidate: Tensor) -> Tensor:
        return (original @ weight.T + residual_error - inputs @ candidate.T).square().sum() / TOKENS / scale

    difference = objective.held_out({"w": quantized}) - objective.held_out({"w": weight})
    assert difference == pytest.approx(float(expected(quantized) - expected(weight)), rel=1e-4)


class Misleading:
    """Training leads away from the held-out optimum."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def loss(self, weights: Mapping[str, Tensor], step: int) -> Tensor:
        return -(weights["w"] - self.target).square().mean()

    def held_out(self, weights: Mapping[str, Tensor]) -> float:
        return float((weights["w"] - self.target).square().mean())


def test_initial_weights_stay_if_no_step_improves() -> None:
    weight = normal(OUT, IN)
    initial = rounded(weight, Affine(bits=3, group_size=16))
    refined, outcome = Refine(steps=20).refine({"w": initial}, {"w": weight}, Misleading(weight))
    assert (outcome.best_step, outcome.after) == (0, outcome.before)
    assert refined["w"] is initial


def test_a_loss_that_is_not_finite_ends_training() -> None:
    class Breaking(Misleading):
        def loss(self, weights: Mapping[str, Tensor], step: int) -> Tensor:
            return super().loss(weights, step) * (torch.nan if step == 3 else 1)

    weight = normal(OUT, IN)
    initial = rounded(weight, Affine(bits=3, group_size=16))
    refined, outcome = Refine(steps=20).refine({"w": initial}, {"w": weight}, Breaking(weight))
    assert outcome.steps == 3
    assert refined["w"] is initial


def test_global_random_state_is_left_alone(layer: tuple[LinearGroup, LinearGroup]) -> None:
    state, weights = torch.get_rng_state(), layer[0].weights
    initial = rounded(weights["w"], Affine(bits=3, group_size=16))
    Refine(scope="linear", steps=5).refine({"w": initial}, dict(weights), LinearObjective(*layer))
    assert torch.equal(torch.get_rng_state(), state)


def test_linear_scope_is_not_for_layers_with_an_output_norm() -> None:
    reason = Refine(scope="linear").unsupported_reason(Sign(output_norm=True))
    assert reason is not None and "set scope to block" in reason
    assert Refine(scope="block").unsupported_reason(Sign(output_norm=True)) is None
    assert Refine(scope="linear").unsupported_reason(Sign(output_norm=False)) is None
