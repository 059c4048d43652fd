"""What a method is given: linear layers that read one input, and the statistics of that input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HESSIAN, CROSS, RESIDUAL_CROSS = "hessian", "cross", "residual_cross"


@dataclass
class LinearGroup:
    """Linear layers that read one input, and the moments of that input.

    `x` is the input in the full-precision model, `x~` what the quantized part of the model really gives;
    `r`, `r~` the residual streams that the output joins. All moments are float32 means over tokens.

    Attributes:
        weights: float32 `[out, in]` by layer name, original values.
        hessian: `E[x~^T x~]`, `[in, in]`.
        cross: `E[x^T x~]`, `[in, in]`.
        residual_cross: `E[(r - r~)^T x~]`, `[out, in]`; None where the output does not join the stream directly.
    """

    weights: dict[str, Tensor]
    hessian: Tensor | None = None
    cross: Tensor | None = None
    residual_cross: Tensor | None = None
