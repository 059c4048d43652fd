"""Refinement on single weights: where it starts, what it may change, and that it finds what is better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.refine import Refine
from qcli.algorithms.solvers import codebook, grid
from qcli.algorithms.training.trainable_weight import TrainedWeight
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook, TableBits
from qcli.core.formats.low_rank import FactorBits, LowRank
from qcli.core.weight import Format, QuantizedWeight
from qcli.quantization.objectives import LinearObjective

OUT, IN, TOKENS = 12, 64, 400


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, format: Affine) -> QuantizedWeight:
    codes, tables = grid.round_to_minmax(weight, format)
    return QuantizedWeight(format, (weight.shape[0], weight.shape[1]), codes, tables)


def with_low_rank(weight: Tensor, base: Affine, bits: FactorBits) -> QuantizedWeight:
    format = LowRank.around(base, 2, bits)
    shared = rounded(weight, base)
    a, b = 0.01 * random(OUT, 2, seed=5), 0.1 * random(2, IN, seed=6)
    return format.wrap(shared, format.round_factor("a", a) | format.round_factor("b", b))


FORMATS = [
    Affine(bits=bits, group_size=group_size, zero_point=zero_point)
    for bits, group_size in ((2, 16), (3, 64), (4, -1))
    for zero_point in ("none", "integer", "float")
]


@pytest.fixture
def layer() -> tuple[LinearGroup, LinearGroup]:
    """Correlated inputs of a linear and what quantization has made of them: for training, and held out."""
    mixed, weight = random(IN, IN, seed=1) / 8, random(OUT, IN, seed=2)

    def moments(seed: int) -> LinearGroup:
        original = random(TOKENS, IN, seed=seed) @ mixed
        inputs = original + 0.05 * random(TOKENS, IN, seed=seed + 1)
        return LinearGroup({"w": weight}, inputs.T @ inputs / TOKENS, original.T @ inputs / TOKENS)

    return moments(10), moments(20)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_training_starts_exactly_at_the_given_codes(format: Affine) -> None:
    weight = random(OUT, IN)
    given = rounded(weight, format)
    trained = TrainedWeight(given, weight + 0.3 * random(OUT, IN, seed=3), ("tables", "weights"))
    assert torch.equal(trained.weight().codes, given.codes)
    assert torch.equal(trained.dense(final=True), given.dense())
    torch.testing.assert_close(trained.dense(final=False), given.dense(), rtol=0, atol=1e-6)


def test_training_sees_what_will_be_stored() -> None:
    """Tables on the way are rounded as they will be, in 8 bits too, and their gradient passes the rounding."""
    given = with_low_rank(random(OUT, IN), Affine(bits=2, group_size=16, zero_point="float"), 8)
    trained = TrainedWeight(given, given.dense(), ("tables",))
    with torch.no_grad():
        for change in trained.relative.values():
            change += 0.05 * random(*change.shape, seed=8)
    dense = trained.dense(final=False)
    assert torch.equal(dense, trained.weight().dense())
    assert not torch.equal(dense, given.dense())
    dense.square().sum().backward()
    assert all(change.grad is not None and bool(change.grad.any()) for change in trained.relative.values())
    assert trained.relative.keys() == {"weight_scale", "weight_zero_point", "lowrank_a", "lowrank_b"}


def test_latents_start_as_near_to_the_target_as_the_codes_allow() -> None:
    weight, format = random(OUT, IN), Affine(bits=3, group_size=64)
    given = rounded(weight, format)
    start = TrainedWeight(given, weight, ("weights",)).start
    scale = format.spread(given.tables["weight_scale"].float(), IN)
    assert bool(((start - given.dense()).abs() <= 0.49 * scale + 1e-6).all())
    inside = (weight - given.dense()).abs() < 0.49 * scale
    torch.testing.assert_close(start[inside], weight[inside])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradient_of_tables_is_that_of_decoding_at_fixed_codes(format: Affine) -> None:
    weight = random(OUT, IN)
    given, pull = rounded(weight, format), random(OUT, IN, seed=4)
    trained = TrainedWeight(given, weight, ("tables", "weights"))
    (trained.dense(final=False) * pull).sum().backward()
    scale = given.tables["weight_scale"].float()
    zero_point = given.tables["weight_zero_point"].float() if format.zero_point != "none" else format.center
    zero_points = format.spread(zero_point, IN) if isinstance(zero_point, Tensor) else zero_point
    by_hand = format.grouped((given.codes.float() - zero_points) * pull).sum(-1) * trained.unit["weight_scale"]
    torch.testing.assert_close(trained.relative["weight_scale"].grad, by_hand, rtol=1e-4, atol=1e-5)
    assert trained.latent is not None and trained.latent.grad is not None
    torch.testing.assert_close(trained.latent.grad, pull * trained.step)
    assert torch.equal(trained.step, format.spread(scale.abs(), IN))


@pytest.mark.parametrize("train", [("tables",), ("weights",), ("tables", "weights")])
@pytest.mark.parametrize("low_rank", [None, 8, 16])
def test_held_out_error_falls(
    layer: tuple[LinearGroup, LinearGroup], train: tuple[Literal["tables", "weights"], ...], low_rank: FactorBits | None
) -> None:
    group, held = layer
    base = Affine(bits=2, group_size=32, zero_point="float")
    given = with_low_rank(group.weights["w"], base, low_rank) if low_rank else rounded(group.weights["w"], base)
    objective = LinearObjective(group, held)
    refine = Refine(scope="linear", steps=80, train=train, weights_lr=1e-2)
    refined, outcome = refine.refine({"w": given}, group.weights, objective)
    found = refined["w"]
    found.check()
    assert found.format == given.format
    assert outcome.after == pytest.approx(objective.held_out({"w": found.dense()}))
    assert outcome.after < 0.97 * outcome.before
    assert torch.equal(found.codes, given.codes) is (train == ("tables",))
    same = {name: torch.equal(table, given.tables[name]) for name, table in found.tables.items()}
    assert all(same.values()) is (train == ("weights",))


@pytest.mark.parametrize("table_bits", [8, 16])
@pytest.mark.parametrize("low_rank", [None, 8, 16])
def test_codebooks_are_refined_too(
    layer: tuple[LinearGroup, LinearGroup], table_bits: TableBits, low_rank: FactorBits | None
) -> None:
    group, held = layer
    weight, format = group.weights["w"], Codebook(bits=2, group_size=16, rank=2, table_bits=table_bits)
    tables = codebook.fit(weight, format)
    given = QuantizedWeight(format, (OUT, IN), format.encode(weight, tables), tables)
    if low_rank is not None:
        wrapped = LowRank.around(format, 2, low_rank)
        a, b = 0.01 * random(OUT, 2, seed=5), 0.1 * random(2, IN, seed=6)
        given = wrapped.wrap(given, wrapped.round_factor("a", a) | wrapped.round_factor("b", b))
    objective = LinearObjective(group, held)
    refined, outcome = Refine(scope="linear", steps=60).refine({"w": given}, group.weights, objective)
    refined["w"].check()
    assert outcome.after == pytest.approx(objective.held_out({"w": refined["w"].dense()}))
    assert outcome.after < 0.99 * outcome.before
    after, before = (given.format.float_tables(weight.tables) for weight in (refined["w"], given))
    assert all(not torch.equal(after[name], table) for name, table in before.items())


def test_linear_objective_is_the_real_output_error() -> None:
    weight, quantized = random(OUT, IN), random(OUT, IN, seed=1)
    original, inputs, lost = random(TOKENS, IN, seed=2), random(TOKENS, IN, seed=3), random(TOKENS, OUT, seed=4)
    group = LinearGroup(
        {"w": weight}, inputs.T @ inputs / TOKENS, original.T @ inputs / TOKENS, lost.T @ inputs / TOKENS
    )
    objective = LinearObjective(group, group)
    size = (inputs @ weight.T).square().sum() / TOKENS

    def by_hand(candidate: Tensor) -> Tensor:
        return (original @ weight.T + lost - inputs @ candidate.T).square().sum() / TOKENS / size

    found = objective.held_out({"w": quantized}) - objective.held_out({"w": weight})
    assert found == pytest.approx(float(by_hand(quantized) - by_hand(weight)), rel=1e-4)


class Spoiled:
    """An objective whose training side leads away from what the held-out side wants."""

    def __init__(self, wanted: Tensor) -> None:
        self.wanted = wanted

    def loss(self, weights: Mapping[str, Tensor], step: int) -> Tensor:
        return -(weights["w"] - self.wanted).square().mean()

    def held_out(self, weights: Mapping[str, Tensor]) -> float:
        return float((weights["w"] - self.wanted).square().mean())


def test_start_is_kept_when_training_does_not_help() -> None:
    weight = random(OUT, IN)
    given = rounded(weight, Affine(bits=3, group_size=16))
    refined, outcome = Refine(steps=20).refine({"w": given}, {"w": weight}, Spoiled(weight))
    assert (outcome.best_step, outcome.after) == (0, outcome.before)
    assert refined["w"] is given


def test_loss_that_is_not_finite_ends_training() -> None:
    class Broken(Spoiled):
        def loss(self, weights: Mapping[str, Tensor], step: int) -> Tensor:
            return super().loss(weights, step) * (torch.nan if step == 3 else 1)

    weight = random(OUT, IN)
    given = rounded(weight, Affine(bits=3, group_size=16))
    refined, outcome = Refine(steps=20).refine({"w": given}, {"w": weight}, Broken(weight))
    assert outcome.steps == 3
    assert refined["w"] is given


def test_global_generator_is_left_alone(layer: tuple[LinearGroup, LinearGroup]) -> None:
    format: Format = Affine(bits=3, group_size=16)
    assert isinstance(format, Affine)
    before = torch.get_rng_state()
    Refine(scope="linear", steps=5).refine(
        {"w": rounded(layer[0].weights["w"], format)}, layer[0].weights, LinearObjective(*layer)
    )
    assert torch.equal(torch.get_rng_state(), before)
