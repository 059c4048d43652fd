"""The training loop: its schedule, which step it keeps, when it stops, and resuming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from qcli.algorithms.training.loop import Schedule, Weights, optimize, train
from qcli.algorithms.training.outcome import Outcome
from qcli.utils.errors import UsageError


class Distance:
    """Half the squared distance to `target`; on held-out samples, to `held_out_target`."""

    def __init__(self, target: float, held_out_target: float) -> None:
        self.target, self.held_out_target = target, held_out_target

    def loss(self, weights: Weights, step: int) -> Tensor:
        return 0.5 * (weights["w"] - self.target).square().sum()

    def held_out(self, weights: Weights) -> float:
        return float(0.5 * (weights["w"] - self.held_out_target).square().sum())


def fit(parameter: Tensor, objective: Distance, schedule: Schedule, lr: float = 0.05) -> Outcome:
    return train([{"params": [parameter], "lr": lr}], lambda as_stored: {"w": parameter}, objective, schedule)


def test_rate_warms_up_then_decays_to_the_floor() -> None:
    schedule = Schedule(100, warmup=0.1, floor=0.05)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)
    assert Schedule(1).rate(0) > 0


def test_evaluations_are_evenly_spaced_and_include_the_last_step() -> None:
    assert Schedule(60, evaluations=4).evaluation_steps() == {15, 30, 45, 60}
    assert max(Schedule(7, evaluations=3).evaluation_steps()) == 7


def test_best_held_out_step_is_kept() -> None:
    """Training passes the held-out optimum half way; the evaluated step nearest to it stays."""
    parameter = torch.zeros(3, requires_grad=True)
    evaluated: list[float] = []

    def effective(as_stored: bool) -> Weights:
        if as_stored:
            evaluated.append(float(parameter.detach()[0]))
        return {"w": parameter}

    schedule = Schedule(60, evaluations=20)
    outcome = train([{"params": [parameter], "lr": 0.05}], effective, Distance(1.0, 0.5), schedule)
    best = min(range(len(evaluated)), key=lambda number: abs(evaluated[number] - 0.5))
    assert 0 < best < 20
    assert outcome.best_step == 3 * best
    assert parameter.tolist() == pytest.approx([evaluated[best]] * 3)
    assert outcome.before == pytest.approx(0.375)
    assert outcome.after == pytest.approx(1.5 * (evaluated[best] - 0.5) ** 2)
    assert outcome.steps == 60


def test_each_parameter_group_has_its_own_rate() -> None:
    fast, slow = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    train(
        [{"params": [fast], "lr": 1e-2}, {"params": [slow], "lr": 1e-3}],
        lambda as_stored: {"w": torch.cat([fast, slow])},
        Distance(10.0, 10.0),
        Schedule(5),
    )
    assert float(fast.detach() / slow.detach()) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_small_gradients_train_as_well(scale: float) -> None:
    """The gradients of a relative error shrink as layers grow."""

    class Scaled(Distance):
        def loss(self, weights: Weights, step: int) -> Tensor:
            return scale * 1e-3 * super().loss(weights, step)

    outcome = fit(torch.zeros(3, requires_grad=True), Scaled(1, 1), Schedule(40))
    assert outcome.after < 0.05 * outcome.before


@pytest.mark.parametrize(("clip", "converges"), [(1.0, True), (None, False)])
def test_clipping_limits_the_harm_of_one_exploding_gradient(clip: float | None, converges: bool) -> None:
    parameter = torch.zeros(1, requires_grad=True)

    def backward(step: int) -> Tensor:
        loss = 0.5 * (parameter - 1).square().sum() * (-1e6 if step == 5 else 1)
        loss.backward()
        return loss.detach()

    def held_out() -> float:
        return float((parameter.detach() - 1).square())

    outcome = optimize([{"params": [parameter], "lr": 0.05}], backward, held_out, Schedule(60, clip=clip))
    assert (outcome.after < 0.1) == converges


def test_early_stopping() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    outcome = fit(parameter, Distance(1.0, 0.2), Schedule(100, evaluations=20, patience=3))
    assert outcome.steps == outcome.best_step + 3 * 5
    assert outcome.stopped == f"stopped early after step {outcome.steps}: no better for 3 judgements"
    assert float(parameter.detach()) == pytest.approx(0.2, abs=0.15)


def test_a_loss_that_is_not_finite_ends_training() -> None:
    class Breaking(Distance):
        def loss(self, weights: Weights, step: int) -> Tensor:
            return super().loss(weights, step) * (torch.nan if step == 7 else 1)

    parameter, evaluated = torch.zeros(3, requires_grad=True), list[float]()

    def effective(as_stored: bool) -> Weights:
        if as_stored:
            evaluated.append(float(parameter.detach()[0]))
        return {"w": parameter}

    outcome = train([{"params": [parameter], "lr": 0.05}], effective, Breaking(1, 1), Schedule(40))
    assert (outcome.steps, outcome.best_step) == (7, 4)
    assert parameter.tolist() == [evaluated[1]] * 3
    assert outcome.stopped == "training stopped before step 8 of 40: its loss is not finite"


def test_a_held_out_loss_that_is_not_finite_at_the_start_is_refused() -> None:
    with pytest.raises(UsageError, match="not finite before any training"):
        fit(torch.zeros(3, requires_grad=True), Distance(1, torch.nan), Schedule(4))


def test_a_held_out_loss_that_is_not_finite_is_no_number_in_the_curve() -> None:
    parameter = torch.zeros(1, requires_grad=True)

    class Diverging(Distance):
        def held_out(self, weights: Weights) -> float:
            return 1.0 if float(weights["w"].detach()) == 0 else float("nan")

    outcome = fit(parameter, Diverging(1, 1), Schedule(2), lr=0.1)
    assert [(step, held_out) for step, _, held_out in outcome.curve] == [(0, 1.0), (1, None), (2, None)]
    assert (outcome.best_step, float(parameter.detach())) == (0, 0)


class InMemory:
    """A checkpointer that keeps what was saved last, and stops the training after some saves."""

    class Interrupt(Exception):
        pass

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.state: dict[str, Any] | None = None
        self.saves_left: int | None = None

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        assert self.state is None or tensors.keys() == self.tensors.keys()
        for name, value in self.tensors.items():
            tensors[name].copy_(value)
        return self.state

    def save(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        self.tensors, self.state = {name: value.clone() for name, value in tensors.items()}, state
        if self.saves_left is not None:
            self.saves_left -= 1
            if self.saves_left == 0:
                raise InMemory.Interrupt


@pytest.mark.parametrize("saves", [1, 3])
def test_a_resumed_training_ends_with_the_same_bits(saves: int) -> None:
    def run(checkpointer: InMemory) -> tuple[Outcome, Tensor]:
        parameter = torch.linspace(-1, 1, 5).requires_grad_()

        def backward(step: int) -> Tensor:
            loss = (parameter - torch.sin(torch.tensor(float(step)))).square().sum()
            loss.backward()
            return loss.detach()

        def held_out() -> float:
            return float((parameter.detach() - 0.1).square().sum())

        groups = [{"params": [parameter], "lr": 0.05}]
        schedule = Schedule(20, evaluations=5)
        return optimize(groups, backward, held_out, schedule, checkpointer=checkpointer), parameter.detach()

    expected, expected_value = run(InMemory())
    checkpointer = InMemory()
    checkpointer.saves_left = saves
    with pytest.raises(InMemory.Interrupt):
        run(checkpointer)
    checkpointer.saves_left = None
    outcome, value = run(checkpointer)
    assert outcome == expected
    assert torch.equal(value, expected_value)
