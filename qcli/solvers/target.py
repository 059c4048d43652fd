"""What a layer's codes should aim at, given the inputs it will really get."""

from __future__ import annotations

import torch
from torch import Tensor


def refit(weight: Tensor, hessian: Tensor, cross: Tensor, residual_cross: Tensor | None, ridge: float) -> Tensor:
    """The weight whose outputs on quantized inputs are closest to the full-precision layer's outputs.

    `W* = (W G + R + lambda W) (H + lambda I)^-1`, `lambda = ridge * mean(diag H)`; ridge regression towards `W`
    (the idea of Qronos; the ridge, and `R` for layers that write to the residual stream, are ours).

    Args:
        weight: float32 `[out, in]`, `W`.
        hessian: `H = E[x~^T x~]`, `[in, in]`.
        cross: `G = E[x^T x~]`, `[in, in]`.
        residual_cross: `R = E[(r - r~)^T x~]`, `[out, in]`, or None.
        ridge: relative to the mean diagonal of `H`.

    Returns:
        float32 `[out, in]`.
    """
    wide = hessian.double()
    strength = ridge * wide.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    right = weight @ cross + weight * strength.float()
    if residual_cross is not None:
        right = right + residual_cross
    wide.diagonal().add_(strength)
    factor = torch.linalg.cholesky(wide).float()
    return torch.cholesky_solve(right.T, factor).T.contiguous()
