"""The input of a method: linear layers that read the same input, and the statistics of that input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HESSIAN, CROSS, OUTPUT_GAP = "hessian", "cross", "output_gap"
DEAD_INPUTS = "the layer's inputs were always 0: fitted to the weight alone"  # the fallback where `is_dead`


@dataclass
class LinearGroup:
    """Linear layers that read the same input, and statistics of that input: float32 means over tokens.

    `x` is the input in the full-precision model and `x~` in the model as quantized so far, both `[tokens, in]`; `r` and
    `r~` are the residual streams that the outputs are added to, `[tokens, out]`. Statistics that nobody needs are None.
    Who needs `output_gap` gets `cross` instead where the outputs do not join the residual stream directly.

    Attributes:
        weights: full-precision weights by layer name, float32 `[out, in]`.
        hessian: `E[x~^T x~]`, `[in, in]`.
        cross: `E[x^T x~]`, `[in, in]`.
        output_gap: `E[((x - x~) W^T + r - r~)^T x~]`, `[out, in]`, of the group's only layer: how far the residual
            stream will be from the full-precision model's if the layer is not quantized.
    """

    weights: dict[str, Tensor]
    hessian: Tensor | None = None
    cross: Tensor | None = None
    output_gap: Tensor | None = None

    @property
    def is_dead(self) -> bool:
        """Whether all inputs were 0 in the calibration data: then the statistics say nothing about the weights."""
        return self.hessian is not None and not bool((self.hessian.diagonal() > 0).any())
