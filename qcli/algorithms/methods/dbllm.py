"""DB-LLM: flexible dual binarization (arXiv 2402.11960), two binary planes with a scale each for every group.

The paper splits the scale of a 2-bit grid in two and trains both by distillation (`start: published`; with
`refit_target`, `error_feedback` and `refit_tables` off, nothing but the paper's start is left). Ours, before any
training: scales by search and least squares under `diag(H)`, codes by error feedback towards the refitted target, and
exact least squares of all scales of a row at fixed codes. As in RaBiT, both planes follow from one latent weight, the
second from the error of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from qcli.algorithms.method import Unit
from qcli.algorithms.methods._feedback import PerLayerFeedback
from qcli.algorithms.methods._grouped import GroupedMethod
from qcli.core.formats.dual_binary import DualBinary

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["DBLLM"]


class DBLLM(GroupedMethod, PerLayerFeedback):
    """Two bits per weight as two binary planes; a start for block reconstruction and distillation."""

    name: ClassVar[str] = "dbllm"
    unit: ClassVar[Unit] = "row"

    bits: Literal[2] = Field(default=2, description="bits per weight's code, one for each plane")
    levels: Literal["fdb", "symmetric"] = Field(
        default="fdb", description="values of a plane: 0 and 1 as in the paper, or -1 and +1"
    )
    start: Literal["searched", "published"] = Field(
        default="searched",
        description="scales that codes are chosen with: of least error, or the paper's split of half of each group's "
        "largest weight, whose planes have more zeros",
    )
    refit_tables: bool = Field(default=True, description="least squares of all scales of a row at fixed codes")

    @model_validator(mode="after")
    def _published_for_bits(self) -> Self:
        if self.start == "published" and self.levels != "fdb":
            raise ValueError("start published splits the paper's levels: set levels to fdb, or start to searched")
        return self

    @property
    def format(self) -> DualBinary:
        return DualBinary(group_size=self.group_size, levels=self.levels)

    def refitted(self, columns: int) -> int:
        return 2 * self.format.groups(columns) if self.refit_tables else 0

    def fit_tables(self, target: Tensor, importance: Tensor) -> dict[str, Tensor]:
        from qcli.algorithms.solvers import dual_binary

        if self.start == "published":
            return dual_binary.published(target, self.format)
        return dual_binary.fit(target, self.format, importance)

    def fit_layers(self, stacked: Tensor, rows: Sequence[int], importance: Tensor) -> list[dict[str, Tensor]]:
        """All layers at once: no tables are shared by rows."""
        tables = self.fit_tables(stacked, importance)
        parts = {name: table.split([*rows]) for name, table in tables.items()}
        return [{name: part[layer] for name, part in parts.items()} for layer in range(len(rows))]

    def refit(self, target: Tensor, weight: QuantizedWeight, hessian: Tensor) -> tuple[QuantizedWeight, list[str]]:
        from qcli.algorithms.solvers import dual_binary

        if not self.refit_tables:
            return weight, []
        weight, unusable = dual_binary.refit(target, weight, self.format, hessian)
        note = f"scale refit unusable in {unusable} of {len(target)} rows: kept the searched scales"
        return weight, [note] if unusable else []
