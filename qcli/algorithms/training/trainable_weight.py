"""A quantized weight as parameters of gradient training, for every format.

Tables are trained as changes in units of their own size, latent weights as changes in quantization steps (ours), so
that one learning rate for each fits every layer and format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qcli.algorithms.training.straight_through import straight_through, through_rounding
from qcli.algorithms.training.trainable_bias import TrainableBias
from qcli.core.weight import QuantizedWeight


class TrainableWeight(nn.Module):
    """A quantized weight whose tables, latent weights or both are parameters; training starts exactly at its codes.

    A module, so that FSDP can shard it: every tensor as large as the weight is a parameter, trained or not.

    Args:
        weight: the initial weight; it stays as it is.
        target: float32 `[out, in]`; latents start as near to it as the codes allow; None: at the decoded weight.
        train: what is trained: `tables`, `weights` (the latent weights behind the codes) or both.

    Attributes:
        initial: the initial weight.
        table_changes: change of each trained table, in `table_units`; initially 0.
        initial_latents: float32 `[out, in]`; only if latent weights are trained.
        step_sizes: float32 `[out, in]`, the quantization step at each initial code; likewise.
        latent_changes: float32 `[out, in]`, change of each latent weight in units of its step, initially 0; None if
            latent weights are not trained.
    """

    latent_changes: nn.Parameter | None
    table_changes: nn.ParameterDict

    def __init__(self, weight: QuantizedWeight, target: Tensor | None, train: Collection[str]) -> None:
        super().__init__()
        self.initial, self.format = weight, weight.format
        self._float_tables = self.format.float_tables(weight.tables)
        self.table_units = self.format.table_units(self._float_tables) if "tables" in train else {}
        self.table_changes = nn.ParameterDict(
            {name: torch.zeros_like(self._float_tables[name]) for name in self.table_units}
        )
        self.latent_changes = None
        if "weights" in train:
            dense = weight.dense()
            step = self.format.step_sizes(weight.codes, weight.tables)
            start = self.format.initial_latents(dense if target is None else target, dense, step)
            recoded = self.format.encode(start, weight.tables) != weight.codes
            self.initial_latents = nn.Parameter(torch.where(recoded, dense, start), requires_grad=False)
            self.step_sizes = nn.Parameter(step, requires_grad=False)
            self.latent_changes = nn.Parameter(torch.zeros_like(dense))

    def dense(self, *, as_stored: bool) -> Tensor:
        """The dense weight, float32 `[out, in]`.

        Args:
            as_stored: exactly as `quantized` will decode, without gradients. Otherwise the same values in
                differentiable form: gradients reach the tables through their rounding, and latents straight through
                theirs, times the format's `ste_slope`.
        """
        if as_stored:
            return self.quantized().dense()
        tables = self._rounded_tables()
        if self.latent_changes is None:
            return self.format.decode(self.initial.codes, tables)
        latent = self.initial_latents + self.step_sizes * self.latent_changes
        with torch.no_grad():
            codes = self.format.encode(latent, tables)
        value = self.format.decode(codes, tables)
        return straight_through(value, latent, self.format.ste_slope(latent.detach(), value.detach(), self.step_sizes))

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight in its format, as it will be stored."""
        tables = self.format.round_tables(self._changed_tables(), self.initial.tables)
        codes = self.initial.codes
        if self.latent_changes is not None:
            codes = self.format.encode(self.initial_latents + self.step_sizes * self.latent_changes, tables)
        return QuantizedWeight(self.format, self.initial.shape, codes, tables)

    def _changed_tables(self) -> dict[str, Tensor]:
        """Float tables with their changes, not rounded; differentiable in `table_changes`."""
        return self._float_tables | {
            name: self._float_tables[name] + self.table_units[name] * self.table_changes[name]
            for name in self.table_units
        }

    def _rounded_tables(self) -> dict[str, Tensor]:
        """Float tables rounded as they will be stored; gradients pass the rounding unchanged."""
        changed = self._changed_tables()
        with torch.no_grad():
            rounded = self.format.float_tables(self.format.round_tables(changed, self.initial.tables))
        return rounded | {name: through_rounding(rounded[name], changed[name]) for name in self.table_units}


def parameter_groups(
    weights: Iterable[TrainableWeight], biases: Iterable[TrainableBias] = (), *, tables_lr: float, weights_lr: float
) -> list[dict[str, Any]]:
    """AdamW parameter groups: all trained tables and biases, and all trained latents, each at its own rate; empty ones
    left out."""
    weights = list(weights)
    tables = [change for weight in weights for change in weight.table_changes.values()]
    groups: list[dict[str, Any]] = [
        {"params": [*tables, *(bias.changes for bias in biases)], "lr": tables_lr},
        {
            "params": [weight.latent_changes for weight in weights if weight.latent_changes is not None],
            "lr": weights_lr,
        },
    ]
    return [group for group in groups if group["params"]]
