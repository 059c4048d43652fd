"""Options of every method with uniform grids."""

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
    """A method whose format is affine."""

    symmetric: bool = Field(
        default=False, description="no zero point; the side of the range with the larger magnitude gets the extra code"
    )
    zero_point: Literal["integer", "float"] = Field(
        default="integer", description="zero point of asymmetric groups: an integer as wide as a code, or float16"
    )

    @property
    def format(self) -> Affine:
        return Affine(
            bits=self.bits,
            group_size=self.group_size,
            zero_point="none" if self.symmetric else self.zero_point,
        )

    def solution(self, weight: QuantizedWeight, target: Tensor | None, fallbacks: list[str]) -> Solution:
        """A `Solution` whose fallbacks also count the scales that are subnormal in float16."""
        from qcli.algorithms.solvers.grid import SMALLEST_NORMAL_SCALE

        tiny = int((weight.tables["weight_scale"].float().abs() < SMALLEST_NORMAL_SCALE).sum())
        note = [f"{tiny} scales are too small for float16's full precision"] if tiny else []
        return Solution(weight, target, [*fallbacks, *note])
