"""OneBit: signs, and one scale for each input and each output (arXiv 2402.11295).

The paper's start is the sign-value decomposition of the weight. Ours before any distillation: it is made of the
target that quantized inputs ask for, weighted by their energy, signs are chosen with error feedback, and both scales
are solved for once the signs are fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qcli.formats.sign import Sign
from qcli.methods._feedback import LayerByLayer

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.quantized import QuantizedWeight

__all__ = ["OneBit"]


class OneBit(LayerByLayer):
    """One bit a weight, for block reconstruction and distillation to start from."""

    name: ClassVar[str] = "onebit"

    bits: Literal[1] = Field(default=1, description="of a weight's code")
    svid: Literal["power", "svd", "nmf"] = Field(
        default="power", description="how the magnitudes are decomposed; svd and nmf as the paper, to the same optimum"
    )
    refit_scales: bool = Field(default=True, description="least squares of both scales at fixed signs")

    @property
    def format(self) -> Sign:
        return Sign()

    def start(self, target: Tensor, importance: Tensor) -> dict[str, Tensor]:
        from qcli.solvers import binary

        return binary.sign_value(target, importance, self.svid)

    def finish(self, target: Tensor, weight: QuantizedWeight, hessian: Tensor) -> tuple[QuantizedWeight, list[str]]:
        from qcli.solvers import binary

        return binary.refit_signs(target, weight, self.format, hessian) if self.refit_scales else weight, []
