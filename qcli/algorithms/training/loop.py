"""The training loop of TEQ, reconstruction and distillation: AdamW, and the step that is best on held-out samples.

What is trained (tables, latent weights, channel scales) and what it is trained for (the output of a linear, a block
or the model) meet only in the effective weights, by layer name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from qcli.algorithms.training.outcome import Outcome
from qcli.utils.errors import UsageError
from qcli.utils.progress import Progress, silent

_EPSILON = 1e-15  # ours: gradients of a relative error shrink as layers grow, and Adam's 1e-8 would stall large layers

Weights: TypeAlias = Mapping[str, Tensor]
"""Dense weights by layer name, float32 `[out, in]`."""


class Objective(Protocol):
    """Scores effective weights; both losses are means over tokens, lower is better."""

    def loss(self, weights: Weights, step: int) -> Tensor:
        """Scalar loss on the training batch of `step`; differentiable in `weights`."""

    def held_out(self, weights: Weights) -> float:
        """Loss on held-out samples, which `loss` never sees."""


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rates: linear warm-up to each parameter group's own rate, then cosine decay.

    Attributes:
        steps: optimizer steps.
        warmup: share of the steps in which the rate rises.
        floor: final rate, relative to the peak.
        betas: of Adam.
        evaluations: how often the held-out loss is measured, besides the start; evenly spaced.
        clip: largest gradient norm of a step; None: gradients are not clipped.
        patience: early-stopping patience, in evaluations; None: no early stopping.
    """

    steps: int
    warmup: float = 0.05
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    evaluations: int = 10
    clip: float | None = None
    patience: int | None = None

    def rate(self, step: int) -> float:
        """Factor on every learning rate at `step`, counted from 0."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        share = (step - rising) / max(1.0, self.steps - rising)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))

    def evaluation_steps(self) -> set[int]:
        """Numbers of completed steps after which the held-out loss is measured."""
        return {round(self.steps * (number + 1) / self.evaluations) for number in range(self.evaluations)}


class Checkpointer(Protocol):
    """Saves and restores the state of a training, so that an interrupted run ends with the same bytes."""

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Overwrite `tensors` in place with the last saved ones and return the state saved with them; None if nothing
        was saved."""

    def save(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Called after each evaluation; `state` holds plain data that JSON can represent."""


@dataclass
class _State:
    """Where a training is, as plain data; fields as those of `Outcome`. A `Checkpointer` stores them by name."""

    before: float
    after: float
    best_step: int
    steps: int
    curve: list[list[Any]]

    def evaluations_since_best(self) -> int:
        return sum(step > self.best_step for step, _, _ in self.curve)


def train(
    groups: list[dict[str, Any]],
    effective: Callable[[bool], Weights],
    objective: Objective,
    schedule: Schedule,
    progress: Progress = silent,
) -> Outcome:
    """Train parameters for an objective of the effective weights they stand for (see `optimize`).

    Args:
        groups: as for `optimize`.
        effective: the effective weights; called with True, without gradients, for the weights exactly as they will be
            stored (tables rounded), and with False for their differentiable form.
        objective: what they are trained for.
        schedule: steps and learning rates.
        progress: called at the start and after each step.

    Raises:
        UsageError: the held-out loss of the initial weights is not finite.
    """

    def backward(step: int) -> Tensor:
        loss = objective.loss(effective(False), step)
        loss.backward()
        return loss.detach()

    return optimize(groups, backward, lambda: objective.held_out(effective(True)), schedule, progress)


def optimize(
    groups: list[dict[str, Any]],
    backward: Callable[[int], Tensor],
    held_out: Callable[[], float],
    schedule: Schedule,
    progress: Progress = silent,
    checkpointer: Checkpointer | None = None,
) -> Outcome:
    """Train parameters in place with AdamW (no weight decay) and leave them at the step with the best held-out loss.

    A step whose training loss is not finite ends the training; the best step before it stays. Losses are read when the
    held-out loss is measured, so that steps in between never wait for the device.

    Args:
        groups: parameter groups of `torch.optim.AdamW`, `{"params": [...], "lr": ...}`; leaf tensors that require
            gradients.
        backward: adds the gradients of a step to the parameters and returns the step's loss, a scalar of its own.
        held_out: held-out loss of the weights as they would be stored; called without gradients.
        schedule: steps and learning rates.
        progress: called at the start and after each step.
        checkpointer: a saved state is resumed, with the same result as an uninterrupted training.

    Raises:
        UsageError: the held-out loss of the initial weights is not finite.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=schedule.betas, weight_decay=0.0, eps=_EPSILON, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    best = [_on_host(parameter) for parameter in parameters]
    for parameter in parameters:  # AdamW creates these at its first step; resuming needs them before
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    saved = None if checkpointer is None else checkpointer.load(_tensors(parameters, optimizer, best))
    state = _initial_state(held_out) if saved is None else _State(**saved)
    evaluation_steps = schedule.evaluation_steps()
    progress("train", state.steps, schedule.steps)
    stopped: str | None = None
    losses: list[Tensor] = []  # since the last evaluation
    detail = f"held-out loss {state.before:.3g} -> {state.after:.3g}"
    for step in range(state.steps, schedule.steps):
        if schedule.patience is not None and state.evaluations_since_best() >= schedule.patience:
            # `stopped` is recorded in manifests: its words are kept
            stopped = f"stopped early after step {step}: no better for {schedule.patience} judgements"
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.rate(step)
        optimizer.zero_grad()
        with torch.enable_grad():
            losses.append(backward(step))
        if schedule.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        state.steps = step + 1
        if step + 1 in evaluation_steps:
            values = torch.stack(losses).tolist()
            losses.clear()
            spoiled = next((number for number, value in enumerate(values) if not math.isfinite(value)), None)
            if spoiled is not None:  # steps made since then are undone with it: they count as never made
                state.steps = step + 1 - len(values) + spoiled
                stopped = f"training stopped before step {state.steps + 1} of {schedule.steps}: its loss is not finite"
                break
            loss = _evaluate(held_out)
            state.curve.append([step + 1, sum(values) / len(values), loss if math.isfinite(loss) else None])
            if loss < state.after:
                state.after, state.best_step = loss, step + 1
                for value, parameter in zip(best, parameters, strict=True):
                    value.copy_(parameter.detach())
            if checkpointer is not None:
                checkpointer.save(_tensors(parameters, optimizer, best), asdict(state))
            detail = f"loss {values[-1]:.3g}, held-out loss {state.before:.3g} -> {state.after:.3g}"
        progress("train", step + 1, schedule.steps, detail)
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    curve = tuple((step, loss, held_out_loss) for step, loss, held_out_loss in state.curve)
    return Outcome(state.before, state.after, state.best_step, state.steps, stopped, curve)


def _on_host(parameter: Tensor) -> Tensor:
    """A copy in host memory, which is only written at evaluations; one that processes share stays where it is."""
    value = parameter.detach()
    return value.clone() if hasattr(value, "device_mesh") else value.to("cpu", copy=True)


def _initial_state(held_out: Callable[[], float]) -> _State:
    before = _evaluate(held_out)
    if not math.isfinite(before):
        raise UsageError("the loss on held-out samples is not finite before any training", hint="use --dtype float32")
    return _State(before=before, after=before, best_step=0, steps=0, curve=[[0, None, before]])


@torch.no_grad()
def _evaluate(held_out: Callable[[], float]) -> float:
    loss = held_out()
    return loss if math.isfinite(loss) else math.inf


def _tensors(parameters: list[Tensor], optimizer: torch.optim.Optimizer, best: list[Tensor]) -> dict[str, Tensor]:
    """Every tensor of a training's state by its name in a checkpoint; views, not copies."""
    tensors: dict[str, Tensor] = {}
    for number, (parameter, value) in enumerate(zip(parameters, best, strict=True)):
        tensors |= {f"{number}.value": parameter.detach(), f"{number}.kept": value}
        tensors |= {f"{number}.{name}": moment for name, moment in optimizer.state[parameter].items()}
    return tensors
