"""The training loop: its schedule, what it keeps, and the straight-through gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.algorithms.training.loop import Schedule, Weights, optimize, straight_through, train
from qcli.utils.errors import UsageError


class Distance:
    """Half the squared distance to one point, and for held-out samples to another."""

    def __init__(self, wanted: float, held: float) -> None:
        self.wanted, self.held = wanted, held

    def loss(self, weights: Weights, step: int) -> Tensor:
        return 0.5 * (weights["w"] - self.wanted).square().sum()

    def held_out(self, weights: Weights) -> float:
        return float(0.5 * (weights["w"] - self.held).square().sum())


def test_rate_rises_then_falls_to_the_floor() -> None:
    schedule = Schedule(100, warmup=0.1, floor=0.05)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)
    assert Schedule(1).rate(0) > 0


def test_best_held_out_step_is_kept() -> None:
    """Training passes the held-out optimum half way: what is kept is the judged step nearest to it."""
    parameter = torch.zeros(3, requires_grad=True)
    seen: list[float] = []

    def weights(final: bool) -> Weights:
        if final:
            seen.append(float(parameter.detach()[0]))
        return {"w": parameter}

    outcome = train([{"params": [parameter], "lr": 0.05}], weights, Distance(1.0, 0.5), Schedule(60, judgements=20))
    best = min(range(len(seen)), key=lambda place: abs(seen[place] - 0.5))
    assert 0 < best < 20
    assert outcome.best_step == 3 * best
    assert parameter.tolist() == pytest.approx([seen[best]] * 3)
    assert outcome.before == pytest.approx(0.375)
    assert outcome.after == pytest.approx(1.5 * (seen[best] - 0.5) ** 2)
    assert outcome.steps == 60


def test_each_group_has_its_own_rate() -> None:
    fast, slow = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    train(
        [{"params": [fast], "lr": 1e-2}, {"params": [slow], "lr": 1e-3}],
        lambda final: {"w": torch.cat([fast, slow])},
        Distance(10.0, 10.0),
        Schedule(5),
    )
    assert float(fast.detach() / slow.detach()) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_small_losses_train_as_well(scale: float) -> None:
    """A relative error's gradients fall with the size of a layer."""
    parameter = torch.zeros(3, requires_grad=True)

    class Scaled(Distance):
        def loss(self, weights: Weights, step: int) -> Tensor:
            return scale * 1e-3 * super().loss(weights, step)

    outcome = train([{"params": [parameter], "lr": 0.05}], lambda final: {"w": parameter}, Scaled(1, 1), Schedule(40))
    assert outcome.after < 0.05 * outcome.before


@pytest.mark.parametrize(("clip", "arrives"), [(1.0, True), (None, False)])
def test_one_wild_gradient_does_no_harm_where_gradients_are_clipped(clip: float | None, arrives: bool) -> None:
    parameter = torch.zeros(1, requires_grad=True)

    def backward(step: int) -> float:
        loss = 0.5 * (parameter - 1).square().sum() * (-1e6 if step == 5 else 1)
        loss.backward()
        return float(loss.detach())

    def held_out() -> float:
        return float((parameter.detach() - 1).square())

    outcome = optimize([{"params": [parameter], "lr": 0.05}], backward, held_out, Schedule(60, clip=clip))
    assert (outcome.after < 0.1) == arrives


def test_training_ends_when_patience_does() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    schedule = Schedule(100, judgements=20, patience=3)
    outcome = train([{"params": [parameter], "lr": 0.05}], lambda final: {"w": parameter}, Distance(1.0, 0.2), schedule)
    assert outcome.steps == outcome.best_step + 3 * 5
    assert outcome.stopped == f"stopped early after step {outcome.steps}: no better for 3 judgements"
    assert float(parameter.detach()) == pytest.approx(0.2, abs=0.15)


def test_losses_that_are_not_finite_are_told() -> None:
    parameter = torch.zeros(3, requires_grad=True)

    class Breaking(Distance):
        def loss(self, weights: Weights, step: int) -> Tensor:
            return super().loss(weights, step) * (torch.nan if step == 7 else 1)

    outcome = train([{"params": [parameter], "lr": 0.05}], lambda final: {"w": parameter}, Breaking(1, 1), Schedule(40))
    assert (outcome.steps, outcome.best_step) == (7, 4)
    assert outcome.stopped == "training stopped before step 8 of 40: its loss is not finite"
    with pytest.raises(UsageError, match="not finite before any training"):
        train(
            [{"params": [parameter], "lr": 0.05}], lambda final: {"w": parameter}, Distance(1, torch.nan), Schedule(4)
        )


def test_a_held_out_loss_that_is_not_finite_is_no_number_in_the_report() -> None:
    parameter = torch.zeros(1, requires_grad=True)

    class Lost(Distance):
        def held_out(self, weights: Weights) -> float:
            return 1.0 if float(weights["w"].detach()) == 0 else float("nan")

    outcome = train([{"params": [parameter], "lr": 0.1}], lambda final: {"w": parameter}, Lost(1, 1), Schedule(2))
    assert [(step, held_out) for step, _, held_out in outcome.curve] == [(0, 1.0), (1, None), (2, None)]
    assert (outcome.best_step, float(parameter.detach())) == (0, 0)


def test_straight_through_gradient() -> None:
    value, latent = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    inside = torch.tensor([True, False, True, False])
    found = straight_through(value, latent, inside)
    assert torch.equal(found, value)
    found.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert value.grad is not None and value.grad.tolist() == [1, 2, 3, 4]
    assert latent.grad is not None and latent.grad.tolist() == [1, 0, 3, 0]
