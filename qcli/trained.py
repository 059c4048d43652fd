"""One quantized weight as parameters of gradient training, whatever its format (see `refine.py` for the choices)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from qcli.quantized import QuantizedWeight
from qcli.training import straight_through


class TrainedWeight:
    """`latent` in steps from its start, `relative` changes of its tables.

    Args:
        weight: where training starts; formats are not changed by it.
        target: float32 `[out, in]`: what latents start near to.
        train: `tables`, `weights` (the latent values behind the codes) or both.
    """

    def __init__(self, weight: QuantizedWeight, target: Tensor, train: Collection[str]) -> None:
        self.given, self.format = weight, weight.format
        dense = weight.dense()
        self.step = self.format.steps(weight.codes, weight.tables)
        start = self.format.latents(target, dense, self.step)
        moved = self.format.encode(start, weight.tables) != weight.codes
        self.start = torch.where(moved, dense, start)
        self.latent = torch.zeros_like(dense).requires_grad_("weights" in train)
        self.relaxed = self.format.relaxed(weight.tables)
        self.unit = self.format.units(self.relaxed) if "tables" in train else {}
        self.relative = {name: torch.zeros_like(self.relaxed[name]).requires_grad_() for name in self.unit}

    def moved(self) -> dict[str, Tensor]:
        """Relaxed tables as they are now; differentiable."""
        return self.relaxed | {name: self.relaxed[name] + self.unit[name] * self.relative[name] for name in self.unit}

    def tables(self) -> dict[str, Tensor]:
        """Relaxed tables as they will be stored; their gradient reaches `moved` unchanged."""
        moved = self.moved()
        with torch.no_grad():
            stored = self.format.relaxed(self.format.restored(moved, self.given.tables))
        return stored | {name: stored[name] + (moved[name] - moved[name].detach()) for name in self.unit}

    def dense(self, *, final: bool) -> Tensor:
        """The weight as stored, or with a straight-through gradient to latents as the format's `slope` lets through."""
        if final:
            return self.weight().dense()
        tables = self.tables()
        if not self.latent.requires_grad:
            return self.format.decode(self.given.codes, tables)
        latent = self.start + self.step * self.latent
        with torch.no_grad():
            codes = self.format.encode(latent, tables)
        value = self.format.decode(codes, tables)
        return straight_through(value, latent, self.format.slope(latent.detach(), value.detach(), self.step))

    def weight(self) -> QuantizedWeight:
        """As it will be stored."""
        tables = self.format.restored(self.moved(), self.given.tables)
        codes = self.given.codes
        if self.latent.requires_grad:
            codes = self.format.encode(self.start + self.step * self.latent.detach(), tables)
        return QuantizedWeight(self.format, self.given.shape, codes, tables)
