"""Drawing of tokens from a model's predictions."""

from __future__ import annotations

import torch
from torch import Tensor

_UNIT = 1 << 52  # of probability; sums stay exact whatever their order, which on a GPU changes from run to run


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """A token for each row, by inversion of its cumulative distribution.

    Args:
        probabilities: float `[rows, vocabulary]`, each row summing to 1.
        uniform: float64 `[rows]`, in [0, 1).

    Returns:
        int64 `[rows]`.
    """
    cumulative = (probabilities.double() * _UNIT).long().cumsum(-1)
    mass = (uniform * cumulative[:, -1]).long()
    drawn = torch.searchsorted(cumulative, mass[:, None], right=True).squeeze(1)
    return drawn.clamp_(max=probabilities.shape[1] - 1)
