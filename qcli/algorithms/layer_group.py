"""The input of a method: linear layers that read the same input, and the statistics of that input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HESSIAN, CROSS, RESIDUAL_CROSS = "hessian", "cross", "residual_cross"
DEAD_INPUTS = "the layer's inputs were always 0: fitted to the weight alone"  # the fallback where `is_dead`


@dataclass
class LinearGroup:
    """Linear layers that read the same input, and statistics of that input: float32 means over tokens.

    `x` is the input in the full-precision model and `x~` in the model as quantized so far, both `[tokens, in]`; `r` and
    `r~` are the residual streams that the outputs are added to, `[tokens, out]`. Statistics that nobody needs are None.

    Attributes:
        weights: full-precision weights by layer name, float32 `[out, in]`.
        hessian: `E[x~^T x~]`, `[in, in]`.
        cross: `E[x^T x~]`, `[in, in]`.
        residual_cross: `E[(r - r~)^T x~]`, `[out, in]`; None also where the outputs do not join the residual stream
            directly.
    """

    weights: dict[str, Tensor]
    hessian: Tensor | None = None
    cross: Tensor | None = None
    residual_cross: Tensor | None = None

    @property
    def is_dead(self) -> bool:
        """Whether all inputs were 0 in the calibration data: then the statistics say nothing about the weights."""
        return self.hessian is not None and not bool((self.hessian.diagonal() > 0).any())
