"""No rounding of weights: for layers of which only the inputs are quantized, by the recipe's `activations`.

ZeroQuant-V2 (arXiv 2303.08302, section 3) compares such models (W16A8) with those whose weights alone are quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method, Solution, Unit
from qcli.core.formats.full_precision import FloatDType, FullPrecision
from qcli.utils.dtypes import HALF_DTYPES

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Unrounded"]

_STORED: dict[str, FloatDType] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Unrounded(Method):
    """Weights in floating point."""

    name: ClassVar[str] = "full-precision"
    unit: ClassVar[Unit] = "row"

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="of the weights; auto: as the model stores them"
    )

    @property
    def format(self) -> FullPrecision:
        return FullPrecision.of(_STORED.get(self.dtype, "F32"))

    def for_weights_of(self, dtype: str) -> Self:
        if self.dtype != "auto":
            return self
        stored = dtype if dtype in HALF_DTYPES else "F32"
        return self.model_copy(update={"dtype": next(name for name, known in _STORED.items() if known == stored)})

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        return {name: Solution(self.format.hold(weight)) for name, weight in group.weights.items()}
