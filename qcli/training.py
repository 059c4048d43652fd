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
    """

    steps: int
    warmup: float = 0.05
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    judgements: int = 10

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
    """

    before: float
    after: float
    best_step: int
    steps: int
    stopped: str | None = None


def train(
    groups: list[dict[str, Any]],
    weights: Callable[[bool], Weights],
    objective: Objective,
    schedule: Schedule,
    progress: Progress = silent,
) -> Outcome:
    """Train parameters in place and leave them at the best held-out step.

    Args:
        groups: as for `torch.optim.AdamW`: `{"params": [...], "lr": ...}`; leaves that require gradients.
        weights: the effective weights that the parameters stand for; called with True for weights exactly as they
            will be stored (tables rounded), without gradients.
        objective: what they are judged by.
        schedule: how long and how fast.
        progress: told at the start and after each judgement.

    Returns:
        Held-out losses. A step whose loss is not finite ends the training; what was best before it is kept.

    Raises:
        UsageError: the held-out loss of the start is not finite.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=schedule.betas, weight_decay=0.0, eps=_EPSILON, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    best = before = _judged(weights, objective)
    if not math.isfinite(before):
        raise UsageError("the loss on held-out samples is not finite before any training", hint="use --dtype float32")
    kept, best_step, done = [parameter.detach().clone() for parameter in parameters], 0, 0
    stopped = None
    judged_at = {round(schedule.steps * (n + 1) / schedule.judgements) for n in range(schedule.judgements)}
    progress("train", 0, schedule.steps)
    with torch.enable_grad():
        for step in range(schedule.steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.rate(step)
            loss = objective.loss(weights(False), step)
            if not bool(loss.isfinite()):
                stopped = f"training stopped before step {step + 1} of {schedule.steps}: its loss is not finite"
                break
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            done = step + 1
            if done in judged_at:
                found = _judged(weights, objective)
                if found < best:
                    best, best_step = found, done
                    kept = [parameter.detach().clone() for parameter in parameters]
                progress("train", done, schedule.steps, f"held-out loss {best:.3g}, was {before:.3g}")
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return Outcome(before, best, best_step, done, stopped)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor, latent: Tensor, inside: Tensor) -> Tensor:
        context.save_for_backward(inside)
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (inside,) = context.saved_tensors
        return gradients[0], gradients[0] * inside, None


def straight_through(value: Tensor, latent: Tensor, inside: Tensor) -> Tensor:
    """`value`, whose gradient reaches `latent` too, unchanged, where `inside` is true; all of one shape."""
    found: Tensor = _StraightThrough.apply(value, latent, inside)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def _judged(weights: Callable[[bool], Weights], objective: Objective) -> float:
    found = objective.held_out(weights(True))
    return found if math.isfinite(found) else math.inf
