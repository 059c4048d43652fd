"""DB-LLM: flexible dual binarization (arXiv 2402.11960).

Two planes of bits with a scale each for every group. The paper splits a two-bit grid and goes on to distill; ours
before that: scales by least squares under the inputs' energy, planes with error feedback towards the target that
quantized inputs ask for, and all scales of a row solved for once the planes are fixed. The second plane always
follows from what the first one leaves of one latent weight, as RaBiT has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qcli.algorithms.methods._feedback import LayerByLayer
from qcli.algorithms.methods._grouped import GroupedMethod
from qcli.core.formats.dual_binary import DualBinary

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["DBLLM"]


class DBLLM(GroupedMethod, LayerByLayer):
    """Two bits a weight as two binary planes, for block reconstruction and distillation to start from."""

    name: ClassVar[str] = "dbllm"

    bits: Literal[2] = Field(default=2, description="of a weight's code: one for each plane")
    levels: Literal["fdb", "symmetric"] = Field(
        default="fdb", description="planes of 0 and 1, as the paper, or of -1 and +1"
    )
    refit_tables: bool = Field(default=True, description="least squares of all scales of a row at fixed planes")

    @property
    def format(self) -> DualBinary:
        return DualBinary(group_size=self.group_size, levels=self.levels)

    def start(self, target: Tensor, importance: Tensor) -> dict[str, Tensor]:
        from qcli.algorithms.solvers import binary

        return binary.dual_binary(target, self.format, importance)

    def finish(self, target: Tensor, weight: QuantizedWeight, hessian: Tensor) -> tuple[QuantizedWeight, list[str]]:
        from qcli.algorithms.solvers import binary

        if not self.refit_tables:
            return weight, []
        weight, kept = binary.refit_planes(target, weight, self.format, hessian)
        note = f"scale refit unusable in {kept} of {len(target)} rows: kept the searched scales"
        return weight, [note] if kept else []
