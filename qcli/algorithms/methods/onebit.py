"""OneBit: signs, with a scale for each input and each output channel (arXiv 2402.11295).

The paper starts from the sign-value decomposition of the weight and puts a LayerNorm after every linear (`paper`).
Ours, before any training: the decomposition is that of the refitted target, weighted by `diag(H)`; signs are chosen
with error feedback and both scales refitted at fixed signs; nothing follows the linears.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Solution, Unit
from qcli.algorithms.methods._feedback import PerLayerFeedback
from qcli.algorithms.methods._rows import RowScaledMethod
from qcli.core.formats.sign import Sign

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["OneBit"]

_NOT_IN_PAPER = ("refit_target", "error_feedback", "refit_scales")


class OneBit(RowScaledMethod, PerLayerFeedback):
    """One bit per weight; a start for block reconstruction and distillation."""

    name: ClassVar[str] = "onebit"
    unit: ClassVar[Unit] = "layer"

    bits: Literal[1] = Field(default=1, description="bits per weight's code")
    svid: Literal["power", "svd", "nmf"] = Field(
        default="power",
        description="how magnitudes are decomposed: power iteration, or svd or nmf as in the paper; same optimum",
    )
    refit_scales: bool = Field(default=True, description="least squares of both scales at fixed signs")
    paper: bool = Field(
        default=False,
        description="as published: plain SVID of the weight, and a LayerNorm between each layer and its bias",
    )

    @model_validator(mode="before")
    @classmethod
    def _paper_defaults(cls, options: Any) -> Any:
        paper = isinstance(options, dict) and options.get("paper") is True
        return dict.fromkeys(_NOT_IN_PAPER, False) | options if paper else options

    @model_validator(mode="after")
    def _paper_is_plain(self) -> Self:
        if self.paper and any(getattr(self, step) for step in _NOT_IN_PAPER):
            steps = ", ".join(_NOT_IN_PAPER)
            raise ValueError(f"paper starts from the weight alone: leave out {steps}, or set them to false")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.paper else super().needs

    @property
    def format(self) -> Sign:
        return Sign(output_norm=self.paper, bias_after_norm=self.paper)

    def workspace(self, rows: int, columns: int) -> int:
        if self.paper:
            return 10 * rows * columns
        scales = 9 * columns**2 + 16 * rows * columns if self.refit_scales else 0
        return max(super().workspace(rows, columns), scales)

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        if self.paper:
            return {name: self._decompose(weight) for name, weight in group.weights.items()}
        return super().quantize(group)

    def fit_tables(self, target: Tensor, importance: Tensor) -> dict[str, Tensor]:
        from qcli.algorithms.solvers import sign_value

        return sign_value.decompose(target, importance, self.svid)

    def refit(self, target: Tensor, weight: QuantizedWeight, hessian: Tensor) -> tuple[QuantizedWeight, list[str]]:
        from qcli.algorithms.solvers import sign_value

        return sign_value.refit(target, weight, self.format, hessian) if self.refit_scales else weight, []

    def _decompose(self, weight: Tensor) -> Solution:
        from qcli.algorithms.solvers import sign_value
        from qcli.core.weight import QuantizedWeight

        tables = sign_value.decompose(weight, kind=self.svid)
        codes = self.format.encode(weight, tables)
        return Solution(QuantizedWeight(self.format, (weight.shape[0], weight.shape[1]), codes, tables))
