"""Eight-bit floats (E4M3) with a scale for each row: no calibration data, and nearly no loss."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method, Solution, Unit
from qcli.core.formats.fp8 import FP8

__all__ = ["ToFP8"]


class ToFP8(Method):
    """Nearest values at scales that cover each row's range."""

    name: ClassVar[str] = "fp8"
    unit: ClassVar[Unit] = "row"

    bits: Literal[8] = Field(default=8, description="bits per weight's code")

    @property
    def format(self) -> FP8:
        return FP8()

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        from qcli.algorithms.solvers.small_float import row_scales
        from qcli.core.weight import QuantizedWeight

        solutions = {}
        for name, weight in group.weights.items():
            tables = row_scales(weight)
            codes = self.format.encode(weight, tables)
            solutions[name] = Solution(QuantizedWeight(self.format, (weight.shape[0], weight.shape[1]), codes, tables))
        return solutions
