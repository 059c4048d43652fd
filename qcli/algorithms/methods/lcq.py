"""LCQ: low-rank codebooks (arXiv 2405.20973), a codebook for each group, all combined from a few basis vectors.

The paper trains codebooks by gradient on the block's output. Here that is the last of five steps, the first four are
ours: codebooks are fitted by alternating least squares under `diag(H)`, columns are quantized with error feedback, all
scales and offsets of a row are refitted at fixed codes, and the block reconstruction (`steps`) trains codes and tables
jointly, with tables rounded as they will be stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from qcli.algorithms.method import Unit
from qcli.algorithms.methods._feedback import PerLayerFeedback
from qcli.algorithms.methods._grouped import GroupedMethod
from qcli.algorithms.refine import Refine
from qcli.core.formats.codebook import Codebook

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["LCQ"]


class LCQ(GroupedMethod, PerLayerFeedback):
    """Codebooks `C = S^T V - B` of rank `rank`, one row for each group."""

    name: ClassVar[str] = "lcq"
    unit: ClassVar[Unit] = "layer"

    rank: int = Field(default=1, ge=1, le=16, description="basis vectors that a layer's codebooks are combined from")
    table_bits: Literal[8, 16] = Field(
        default=8, description="bits of a group's scales and offset; 8: with a float16 scale for every 256 of them"
    )
    basis_rows: int = Field(default=0, ge=0, description="rows of a weight that share a basis; 0: all")
    refit_tables: bool = Field(
        default=True, description="least squares of all scales and offsets of a row at fixed codes"
    )
    steps: int = Field(
        default=200, ge=0, description="steps of the block reconstruction, unless the recipe has a refine section"
    )

    @model_validator(mode="after")
    def _rank_below_entries(self) -> LCQ:
        if self.rank >= 1 << self.bits:
            raise ValueError(f"rank {self.rank} must be below the 2**bits = {1 << self.bits} entries of a codebook")
        return self

    @property
    def format(self) -> Codebook:
        return Codebook(
            bits=self.bits,
            group_size=self.group_size,
            rank=self.rank,
            table_bits=self.table_bits,
            basis_rows=self.basis_rows,
        )

    @property
    def refine(self) -> Refine | None:
        return Refine(steps=self.steps) if self.steps else None

    def refitted(self, columns: int) -> int:
        return (self.rank + 1) * self.format.groups(columns) if self.refit_tables else 0

    def fit_tables(self, target: Tensor, importance: Tensor) -> dict[str, Tensor]:
        from qcli.algorithms.solvers import codebook

        return codebook.fit(target, self.format, importance)

    def refit(self, target: Tensor, weight: QuantizedWeight, hessian: Tensor) -> tuple[QuantizedWeight, list[str]]:
        from qcli.algorithms.solvers import codebook

        if not self.refit_tables:
            return weight, []
        weight, unusable = codebook.refit(target, weight, self.format, hessian)
        note = f"scale refit unusable in {unusable} of {len(target)} rows: kept the fitted scales"
        return weight, [note] if unusable else []
