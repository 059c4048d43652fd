"""Formats whose tables have entries for each group of weights in a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from qcli.core.weight import Format

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qcli.core.fake_look_up import Rule
    from qcli.core.weight import QuantizedWeight


class Grouped(Format):
    """A format with table entries for every `group_size` weights of a row; a row's last group may be shorter."""

    group_size: int = Field(ge=-1, description="weights of a row that share table entries; -1: the whole row")

    @field_validator("group_size")
    @classmethod
    def _not_empty(cls, size: int) -> int:
        if size == 0:
            raise ValueError("a group has at least 1 weight")
        return size

    def group_width(self, in_features: int) -> int:
        """Weights in a full group of a row of `in_features`."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Groups in a row, including a shorter last one."""
        return -(-in_features // self.group_width(in_features))

    def groups_of(self, columns: Tensor) -> Tensor:
        """Group of each column, int64 of the same shape."""
        return columns // self.group_size if self.group_size > 0 else columns * 0

    @property
    def column_step(self) -> int:
        return max(1, self.group_size)

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        groups = self.groups_between(columns)
        return self, {name: table[rows, groups] for name, table in tables.items()}

    def groups_between(self, columns: slice) -> slice:
        """The groups that these columns are in."""
        if self.group_size == -1:
            return slice(None)
        return slice(columns.start // self.group_size, -(-columns.stop // self.group_size))

    def nonzero_groups(self, target: Tensor) -> Tensor:
        """Groups that are not all 0: `[out, in]` -> bool `[out, groups]`."""
        return self.grouped(target != 0).any(-1)

    def grouped(self, rows: Tensor) -> Tensor:
        """`[out, in]` -> `[out, groups, group_size]`; a shorter last group is padded with zeros."""
        from torch.nn import functional as F

        width, in_features = self.group_width(rows.shape[1]), rows.shape[1]
        if in_features % width:
            rows = F.pad(rows, (0, width - in_features % width))
        return rows.reshape(rows.shape[0], -1, width)


class IndependentGroups(Grouped):
    """A format whose groups share no tables, so that each can be a row of another weight."""

    @property
    def alike(self) -> bool:
        return True

    def as_rows(self, weight: QuantizedWeight) -> QuantizedWeight:
        from qcli.core.weight import QuantizedWeight

        codes = self.values_as_rows(weight.codes)
        tables = {name: table.reshape(-1, 1) for name, table in weight.tables.items()}
        whole = self.model_copy(update={"group_size": -1})
        return QuantizedWeight(whole, (codes.shape[0], codes.shape[1]), codes, tables)

    def from_rows(self, rows: QuantizedWeight, shape: tuple[int, int]) -> QuantizedWeight:
        from qcli.core.weight import QuantizedWeight

        tables = {name: table.view(shape[0], -1) for name, table in rows.tables.items()}
        return QuantizedWeight(self, shape, self.values_from_rows(rows.codes, shape).contiguous(), tables)

    def values_as_rows(self, values: Tensor) -> Tensor:
        return self.grouped(values).flatten(0, 1)

    def values_from_rows(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        return rows.view(shape[0], -1)[:, : shape[1]]


class NonUniform(Grouped):
    """A format whose levels are not evenly spaced: each group has a codebook."""

    def entries(self, tables: Mapping[str, Tensor]) -> Tensor:
        """The codebook of each group, float32 `[out, groups, 2**bits]`."""
        raise NotImplementedError

    def step_sizes(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        steps = nearest_gaps(self.entries(tables)).gather(2, self.grouped(codes).long())
        return steps.view(codes.shape[0], -1)[:, : codes.shape[1]]

    def look_up_tables(self, tables: Mapping[str, Tensor]) -> tuple[Rule, Tensor]:
        """The codebook of each group as `fake_look_up` takes it: its rule and tables, `[out, groups, n]`."""
        return "table", self.entries(tables).sort(dim=-1, stable=True).values

    def fake_quantize(
        self, latents: Tensor, units: Tensor | None, tables: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """As for all formats; on a GPU in two passes over the weight where the kernels take it."""
        from qcli.utils import triton_kernels

        assert units is not None
        if not triton_kernels.serve(latents.device):
            return super().fake_quantize(latents, units, tables, dtype)
        from qcli.core.fake_look_up import fake_look_up, holds

        if not holds(self.group_width(latents.shape[1]), 1 << self.bits):
            return super().fake_quantize(latents, units, tables, dtype)
        rule, found = self.look_up_tables(tables)
        value = fake_look_up(self.grouped(latents), self.grouped(units), found, rule, dtype)
        return value.view(latents.shape[0], -1)[:, : latents.shape[1]]


def nearest_gaps(entries: Tensor) -> Tensor:
    """Distance of each entry to the nearest other one: `[..., K]` -> `[..., K]`."""
    import torch
    from torch.nn import functional as F

    ordered, order = entries.sort(dim=-1)
    between = F.pad(ordered.diff(dim=-1), (1, 1), value=torch.inf)
    nearest = between[..., 1:].minimum(between[..., :-1])
    return torch.empty_like(nearest).scatter_(-1, order, nearest)
