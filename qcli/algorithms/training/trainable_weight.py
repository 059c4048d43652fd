"""One quantized weight as parameters of gradient training, whatever its format (see `refine.py` for the choices)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qcli.algorithms.training.loop import straight_through
from qcli.core.weight import QuantizedWeight


class TrainedWeight(nn.Module):
    """`latent` in steps from its start, `relative` changes of its tables.

    A module, so that parameters can be sharded; what is as large as the weight is a parameter, trained or not.

    Args:
        weight: where training starts; formats are not changed by it.
        target: float32 `[out, in]`: what latents start near to; None: what the codes stand for.
        train: `tables`, `weights` (the latent values behind the codes) or both.
    """

    latent: nn.Parameter | None
    relative: nn.ParameterDict

    def __init__(self, weight: QuantizedWeight, target: Tensor | None, train: Collection[str]) -> None:
        super().__init__()
        self.given, self.format = weight, weight.format
        self.relaxed = self.format.float_tables(weight.tables)
        self.unit = self.format.table_units(self.relaxed) if "tables" in train else {}
        self.relative = nn.ParameterDict({name: torch.zeros_like(self.relaxed[name]) for name in self.unit})
        self.latent = None
        if "weights" in train:
            dense = weight.dense()
            step = self.format.step_sizes(weight.codes, weight.tables)
            start = self.format.initial_latents(dense if target is None else target, dense, step)
            moved = self.format.encode(start, weight.tables) != weight.codes
            self.start = nn.Parameter(torch.where(moved, dense, start), requires_grad=False)
            self.step = nn.Parameter(step, requires_grad=False)
            self.latent = nn.Parameter(torch.zeros_like(dense))

    def moved(self) -> dict[str, Tensor]:
        """Relaxed tables as they are now; differentiable."""
        return self.relaxed | {name: self.relaxed[name] + self.unit[name] * self.relative[name] for name in self.unit}

    def tables(self) -> dict[str, Tensor]:
        """Relaxed tables as they will be stored; their gradient reaches `moved` unchanged."""
        moved = self.moved()
        with torch.no_grad():
            stored = self.format.float_tables(self.format.round_tables(moved, self.given.tables))
        return stored | {name: stored[name] + (moved[name] - moved[name].detach()) for name in self.unit}

    def dense(self, *, final: bool) -> Tensor:
        """The weight as stored, or with a straight-through gradient to latents as the format's `slope` lets through."""
        if final:
            return self.weight().dense()
        tables = self.tables()
        if self.latent is None:
            return self.format.decode(self.given.codes, tables)
        latent = self.start + self.step * self.latent
        with torch.no_grad():
            codes = self.format.encode(latent, tables)
        value = self.format.decode(codes, tables)
        return straight_through(value, latent, self.format.ste_slope(latent.detach(), value.detach(), self.step))

    @torch.no_grad()
    def weight(self) -> QuantizedWeight:
        """As it will be stored."""
        tables = self.format.round_tables(self.moved(), self.given.tables)
        codes = self.given.codes
        if self.latent is not None:
            codes = self.format.encode(self.start + self.step * self.latent, tables)
        return QuantizedWeight(self.format, self.given.shape, codes, tables)


def parameter_groups(layers: Iterable[TrainedWeight], *, tables_lr: float, weights_lr: float) -> list[dict[str, Any]]:
    """What the optimizer trains, at separate rates for tables and latents."""
    trained = list(layers)
    groups: list[dict[str, Any]] = [
        {"params": [table for layer in trained for table in layer.relative.values()], "lr": tables_lr},
        {"params": [layer.latent for layer in trained if layer.latent is not None], "lr": weights_lr},
    ]
    return [group for group in groups if group["params"]]
