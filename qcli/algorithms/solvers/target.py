"""Target refit: the weight to quantize, given the inputs the layer will get in the quantized model."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.algorithms.solvers.cholesky import factor_in_place

_MODERATE = 0.1  # ridge that keeps conditions below 10 times the number of inputs: float32 is precise enough


def refit_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, residual_cross: Tensor | None, ridge: float
) -> tuple[Tensor, float]:
    """The weight whose outputs on quantized inputs are closest to the full-precision layer's outputs.

    `W* = (W G + R + lambda W) (H + lambda I)^-1`, `lambda = ridge * mean(diag H)`: ridge regression towards `W`. The
    idea is that of Qronos; the ridge, and `R`, by which layers that write to the residual stream correct its error, are
    ours.

    Args:
        weight: float32 `[out, in]`, `W`.
        hessian: `H = E[x~^T x~]`, `[in, in]`.
        cross: `G = E[x^T x~]`, `[in, in]`.
        residual_cross: `R = E[(r - r~)^T x~]`, `[out, in]`; None: 0.
        ridge: relative to the mean diagonal of `H`; multiplied by 10 until `H + lambda I` is positive definite.

    Returns:
        float32 `[out, in]`, and the ridge used.
    """
    mean = hessian.diagonal().double().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while True:
        damped = hessian.to(torch.float32 if ridge >= _MODERATE else torch.float64, copy=True)
        damped.diagonal().add_(ridge * mean)
        factor, failed = factor_in_place(damped)
        if not bool(failed):
            break
        ridge *= 10
    del damped
    factor = factor.float()
    right = (weight @ cross).add_(weight * (ridge * mean).float())
    if residual_cross is not None:
        right += residual_cross
    return torch.cholesky_solve(right.T, factor).T.contiguous(), ridge
