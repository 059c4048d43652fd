"""Gradient training of the few numbers that quantization leaves free, judged on text that it does not see.

What is trained (tables, latent weights, channel scales) and what is asked of the result (a linear's, a block's or the
model's output) meet in one place only: effective weights by layer. TEQ, block refinement and distillation are all made
of this loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qcli.algorithms.training.outcome import Outcome
from qcli.utils.errors import UsageError
from qcli.utils.progress import Progress, silent

_EPSILON = 1e-15  # ours: gradients of a relative error fall with the size of a layer, and 1e-8 would stop large ones
Weights = Mapping[str, Tensor]
"""Float32 `[out, in]` by layer name."""


class Objective(Protocol):
    """What effective weights are good for; both numbers are means, and lower is better."""

    def loss(self, weights: Weights, step: int) -> Tensor:
        """On the training samples whose turn it is at `step`; differentiable in `weights`."""

    def held_out(self, weights: Weights) -> float:
        """On samples that `loss` never sees."""


@dataclass(frozen=True)
class Schedule:
    """AdamW without weight decay; each group's own rate rises linearly, then falls by a cosine.

    Attributes:
        steps: of the optimizer.
        warmup: share of the steps in which the rate rises.
        floor: the last rate, relative to the highest.
        betas: of Adam.
        judgements: how often held-out samples are asked, besides the start.
        clip: largest norm of a step's gradient; None: any.
        patience: judgements without a better one after which training ends; None: it never does.
    """

    steps: int
    warmup: float = 0.05
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    judgements: int = 10
    clip: float | None = None
    patience: int | None = None

    def rate(self, step: int) -> float:
        """The factor on every learning rate at `step`, counted from 0."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        share = (step - rising) / max(1.0, self.steps - rising)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))


class Keeper(Protocol):
    """Where a long training keeps what it needs to continue exactly."""

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Overwrite the tensors with what was saved last and return its numbers; None if nothing was."""

    def save(self, tensors: Mapping[str, Tensor], numbers: dict[str, Any]) -> None:
        """Called after each judgement; `numbers` are plain data."""


def train(
    groups: list[dict[str, Any]],
    weights: Callable[[bool], Weights],
    objective: Objective,
    schedule: Schedule,
    progress: Progress = silent,
) -> Outcome:
    """Train what effective weights are made of, by what they are good for (see `optimize`).

    Args:
        weights: the effective weights that the parameters stand for; called with True for weights exactly as they
            will be stored (tables rounded), without gradients.
        objective: what they are judged by.
    """

    def backward(step: int) -> float:
        loss = objective.loss(weights(False), step)
        loss.backward()
        return float(loss.detach())

    return optimize(groups, backward, lambda: objective.held_out(weights(True)), schedule, progress)


def optimize(
    groups: list[dict[str, Any]],
    backward: Callable[[int], float],
    held_out: Callable[[], float],
    schedule: Schedule,
    progress: Progress = silent,
    keeper: Keeper | None = None,
) -> Outcome:
    """Train parameters in place and leave them at the best held-out step.

    Args:
        groups: as for `torch.optim.AdamW`: `{"params": [...], "lr": ...}`; leaves that require gradients.
        backward: adds a step's gradients to the parameters and returns its loss.
        held_out: the loss on samples that `backward` never sees, of what would be stored; called without gradients.
        schedule: how long and how fast.
        progress: told at the start and after each step.
        keeper: what it holds is continued, to the same end as without an interruption.

    Returns:
        Losses. A step whose loss is not finite ends the training; what was best before it is kept.

    Raises:
        UsageError: the held-out loss of the start is not finite.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=schedule.betas, weight_decay=0.0, eps=_EPSILON, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:  # what AdamW sets up at its first step, for a state that is taken up
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    state = None if keeper is None else keeper.load(_state(parameters, optimizer, kept))
    numbers = _start(held_out) if state is None else state
    judged_at = {round(schedule.steps * (n + 1) / schedule.judgements) for n in range(schedule.judgements)}
    progress("train", numbers["steps"], schedule.steps)
    stopped, losses = None, []
    for step in range(numbers["steps"], schedule.steps):
        if schedule.patience is not None and _fruitless(numbers) >= schedule.patience:
            stopped = f"stopped early after step {step}: no better for {schedule.patience} judgements"
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.rate(step)
        optimizer.zero_grad()
        with torch.enable_grad():
            losses.append(backward(step))
        if not math.isfinite(losses[-1]):
            stopped = f"training stopped before step {step + 1} of {schedule.steps}: its loss is not finite"
            break
        if schedule.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        numbers["steps"] = step + 1
        if step + 1 in judged_at:
            found = _judged(held_out)
            numbers["curve"].append([step + 1, sum(losses) / len(losses), found if math.isfinite(found) else None])
            losses.clear()
            if found < numbers["after"]:
                numbers |= {"after": found, "best_step": step + 1}
                for best, parameter in zip(kept, parameters, strict=True):
                    best.copy_(parameter.detach())
            if keeper is not None:
                keeper.save(_state(parameters, optimizer, kept), numbers)
        best = f"held-out loss {numbers['after']:.3g}, was {numbers['before']:.3g}"
        progress("train", step + 1, schedule.steps, f"loss {losses[-1]:.3g}, {best}" if losses else best)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    curve = tuple((step, loss, judged) for step, loss, judged in numbers.pop("curve"))
    return Outcome(**numbers, stopped=stopped, curve=curve)


def _start(held_out: Callable[[], float]) -> dict[str, Any]:
    before = _judged(held_out)
    if not math.isfinite(before):
        raise UsageError("the loss on held-out samples is not finite before any training", hint="use --dtype float32")
    return {"before": before, "after": before, "best_step": 0, "steps": 0, "curve": [[0, None, before]]}


def _fruitless(numbers: Mapping[str, Any]) -> int:
    """How many judgements have passed since the best one."""
    return sum(step > numbers["best_step"] for step, _, _ in numbers["curve"])


def _state(parameters: list[Tensor], optimizer: torch.optim.Optimizer, kept: list[Tensor]) -> dict[str, Tensor]:
    """Everything of a training that is a tensor, by name; not copied."""
    tensors: dict[str, Tensor] = {}
    for number, (parameter, best) in enumerate(zip(parameters, kept, strict=True)):
        tensors |= {f"{number}.value": parameter.detach(), f"{number}.kept": best}
        tensors |= {f"{number}.{name}": value for name, value in optimizer.state[parameter].items()}
    return tensors


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor, latent: Tensor, slope: Tensor) -> Tensor:
        context.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = context.saved_tensors
        return gradients[0], gradients[0] * slope, None


def straight_through(value: Tensor, latent: Tensor, slope: Tensor) -> Tensor:
    """`value`, whose gradient reaches `latent` too, times `slope`, which may be a mask; all of one shape."""
    found: Tensor = _StraightThrough.apply(value, latent, slope)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def _judged(held_out: Callable[[], float]) -> float:
    found = held_out()
    return found if math.isfinite(found) else math.inf
