"""What a layer's codes should aim at, given the inputs it will really get."""

from __future__ import annotations

import torch
from torch import Tensor


def refit(
    weight: Tensor, hessian: Tensor, cross: Tensor, residual_cross: Tensor | None, ridge: float
) -> tuple[Tensor, float]:
    """The weight whose outputs on quantized inputs are closest to the full-precision layer's outputs.

    `W* = (W G + R + lambda W) (H + lambda I)^-1`, `lambda = ridge * mean(diag H)`; ridge regression towards `W`
    (the idea of Qronos; the ridge, and `R` for layers that write to the residual stream, are ours).

    Args:
        weight: float32 `[out, in]`, `W`.
        hessian: `H = E[x~^T x~]`, `[in, in]`.
        cross: `G = E[x^T x~]`, `[in, in]`.
        residual_cross: `R = E[(r - r~)^T x~]`, `[out, in]`, or None.
        ridge: relative to the mean diagonal of `H`; raised tenfold as often as it takes to factor `H`.

    Returns:
        float32 `[out, in]`, and the ridge that was used.
    """
    mean = hessian.double().diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while True:
        wide = hessian.double()
        wide.diagonal().add_(ridge * mean)
        factor, failed = torch.linalg.cholesky_ex(wide)
        if not bool(failed):
            break
        ridge *= 10
    right = weight @ cross + weight * (ridge * mean).float()
    if residual_cross is not None:
        right = right + residual_cross
    return torch.cholesky_solve(right.T, factor.float()).T.contiguous(), ridge
