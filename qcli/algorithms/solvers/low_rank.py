"""The low-rank matrix that repairs most of a quantization error, seen by the layer's inputs.

`A B` minimises `tr((E - A B) H (E - A B)^T)`. With `H = L L^T` that is the truncated SVD of `E L` mapped back by
`L^-1`; its left vectors `U` are the leading eigenvectors of `E H E^T`, and since `U U^T E L = U S V^T`, the optimum is
`A = U`, `B = U^T E`: no factor of H, hence no damping, and a singular H does no harm (ours). `H = I` gives the plain
SVD of LoRC (arXiv 2303.08302, section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.core.formats.low_rank import LowRank

_OVERSAMPLING = 8  # columns of a Krylov block beyond the rank
_DEPTH = 8  # blocks: matrices of up to 128 rows are solved exactly at rank 8, larger ones to .1 % of the error


def weighted_error(error: Tensor, hessian: Tensor | None) -> float:
    """`tr(E H E^T)`: the mean squared error of the output, summed over its channels; without H `||E||^2`.

    Args:
        error: `[out, in]`.
        hessian: `[in, in]`.
    """
    return float(((error if hessian is None else error @ hessian) * error).sum(dtype=torch.float64))


def leading_directions(error: Tensor, hessian: Tensor | None, rank: int) -> Tensor:
    """Orthonormal leading eigenvectors of `E H E^T`, float64 `[out, rank]`, by block Krylov iteration.

    (Musco and Musco, arXiv 1504.05477, algorithm 2: accurate even where the spectrum is flat, as that of a rounding
    error is.) The start is drawn by a private generator, so the result is the same every time.

    Args:
        error: `[out, in]`.
        hessian: `[in, in]`; None: the identity.
    """
    wide = error.double()
    moment = None if hessian is None else hessian.double()

    def apply(vectors: Tensor) -> Tensor:
        seen = wide.T @ vectors
        return wide @ (seen if moment is None else moment @ seen)

    width = min(rank + _OVERSAMPLING, len(wide))
    start = torch.randn(len(wide), width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = [torch.linalg.qr(start.to(wide.device)).Q]
    while len(blocks) < _DEPTH and len(blocks) * width < len(wide):
        blocks.append(torch.linalg.qr(apply(blocks[-1])).Q)
    basis: Tensor = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    small = basis.T @ apply(basis)
    leading: Tensor = torch.linalg.eigh((small + small.T) / 2).eigenvectors[:, -rank:].flip(1)
    return basis @ leading


def factors(error: Tensor, hessian: Tensor | None, format: LowRank) -> dict[str, Tensor]:
    """The tables of `format` whose product is closest to `error` under H.

    A is rounded first; B is the least-squares answer to the rounded A, `B = A^+ E` whatever H is, then rounded. Each
    direction is shared out so that both factors reach the same size, the best for float16's range.

    Args:
        error: `[out, in]`.
        hessian: `[in, in]`; None: the identity.
    """
    directions = leading_directions(error, hessian, format.rank)
    wide = error.double()
    reach = directions.abs().amax(0)
    balance = ((directions.T @ wide).abs().amax(1) / reach).sqrt()
    tables = format.round_factor("a", directions * balance)
    rounded = format.factor("a", tables).double()
    return tables | format.round_factor("b", torch.linalg.pinv(rounded) @ wide)
