"""LCQ: low-rank codebooks (arXiv 2405.20973).

Groups with codebooks of their own, all made of a few shapes. The paper learns them by gradient on the block's output;
here that is the last of five steps: codebooks are fitted by alternating least squares under `diag(H)`, columns are
quantized with error feedback on them, scales and offsets are solved for once the codes are fixed, and the block's
reconstruction (`steps`) trains codes and tables together, rounded as they will be stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from qcli.algorithms.methods._feedback import LayerByLayer
from qcli.algorithms.methods._grouped import GroupedMethod
from qcli.algorithms.refine import Refine
from qcli.core.formats.codebook import Codebook

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["LCQ"]


class LCQ(GroupedMethod, LayerByLayer):
    """Codebooks `C = S^T V - B` of rank `rank`, one row for each group."""

    name: ClassVar[str] = "lcq"

    rank: int = Field(default=1, ge=1, le=16, description="shapes that the codebooks of a layer are made of")
    table_bits: Literal[8, 16] = Field(
        default=8, description="of a group's scales and offset; 8: with one float16 scale for 256 of them"
    )
    basis_rows: int = Field(default=0, ge=0, description="rows of a weight that share a basis; 0: all")
    refit_tables: bool = Field(default=True, description="least squares of all scales of a row at fixed codes")
    steps: int = Field(
        default=200, ge=0, description="of the block reconstruction that ends the method, if the recipe names no other"
    )

    @model_validator(mode="after")
    def _rank_means_something(self) -> LCQ:
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

    def start(self, target: Tensor, importance: Tensor) -> dict[str, Tensor]:
        from qcli.algorithms.solvers import codebook

        return codebook.fit(target, self.format, importance)

    def finish(self, target: Tensor, weight: QuantizedWeight, hessian: Tensor) -> tuple[QuantizedWeight, list[str]]:
        from qcli.algorithms.solvers import codebook

        if not self.refit_tables:
            return weight, []
        weight, kept = codebook.refit(target, weight, self.format, hessian)
        note = f"scale refit unusable in {kept} of {len(target)} rows: kept the fitted scales"
        return weight, [note] if kept else []
