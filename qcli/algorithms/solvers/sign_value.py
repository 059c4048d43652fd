"""Sign-value decomposition (SVID) of OneBit: `W ~ sign(W) * (out_scale in_scale^T)` (arXiv 2402.11295)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qcli.algorithms.solvers.cholesky import factor_in_place
from qcli.algorithms.solvers.output_error import row_output_errors
from qcli.algorithms.solvers.tiles import panels
from qcli.core.formats.sign import IN_SCALE, OUT_SCALE, Sign
from qcli.core.weight import QuantizedWeight

SVID = Literal["power", "svd", "nmf"]
_ITERATIONS = 10  # ours: of power iteration and of NMF; the first singular value of |W| is well separated
_ROUNDS = 3  # ours: alternations of the two scales under a full Hessian
_RIDGE = 1e-2  # ours: of the normal equations of all input scales, which correlate
_MIN_IMPORTANCE = 1e-6  # relative to the mean: every column keeps some weight
_TINY = 1e-30


def decompose(weight: Tensor, importance: Tensor | None = None, kind: SVID = "power") -> dict[str, Tensor]:
    """The best rank-one approximation `out_scale in_scale^T` of `|W|`; both factors are non-negative.

    `|W|` is non-negative, so its first singular vectors are too, and SVD and NMF have the same optimum.

    Args:
        weight: float32 `[out, in]`.
        importance: float32 `[in]`, weight of each column's squared error (ours); None: all ones.
        kind: power iteration, a full SVD, or multiplicative updates of a rank-one NMF.

    Returns:
        Tables of `core/formats/sign.py`.
    """
    root = None if importance is None else importance.clamp(min=_MIN_IMPORTANCE * importance.mean()).sqrt()
    magnitude = weight.abs() if root is None else weight.abs() * root
    if kind == "svd":
        left, values, right = torch.linalg.svd(magnitude, full_matrices=False)
        out_scale, in_scale = left[:, 0].abs() * values[0], right[0].abs()
    else:
        in_scale = magnitude.mean(0)
        in_scale = in_scale / in_scale.norm().clamp(min=_TINY)
        out_scale = magnitude @ in_scale
        for _ in range(_ITERATIONS):
            if kind == "power":
                in_scale = out_scale @ magnitude
                in_scale = in_scale / in_scale.norm().clamp(min=_TINY)
                out_scale = magnitude @ in_scale
            else:
                numerator = in_scale * (out_scale @ magnitude)
                in_scale = numerator / (out_scale.square().sum() * in_scale).clamp(min=_TINY)
                numerator = out_scale * (magnitude @ in_scale)
                out_scale = numerator / (out_scale * in_scale.square().sum()).clamp(min=_TINY)
    if root is not None:
        in_scale = in_scale / root
    return _tables(in_scale, out_scale)


def refit(target: Tensor, weight: QuantizedWeight, format: Sign, hessian: Tensor) -> QuantizedWeight:
    """Alternating least squares of both scales under H at fixed signs (ours); `weight` itself if nothing is better.

    Each output scale is one unknown of its row. The input scales g solve `((S^T diag(h^2) S) o H) g = diag(S^T diag(h)
    T H)` with output scales h, signs S and target T, with a small ridge towards their current values.

    Args:
        target: float32 `[out, in]`, T.
        hessian: `[in, in]`.
    """
    signs, target_hessian = weight.codes.to(torch.int8).mul_(2).sub_(1), target @ hessian
    in_scale, out_scale = weight.tables[IN_SCALE].float(), weight.tables[OUT_SCALE].float()[:, 0]
    choices = [weight]
    for _ in range(_ROUNDS):
        basis = signs * in_scale
        out_scale = (basis * target_hessian).sum(1) / (basis @ hessian).mul_(basis).sum(1).clamp(min=_TINY)
        del basis
        scaled = signs * out_scale[:, None]
        right = (scaled * target_hessian).sum(0).double()
        normal = _normal(scaled, hessian)
        del scaled
        ridge = _RIDGE * normal.diagonal().mean().clamp(min=_TINY)
        normal.diagonal().add_(ridge)
        right += ridge * in_scale.double()
        lower, _ = factor_in_place(normal)  # if it fails, so will the comparison below
        in_scale = torch.cholesky_solve(right[:, None], lower)[:, 0].float()
        del normal, lower
        choices.append(QuantizedWeight(format, weight.shape, weight.codes, _tables(in_scale, out_scale)))
    errors = torch.stack([row_output_errors(target - choice.dense(), hessian).sum() for choice in choices])
    return choices[int(errors.nan_to_num(nan=torch.inf).argmin())]


def _normal(scaled: Tensor, hessian: Tensor) -> Tensor:
    """`(S^T S) o H` of `scaled` S in float64; below the diagonal, which `factor_in_place` does not read, only in part.
    At 28,672 inputs a second matrix would take 3.3 GB."""
    normal = torch.zeros(hessian.shape, dtype=torch.float64, device=hessian.device)
    for part in panels(hessian):
        normal[part, part.start :] = (scaled[:, part].T @ scaled[:, part.start :]).mul_(hessian[part, part.start :])
    return normal


def _tables(in_scale: Tensor, out_scale: Tensor) -> dict[str, Tensor]:
    """Both scales in float16, balanced to the same mean magnitude."""
    balance = (out_scale.abs().mean() / in_scale.abs().mean().clamp(min=_TINY)).sqrt().clamp(min=_TINY)
    return {IN_SCALE: (in_scale * balance).half(), OUT_SCALE: (out_scale / balance).half()[:, None]}
