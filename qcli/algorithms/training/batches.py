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

    Every epoch visits all samples once in an order of its own; a batch may span the end of an epoch.

    Args:
        n_samples: samples in total.
        batch_size: samples per step.
        seed: of the shuffle.
    """

    def __init__(self, n_samples: int, batch_size: int, seed: str) -> None:
        self.n_samples, self.batch_size, self.seed = n_samples, batch_size, seed

    def indices(self, step: int) -> list[int]:
        """The `batch_size` sample indices of a step, counted from 0."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._epoch(position // self.n_samples)[position % self.n_samples] for position in positions]

    def _epoch(self, epoch: int) -> list[int]:
        samples = list(range(self.n_samples))
        random.Random(f"{self.seed}:{epoch}").shuffle(samples)
        return samples
