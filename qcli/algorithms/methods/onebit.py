"""OneBit: signs, and one scale for each input and each output (arXiv 2402.11295).

The paper's start is the sign-value decomposition of the weight, and a LayerNorm follows every linear (`paper`). Ours
before any distillation: it is made of the target that quantized inputs ask for, weighted by their energy, signs are
chosen with error feedback, and both scales are solved for once the signs are fixed; nothing follows the linears.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Solution
from qcli.algorithms.methods._feedback import LayerByLayer
from qcli.core.formats.sign import Sign

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["OneBit"]

_OURS = ("refit_target", "error_feedback", "refit_scales")


class OneBit(LayerByLayer):
    """One bit a weight, for block reconstruction and distillation to start from."""

    name: ClassVar[str] = "onebit"

    bits: Literal[1] = Field(default=1, description="of a weight's code")
    svid: Literal["power", "svd", "nmf"] = Field(
        default="power", description="how the magnitudes are decomposed; svd and nmf as the paper, to the same optimum"
    )
    refit_scales: bool = Field(default=True, description="least squares of both scales at fixed signs")
    paper: bool = Field(
        default=False, description="as published: plain SVID of the weight, and a LayerNorm after every quantized layer"
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_unless_told(cls, given: Any) -> Any:
        plain = isinstance(given, dict) and given.get("paper") is True
        return dict.fromkeys(_OURS, False) | given if plain else given

    @model_validator(mode="after")
    def _paper_is_plain(self) -> Self:
        if self.paper and any(getattr(self, step) for step in _OURS):
            raise ValueError(f"paper starts from the weight alone: leave out {', '.join(_OURS)}, or set them to false")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.paper else super().needs

    @property
    def format(self) -> Sign:
        return Sign(output_norm=self.paper)

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        if self.paper:
            return {name: self._decomposed(weight) for name, weight in group.weights.items()}
        return super().quantize(group)

    def start(self, target: Tensor, importance: Tensor) -> dict[str, Tensor]:
        from qcli.algorithms.solvers import binary

        return binary.sign_value(target, importance, self.svid)

    def finish(self, target: Tensor, weight: QuantizedWeight, hessian: Tensor) -> tuple[QuantizedWeight, list[str]]:
        from qcli.algorithms.solvers import binary

        return binary.refit_signs(target, weight, self.format, hessian) if self.refit_scales else weight, []

    def _decomposed(self, weight: Tensor) -> Solution:
        from qcli.algorithms.solvers import binary
        from qcli.core.weight import QuantizedWeight

        tables = binary.sign_value(weight, kind=self.svid)
        codes = self.format.encode(weight, tables)
        return Solution(QuantizedWeight(self.format, (weight.shape[0], weight.shape[1]), codes, tables))
