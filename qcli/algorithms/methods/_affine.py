"""Options of every method with uniform grids."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qcli.algorithms.methods._grouped import GroupedMethod
from qcli.core.formats.affine import Affine


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
