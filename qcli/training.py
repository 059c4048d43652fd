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

from qcli.errors import UsageError
from qcli.progress import Progress, silent

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
        accumulate: calls of the objective whose gradients make one step.
        clip: largest norm of a step's gradient; None: any.
    """

    steps: int
    warmup: float = 0.05
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    judgements: int = 10
    accumulate: int = 1
    clip: float | None = None

    def rate(self, step: int) -> float:
        """The factor on every learning rate at `step`, counted from 0."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        share = (step - rising) / max(1.0, self.steps - rising)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    Attributes:
        before: held-out loss at the start.
        after: held-out loss of what was kept: never above `before`.
        best_step: after how many steps that was; 0: the start was best and is kept.
        steps: how many were made.
        stopped: why there were not more, if there should have been.
        curve: held-out losses at the start and at every judgement; None where one was not finite.
    """

    before: float
    after: float
    best_step: int
    steps: int
    stopped: str | None = None
    curve: tuple[float | None, ...] = ()


class Keeper(Protocol):
    """Where a long training keeps what it needs to continue exactly."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved last, if anything was."""

    def save(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Called after each judgement; `numbers` are plain data."""


def train(
    groups: list[dict[str, Any]],
    weights: Callable[[bool], Weights],
    objective: Objective,
    schedule: Schedule,
    progress: Progress = silent,
    keeper: Keeper | None = None,
) -> Outcome:
    """Train parameters in place and leave them at the best held-out step.

    Args:
        groups: as for `torch.optim.AdamW`: `{"params": [...], "lr": ...}`; leaves that require gradients.
        weights: the effective weights that the parameters stand for; called with True for weights exactly as they
            will be stored (tables rounded), without gradients.
        objective: what they are judged by.
        schedule: how long and how fast.
        progress: told at the start and after each judgement.
        keeper: what it holds is continued, to the same end as without an interruption.

    Returns:
        Held-out losses. A step whose loss is not finite ends the training; what was best before it is kept.

    Raises:
        UsageError: the held-out loss of the start is not finite.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=schedule.betas, weight_decay=0.0, eps=_EPSILON, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    state = None if keeper is None else keeper.load()
    if state is None:
        before = _judged(weights, objective)
        if not math.isfinite(before):
            raise UsageError(
                "the loss on held-out samples is not finite before any training", hint="use --dtype float32"
            )
        kept = [parameter.detach().clone() for parameter in parameters]
        numbers: dict[str, Any] = {"before": before, "after": before, "best_step": 0, "steps": 0, "curve": [before]}
    else:
        tensors, numbers = state
        kept = _resume(tensors, parameters, optimizer)
    judged_at = {round(schedule.steps * (n + 1) / schedule.judgements) for n in range(schedule.judgements)}
    progress("train", numbers["steps"], schedule.steps)
    stopped = None
    with torch.enable_grad():
        for step in range(numbers["steps"], schedule.steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.rate(step)
            loss = _backward(parameters, weights(False), objective, step, schedule.accumulate)
            if not math.isfinite(loss):
                stopped = f"training stopped before step {step + 1} of {schedule.steps}: its loss is not finite"
                break
            if schedule.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
            numbers["steps"] = step + 1
            if step + 1 in judged_at:
                found = _judged(weights, objective)
                numbers["curve"].append(found if math.isfinite(found) else None)
                if found < numbers["after"]:
                    numbers |= {"after": found, "best_step": step + 1}
                    kept = [parameter.detach().clone() for parameter in parameters]
                best = f"held-out loss {numbers['after']:.3g}, was {numbers['before']:.3g}"
                progress("train", step + 1, schedule.steps, best)
                if keeper is not None:
                    keeper.save(_state(parameters, optimizer, kept), numbers)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    curve = tuple(numbers.pop("curve"))
    return Outcome(**numbers, stopped=stopped, curve=curve)


def _backward(parameters: list[Tensor], weights: Weights, objective: Objective, step: int, accumulate: int) -> float:
    """Set the gradients of a step; its loss. Weights are made of parameters once, however many batches look at them."""
    made = {path: weight for path, weight in weights.items() if weight.requires_grad}
    leaves = {path: weight.detach().requires_grad_() for path, weight in made.items()}
    total = 0.0
    for part in range(accumulate):
        loss = objective.loss({**weights, **leaves}, step * accumulate + part) / accumulate
        total += float(loss.detach())
        if not math.isfinite(total):
            return total
        loss.backward()
    used = [path for path, leaf in leaves.items() if leaf.grad is not None]
    gradients = torch.autograd.grad(
        [made[path] for path in used], parameters, [leaves[path].grad for path in used], allow_unused=True
    )
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
    return total


def _state(parameters: list[Tensor], optimizer: torch.optim.Optimizer, kept: list[Tensor]) -> dict[str, Tensor]:
    """Everything of a training that is a tensor, by name."""
    tensors: dict[str, Tensor] = {}
    for number, (parameter, best) in enumerate(zip(parameters, kept, strict=True)):
        tensors |= {f"{number}.value": parameter.detach(), f"{number}.kept": best}
        tensors |= {f"{number}.{name}": value for name, value in optimizer.state[parameter].items()}
    return tensors


@torch.no_grad()
def _resume(tensors: Mapping[str, Tensor], parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Take up what `_state` gave; returns the best parameters so far."""
    kept = []
    for number, parameter in enumerate(parameters):
        prefix = f"{number}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        parameter.copy_(own.pop("value"))
        kept.append(own.pop("kept").to(parameter.device))
        optimizer.state[parameter] = {name: value.to(parameter.device) for name, value in own.items()}
    return kept


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
def _judged(weights: Callable[[bool], Weights], objective: Objective) -> float:
    found = objective.held_out(weights(True))
    return found if math.isfinite(found) else math.inf
