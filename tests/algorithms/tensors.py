"""Random tensors of the tests of algorithms."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32 values; the same arguments give the same values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
