"""What formats with tables for each group of a row share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from qcli.core.weight import Format

if TYPE_CHECKING:
    from torch import Tensor


class Grouped(Format):
    """A format whose tables hold numbers for every `group_size` weights of a row; a row's last group may be shorter."""

    group_size: int = Field(ge=-1, description="weights of a row that share a group's numbers; -1: the whole row")

    def group_width(self, in_features: int) -> int:
        """Weights of a whole group in a row of `in_features`."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Groups in a row, the ragged last one included."""
        return -(-in_features // self.group_width(in_features))

    def groups_of(self, columns: Tensor) -> Tensor:
        """The group that each column belongs to, int64."""
        return columns // self.group_size if self.group_size > 0 else columns * 0

    def columns(self, tables: Mapping[str, Tensor], columns: slice) -> Mapping[str, Tensor]:
        if self.group_size == -1:
            return tables
        groups = slice(columns.start // self.group_size, -(-columns.stop // self.group_size))
        return {name: table[:, groups] for name, table in tables.items()}

    def grouped(self, rows: Tensor) -> Tensor:
        """`[out, in]` -> `[out, groups, group_size]`; a ragged last group is filled up with zeros."""
        from torch.nn import functional as F

        width, in_features = self.group_width(rows.shape[1]), rows.shape[1]
        if in_features % width:
            rows = F.pad(rows, (0, width - in_features % width))
        return rows.reshape(rows.shape[0], -1, width)


class Leveled(Grouped):
    """A format whose levels are not evenly spaced."""

    def entries(self, tables: Mapping[str, Tensor]) -> Tensor:
        """What each code stands for in each group, float32 `[out, groups, 2**bits]`."""
        raise NotImplementedError

    def steps(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        found = gaps(self.entries(tables)).gather(2, self.grouped(codes).long())
        return found.view(codes.shape[0], -1)[:, : codes.shape[1]]


def gaps(entries: Tensor) -> Tensor:
    """The distance of each entry to the nearest other one: `[..., K]` -> the same."""
    import torch
    from torch.nn import functional as F

    ordered, order = entries.sort(dim=-1)
    between = F.pad(ordered.diff(dim=-1), (1, 1), value=torch.inf)
    nearest = between[..., 1:].minimum(between[..., :-1])
    return torch.empty_like(nearest).scatter_(-1, order, nearest)
