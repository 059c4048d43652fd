"""NVIDIA's four-bit floats in blocks of 16: no calibration data; Blackwell GPUs compute with them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method, Solution, Unit
from qcli.core.formats.nvfp4 import BLOCK, NVFP4

__all__ = ["ToNVFP4"]


class ToNVFP4(Method):
    """Nearest values at scales that cover each block's range."""

    name: ClassVar[str] = "nvfp4"
    unit: ClassVar[Unit] = "layer"

    bits: Literal[4] = Field(default=4, description="bits per weight's code")

    @property
    def format(self) -> NVFP4:
        return NVFP4()

    def unsupported_reason(self, shape: tuple[int, int]) -> str | None:
        return f"blocks of {BLOCK} do not divide its {shape[1]} inputs" if shape[1] % BLOCK else None

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        from qcli.algorithms.solvers.small_float import block_scales
        from qcli.core.weight import QuantizedWeight

        solutions = {}
        for name, weight in group.weights.items():
            tables = block_scales(weight)
            codes = self.format.encode(weight, tables)
            solutions[name] = Solution(QuantizedWeight(self.format, (weight.shape[0], weight.shape[1]), codes, tables))
        return solutions
