"""Passes of teacher and student over the same tokens, shared among processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qcli.algorithms.training.batches import Order
from qcli.algorithms.training.loop import Schedule
from qcli.algorithms.training.losses import kl_divergence, listed
from qcli.distillation.student import Predictions, Student, Teacher
from qcli.models.native import NativeSource
from qcli.models.open import Source
from qcli.models.stream import ModelStream
from qcli.recipe.distillation import Distillation
from qcli.utils.distributed import Processes
from qcli.utils.progress import Progress


@dataclass(frozen=True)
class Lesson:
    """What a distillation is given.

    Attributes:
        pupil, master: the student's checkpoint and the teacher.
        tokens: int64 `[samples, length]`; the last `held_out` are for judgements.
        seed: of the samples' order.
        device, dtype: of the models.
        fast: whether their matrix products may use bf16 or TF32 units.
    """

    pupil: NativeSource
    master: Source
    tokens: Tensor
    held_out: int
    options: Distillation
    seed: str
    device: torch.device
    dtype: torch.dtype
    fast: bool
    progress: Progress

    def stream(self, source: Source) -> ModelStream:
        """One of the two models."""
        return ModelStream(source, device=self.device, dtype=self.dtype)

    @property
    def n_trained(self) -> int:
        """Samples to train on."""
        return len(self.tokens) - self.held_out

    @property
    def pass_samples(self) -> int:
        """Samples of one pass through the model."""
        return max(1, self.options.batch_tokens // self.tokens.shape[1])

    @property
    def schedule(self) -> Schedule:
        """Of the optimizer."""
        asked = self.options
        return Schedule(
            asked.steps, asked.warmup, judgements=asked.judgements, clip=asked.clip, patience=asked.patience
        )


class Teaches(Protocol):
    """A teacher at hand, or what is remembered of one."""

    def __call__(self, rows: list[int], *, hidden: bool) -> Predictions:
        """Of these samples; `hidden`: with hidden states."""


class Present:
    """A teacher that is asked anew each time.

    Args:
        tokens: int64 `[samples, length]`.
    """

    def __init__(self, teacher: Teacher, tokens: Tensor) -> None:
        self.teacher, self.tokens = teacher, tokens

    def __call__(self, rows: list[int], *, hidden: bool) -> Predictions:
        found: Predictions = self.teacher(self.tokens[rows], hidden=hidden)
        return found


class Remembered:
    """The most likely tokens of a teacher that is gone, and the mass of all others.

    Args:
        found: of `remember`.
    """

    def __init__(self, found: dict[str, Tensor], device: torch.device) -> None:
        self.found, self.device = found, device

    def __call__(self, rows: list[int], *, hidden: bool) -> Predictions:
        assert not hidden, "no hidden state is remembered"
        likely, classes = (self.found[name][rows].flatten(0, 1).to(self.device) for name in ("likely", "classes"))
        return Predictions(likely, (), classes.long())


@torch.no_grad()
def remember(teacher: Teacher, tokens: Tensor, top: int, samples: int, progress: Progress) -> dict[str, Tensor]:
    """What `Remembered` needs: float32 `likely [samples, length, top + 1]` (log-probabilities, of all others last)
    and int32 `classes [samples, length, top]`."""
    parts: dict[str, list[Tensor]] = {"likely": [], "classes": []}
    batches = tokens.split(samples)
    for done, batch in enumerate(batches):
        progress("asking the teacher", done, len(batches))
        logits = teacher(batch, hidden=False).logits
        classes = logits.topk(top).indices
        parts["likely"].append(listed(logits, classes).view(*batch.shape, -1).cpu())
        parts["classes"].append(classes.view(*batch.shape, -1).int().cpu())
    progress("asking the teacher", len(batches), len(batches))
    return {name: torch.cat(part) for name, part in parts.items()}


class Teaching:
    """A student's predictions against its teacher's, a mean over tokens; judged by plain KL whatever the loss is.

    Processes share the passes of a step and the samples of a judgement, so that more of them change no figure but by
    rounding.

    `accumulate` must be a multiple of the number of processes.
    """

    def __init__(self, lesson: Lesson, student: Student, teacher: Teaches, processes: Processes) -> None:
        self.lesson, self.student, self.teacher, self.processes = lesson, student, teacher, processes
        self.order = Order(lesson.n_trained, lesson.seed)

    def backward(self, step: int) -> float:
        """Add a step's gradients; returns its loss."""
        total, options = 0.0, self.lesson.options
        parts, wants = options.accumulate, options.needs_hidden
        for part in range(self.processes.rank, parts, self.processes.world_size):
            rows = self.order.take(step * parts + part, self.lesson.pass_samples)
            wanted = self.teacher(rows, hidden=wants)
            found: Predictions = self.student(self.lesson.tokens[rows], final=False, hidden=wants)
            logits = found.over(wanted.classes)
            loss = options.token_losses(wanted.logits, logits, wanted.hidden, found.hidden).mean() / parts
            (loss * self.processes.world_size).backward()  # sharding takes the mean
            total += float(loss.detach())
        return self.processes.sum(total)

    def held_out(self) -> float:
        """Mean KL in nats a token; of what the teacher lists, where it lists some."""
        tokens, size = self.lesson.tokens, self.lesson.pass_samples
        total, held = 0.0, range(self.lesson.n_trained, len(tokens))
        shares = [list(held[first : first + size]) for first in range(0, len(held), size)]
        missing = (
            -len(shares) % self.processes.world_size
        )  # each process makes as many passes, or they wait for each other
        for number in range(self.processes.rank, len(shares) + missing, self.processes.world_size):
            rows = shares[number % len(shares)]
            wanted = self.teacher(rows, hidden=False)
            found: Predictions = self.student(self.lesson.tokens[rows], final=True, hidden=False)
            if number < len(shares):
                total += float(kl_divergence(wanted.logits, found.over(wanted.classes)).sum())
        return self.processes.sum(total) / (len(held) * tokens.shape[1])
