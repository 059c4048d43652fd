"""Target refit: the weight to quantize, given the inputs the layer will get in the quantized model."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.algorithms.solvers.cholesky import factor_in_place

_MODERATE = 0.1  # ridge that keeps conditions below 10 times the number of inputs: float32 is precise enough


def refit_target(weight: Tensor, hessian: Tensor, gap: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The weight whose outputs on quantized inputs are closest to the full-precision layer's outputs.

    `W* = W + E[d^T x~] (H + lambda I)^-1`, `lambda = ridge * mean(diag H)`: ridge regression towards `W`, where
    `d = (x - x~) W^T` is what the outputs lack. The idea is that of Qronos; the ridge is ours, and so is that layers
    that write to the residual stream correct its error as well: to `d` they add `r - r~`.

    Args:
        weight: float32 `[out, in]`, `W`.
        hessian: `H = E[x~^T x~]`, `[in, in]`.
        gap: `E[d^T x~]`, `[out, in]`.
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
    return torch.cholesky_solve(gap.T, factor).T.contiguous().add_(weight), ridge
