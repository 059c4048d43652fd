"""Options of every method with uniform grids."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from qcli.algorithms.methods._grouped import GroupedMethod
from qcli.core.formats.affine import Affine


class AffineMethod(GroupedMethod):
    """A method whose format is affine."""

    symmetric: bool = Field(
        default=False, description="no zero point; the side of the range with the larger magnitude gets the extra code"
    )
    symmetric_range: Literal["full", "restricted"] = Field(
        default="full",
        description="symmetric: all codes, or without the lowest one, as in ZeroQuant-V2: as many levels below 0 as "
        "above",
    )
    zero_point: Literal["integer", "float"] = Field(
        default="integer", description="zero point of asymmetric groups: an integer as wide as a code, or float16"
    )

    @model_validator(mode="after")
    def _restricted_is_symmetric(self) -> Self:
        if self.symmetric_range == "restricted" and not self.symmetric:
            raise ValueError("symmetric_range restricted needs symmetric: true")
        return self

    @property
    def format(self) -> Affine:
        return Affine(
            bits=self.bits,
            group_size=self.group_size,
            zero_point="none" if self.symmetric else self.zero_point,
            restricted=self.symmetric_range == "restricted",
        )
