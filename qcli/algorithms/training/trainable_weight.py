"""Quantized weights as parameters of gradient training, for every format.

Tables are trained as changes in units of their own size, latent weights in quantization steps (ours), so that one
learning rate for each fits every layer and format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from qcli.algorithms.solvers.tiles import together
from qcli.algorithms.training.trainable_bias import TrainableBias
from qcli.core.straight_through import through_rounding
from qcli.core.weight import QuantizedWeight


class TrainableWeight(nn.Module):
    """A quantized weight whose tables, latent weights or both are parameters; training starts exactly at its codes.

    A module, so that FSDP can shard it: every tensor as large as the weight is a parameter, trained or not.

    Args:
        weight: the initial weight; it stays as it is.
        target: float32 `[out, in]`; latents start as near to it as the codes allow; None: at the decoded weight.
        train: what is trained: `tables`, `weights` (the latent weights behind the codes) or both.
        table_units: of each table that can be trained; None: those of `Format.table_units`.

    Attributes:
        initial: the initial weight.
        table_changes: change of each trained table, in its units; initially 0.
        latents: float32 `[out, in]`; None if latent weights are not trained (see `Format.trained_latents`).
        latent_units: of the same shape; None if they are not trained, or have none.
    """

    latents: nn.Parameter | None
    latent_units: nn.Parameter | None
    table_changes: nn.ParameterDict

    def __init__(
        self,
        weight: QuantizedWeight,
        target: Tensor | None,
        train: Collection[str],
        table_units: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.initial, self.format = weight, weight.format
        self._float_tables = self.format.float_tables(weight.tables)
        units = self.format.table_units(self._float_tables) if table_units is None else table_units
        self.table_units = dict(units) if "tables" in train else {}
        self.table_changes = nn.ParameterDict(
            {name: torch.zeros_like(self._float_tables[name]) for name in self.table_units}
        )
        self.latents = self.latent_units = None
        if "weights" in train:
            latents, latent_units = self.format.trained_latents(weight, weight.dense() if target is None else target)
            self.latents = nn.Parameter(latents.contiguous())
            self.latent_units = None if latent_units is None else nn.Parameter(latent_units, requires_grad=False)

    def dense(self, *, as_stored: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight, `[out, in]`.

        Args:
            as_stored: exactly as `quantized` will decode, without gradients. Otherwise the same values in
                differentiable form: gradients reach the tables through their rounding, and latents straight through
                theirs.
            dtype: that values are rounded to.
        """
        if as_stored:
            return self.quantized().dense().to(dtype)
        tables = self._rounded_tables()
        if self.latents is None:
            return self.format.decode_as(self.initial.codes, tables, dtype)
        return self.format.fake_quantize(self.latents, self.latent_units, tables, dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight in its format, as it will be stored."""
        tables = self.format.round_tables(self._changed_tables(), self.initial.tables)
        codes = self.initial.codes
        if self.latents is not None:
            codes = self.format.latent_codes(self.latents, self.latent_units, tables)
        return QuantizedWeight(self.format, self.initial.shape, codes, tables)

    def _changed_tables(self) -> dict[str, Tensor]:
        """Float tables with their changes, not rounded; differentiable in `table_changes`."""
        return self._float_tables | {
            name: torch.addcmul(self._float_tables[name], self.table_units[name], self.table_changes[name])
            for name in self.table_units
        }

    def _rounded_tables(self) -> dict[str, Tensor]:
        """Float tables rounded as they will be stored; gradients pass the rounding unchanged."""
        changed = self._changed_tables()
        with torch.no_grad():
            rounded = self.format.float_tables(self.format.round_tables(changed, self.initial.tables))
        return rounded | {name: through_rounding(rounded[name], changed[name]) for name in self.table_units}


class TrainableWeights(nn.Module):
    """Quantized weights of several linears as parameters. Small ones whose groups are alike are trained as one weight:
    one operation does for all of them what each would need its own for.

    Args:
        weights: by path; they stay as they are.
        targets: float32 `[out, in]`, by path, on any device; None: the decoded weights.
        train: as for `TrainableWeight`.

    Attributes:
        initial: the weights.
    """

    def __init__(
        self, weights: Mapping[str, QuantizedWeight], targets: Mapping[str, Tensor] | None, train: Collection[str]
    ) -> None:
        super().__init__()
        self.initial = dict(weights)
        rows = {path: weight.format.as_rows(weight) for path, weight in weights.items()}
        self._rows = {path: weight.shape[0] for path, weight in rows.items()}
        kinds = {
            path: (weight.format, weight.shape[1]) if weight.format.alike else path for path, weight in rows.items()
        }
        sizes = ((path, kinds[path], weight.codes.numel()) for path, weight in rows.items())
        self._paths, parts = [paths for _, paths in together(sizes)], []
        for paths in self._paths:
            target = None
            if targets is not None:
                device = rows[paths[0]].codes.device
                target = _joined([weights[path].format.values_as_rows(targets[path].to(device)) for path in paths])
            units = [_table_units(weights[path]) for path in paths]
            joined = {name: _joined([own[name] for own in units]) for name in units[0]}
            parts.append(TrainableWeight(_one_weight([rows[path] for path in paths]), target, train, joined))
        self._parts = nn.ModuleList(parts)

    @property
    def parts(self) -> list[TrainableWeight]:
        """What is trained as one weight each."""
        return list(cast("Iterable[TrainableWeight]", self._parts))

    def dense(self, *, as_stored: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The dense weights, `[out, in]` by path; arguments as for `TrainableWeight.dense`."""
        found: dict[str, Tensor] = {}
        for paths, part in zip(self._paths, self.parts, strict=True):
            split = part.dense(as_stored=as_stored, dtype=dtype).split([self._rows[path] for path in paths])
            for path, rows in zip(paths, split, strict=True):
                weight = self.initial[path]
                found[path] = weight.format.values_from_rows(rows, weight.shape)
        return {path: found[path] for path in self.initial}

    def quantized(self) -> dict[str, QuantizedWeight]:
        """The weights in their formats, as they will be stored, by path."""
        found: dict[str, QuantizedWeight] = {}
        for paths, part in zip(self._paths, self.parts, strict=True):
            whole, last = part.quantized(), 0
            for path in paths:
                rows, weight = whole, self.initial[path]
                if len(paths) > 1:
                    own = slice(last, last := last + self._rows[path])
                    tables = {name: table[own] for name, table in whole.tables.items()}
                    rows = QuantizedWeight(whole.format, (self._rows[path], whole.shape[1]), whole.codes[own], tables)
                found[path] = weight.format.from_rows(rows, weight.shape)
        return {path: found[path] for path in self.initial}


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _one_weight(rows: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of one format whose rows do not depend on each other, one below the other."""
    if len(rows) == 1:
        return rows[0]
    codes = torch.cat([weight.codes for weight in rows])
    tables = {name: torch.cat([weight.tables[name] for weight in rows]) for name in rows[0].tables}
    return QuantizedWeight(rows[0].format, (codes.shape[0], codes.shape[1]), codes, tables)


def _table_units(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Of a layer, in the shapes of the tables of its rows."""
    units = weight.format.table_units(weight.format.float_tables(weight.tables))
    rows = weight.format.as_rows(QuantizedWeight(weight.format, weight.shape, weight.codes, units))
    return dict(rows.tables)


def parameter_groups(
    weights: Iterable[TrainableWeights], biases: Iterable[TrainableBias] = (), *, tables_lr: float, weights_lr: float
) -> list[dict[str, Any]]:
    """AdamW parameter groups: all trained tables and biases, and all trained latents, each at its own rate; empty ones
    left out."""
    parts = [part for layers in weights for part in layers.parts]
    tables = [change for part in parts for change in part.table_changes.values()]
    groups: list[dict[str, Any]] = [
        {"params": [*tables, *(bias.changes for bias in biases)], "lr": tables_lr},
        {"params": [part.latents for part in parts if part.latents is not None], "lr": weights_lr},
    ]
    return [group for group in groups if group["params"]]
