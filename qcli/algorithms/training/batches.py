"""Which samples a training step sees, and which none ever does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Split(Generic[T]):
    """Something of the samples that are trained on, and the same of those that decide which step is kept."""

    training: T
    held_out: T

    def map(self, function: Callable[[T], U]) -> Split[U]:
        """`function` of both sides."""
        return Split(function(self.training), function(self.held_out))


@dataclass(frozen=True)
class Sampling:
    """How training samples are drawn.

    Attributes:
        batch_tokens: tokens of a step; at least one sample.
        seed: of their order.
    """

    batch_tokens: int
    seed: str

    def samples(self, length: int) -> int:
        """How many samples of `length` tokens a step takes."""
        return max(1, self.batch_tokens // length)


class Order:
    """Samples in an order shuffled anew each time all have been seen."""

    def __init__(self, count: int, seed: str) -> None:
        self.count, self.seed = count, seed

    def take(self, step: int, size: int) -> list[int]:
        """The `size` samples of a step."""
        places = range(step * size, (step + 1) * size)
        return [self._round(place // self.count)[place % self.count] for place in places]

    def _round(self, number: int) -> list[int]:
        samples = list(range(self.count))
        random.Random(f"{self.seed}:{number}").shuffle(samples)
        return samples


def rows(batches: list[Tensor], picks: Sequence[int]) -> Tensor:
    """Samples by their number, from batches of which only the last may be smaller."""
    size = len(batches[0])
    return torch.stack([batches[pick // size][pick % size] for pick in picks])
