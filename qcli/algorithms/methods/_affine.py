"""Options that every method with a uniform grid shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qcli.algorithms.method import Solution
from qcli.algorithms.methods._grouped import GroupedMethod
from qcli.core.formats.affine import Affine

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight


class AffineMethod(GroupedMethod):
    """A method that writes the affine format."""

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
        from qcli.algorithms.solvers.grid import SMALLEST_NORMAL_SCALE

        tiny = int((weight.tables["weight_scale"].float().abs() < SMALLEST_NORMAL_SCALE).sum())
        note = [f"{tiny} scales are too small for float16's full precision"] if tiny else []
        return Solution(weight, target, [*fallbacks, *note])
