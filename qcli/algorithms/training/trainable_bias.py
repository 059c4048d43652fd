"""The bias of a linear layer as a parameter of gradient training, rounded as it will be stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcli.core.straight_through import through_rounding

_SMALLEST_UNIT = 0.1  # of the mean magnitude, as for tables; of 1 where all of a bias is 0


class TrainableBias(nn.Module):
    """A bias that is trained as changes in units of its own size (ours), so that it shares the rate of tables.

    Args:
        initial: `[out]`, in the dtype that it is stored in; it stays as it is.

    Attributes:
        changes: float32 `[out]`, initially 0.
    """

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.initial = initial
        size = initial.float().abs()
        self._start, self._unit = initial.float(), size.clamp(min=_SMALLEST_UNIT * (float(size.mean()) or 1.0))
        self.changes = nn.Parameter(torch.zeros_like(self._start))

    def value(self, *, as_stored: bool) -> Tensor:
        """float32 `[out]`: the values of `stored`; gradients pass their rounding unchanged.

        Args:
            as_stored: without gradients.
        """
        if as_stored:
            return self.stored().float()
        changed = self._start + self._unit * self.changes
        return through_rounding(changed.detach().to(self.initial.dtype).float(), changed)

    @torch.no_grad()
    def stored(self) -> Tensor:
        """`[out]`, in the dtype of `initial`."""
        return (self._start + self._unit * self.changes).to(self.initial.dtype)
