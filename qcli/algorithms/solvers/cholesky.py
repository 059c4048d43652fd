"""Cholesky factors and inverses of triangles without a second matrix: at 28,672 inputs one takes 6.6 GB in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_DIRECT = 256  # rows of a triangle that is inverted in one call
_BAND = 1024  # rows of a product that replaces one of its factors


def factor_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of a symmetric matrix, in its memory.

    Args:
        matrix: `[n, n]`, contiguous; overwritten.

    Returns:
        `L` with `L L^T = matrix`, a view, and a scalar that is not 0 where the matrix is not positive definite.
    """
    lower = matrix.mT  # column by column, as LAPACK and cuSOLVER write it: nothing is copied
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower, info


def invert_lower(matrix: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: `[[A, 0], [B, C]]^-1 = [[A', 0], [-C' B A', C']]`."""
    if len(matrix) <= _DIRECT:
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = len(matrix) // 2
    first, last, below = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    invert_lower(first)
    invert_lower(last)
    bands = [slice(start, min(start + _BAND, len(below))) for start in range(0, len(below), _BAND)]
    for band in reversed(bands):  # a band of `C' B` reads only rows of B up to its own
        below[band] = last[band, : band.stop] @ below[: band.stop]
    for band in bands:
        below[band] = (below[band] @ first).neg_()
