"""Options that every method with a uniform grid shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qcli.formats.affine import Affine
from qcli.method import Method, Solution

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.quantized import QuantizedWeight


class AffineMethod(Method):
    """A method that writes the affine format."""

    bits: int = Field(default=4, ge=2, le=8, description="bits of a weight's code")
    group_size: int = Field(default=64, ge=-1, description="weights of a row that share a scale; -1: the whole row")
    group_tail: Literal["error", "ragged"] = Field(
        default="error", description="rows that group_size does not divide: refuse, or a shorter last group"
    )
    symmetric: bool = Field(default=False, description="no zero point; the longer side gets the extra code")
    zero_point: Literal["integer", "float"] = Field(
        default="integer",
        description="how the zero point of asymmetric groups is stored: bits wide, or float16",
    )

    @property
    def format(self) -> Affine:
        return Affine(
            bits=self.bits,
            group_size=self.group_size,
            zero_point="none" if self.symmetric else self.zero_point,
        )

    def solution(self, weight: QuantizedWeight, target: Tensor | None, fallbacks: list[str]) -> Solution:
        """A solution that also reports scales below float16's full precision."""
        from qcli.solvers.grid import SMALLEST_NORMAL_SCALE

        tiny = int((weight.tables["weight_scale"].float().abs() < SMALLEST_NORMAL_SCALE).sum())
        note = [f"{tiny} scales are too small for float16's full precision"] if tiny else []
        return Solution(weight, target, [*fallbacks, *note])

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if self.group_size == 0:
            return "group_size must be positive, or -1 for whole rows"
        if self.group_tail == "error" and self.group_size > 0 and shape[1] % self.group_size:
            return f"group_size {self.group_size} does not divide its {shape[1]} inputs"
        return None
