"""Samples of a training: the training/held-out split, and which samples each step sees."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Split(Generic[T]):
    """The same data of two disjoint sets of samples: those trained on, and those that select the best step."""

    training: T
    held_out: T

    def map(self, function: Callable[[T], U]) -> Split[U]:
        """`function` applied to both sides."""
        return Split(function(self.training), function(self.held_out))


@dataclass(frozen=True)
class Sampling:
    """How training batches are drawn.

    Attributes:
        batch_tokens: tokens per batch; a batch holds at least one sample.
        seed: of the shuffle.
    """

    batch_tokens: int
    seed: str

    def sampler(self, n_samples: int, length: int) -> BatchSampler:
        """A sampler over `n_samples` samples of `length` tokens each."""
        return BatchSampler(n_samples, max(1, self.batch_tokens // length), self.seed)


class BatchSampler:
    """Sample indices of each training step, a pure function of the step, so that a resumed run sees the same batches.

    The samples are cut into as many stretches as a batch has samples, and a batch takes one of each: where processes
    have equal shares of consecutive samples, they have equal shares of every batch too. Every epoch visits all samples
    of a stretch once in an order of its own.

    Args:
        n_samples: samples in total.
        batch_size: samples per step.
        seed: of the shuffle.
    """

    def __init__(self, n_samples: int, batch_size: int, seed: str) -> None:
        self.batch_size, self.seed = batch_size, seed
        count = min(batch_size, n_samples)
        self._stretches = [range(n_samples * n // count, n_samples * (n + 1) // count) for n in range(count)]

    def indices(self, step: int) -> list[int]:
        """The `batch_size` sample indices of a step, counted from 0."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._sample(*divmod(position, len(self._stretches))) for position in positions]

    def _sample(self, turn: int, number: int) -> int:
        """What stretch `number` gives at its `turn`."""
        samples = list(self._stretches[number])
        epoch, place = divmod(turn, len(samples))
        random.Random(f"{self.seed}:{epoch}" + (f":{number}" if number else "")).shuffle(samples)
        return samples[place]
