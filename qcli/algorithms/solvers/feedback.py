"""Error feedback: quantize column by column and let the columns to come absorb each column's error.

GPTQ (arXiv 2210.17323, section 3) and GPTAQ's asymmetric term (arXiv 2504.02692, eq. 14), for any format.
The factor comes from one Cholesky of the flipped Hessian and one triangular inverse in place (ours), in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qcli.core.weight import Format

DAMPINGS = (0.01, 0.05, 0.1, 1.0)
_DIRECT = 256  # rows of a triangle that is inverted in one piece
_LAZY = 64  # columns whose errors are applied to the rest of the matrix in one product


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """Upper triangular `U` with `U^T U = (H + damping * mean(diag H) * I)^-1`, and the damping that was used.

    Climbs `DAMPINGS` while the Hessian is not positive definite; `None` when even the last does not help.

    Args:
        hessian: `[in, in]`; dead inputs must have a non-zero diagonal (see `without_dead_inputs`).
    """
    for strength in (damping, *(step for step in DAMPINGS if step > damping)):
        damped = hessian.flip(0, 1).double()
        damped.diagonal().add_(strength * damped.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # at 28,672 inputs each of these matrices takes 6.6 GB
        if not bool(failed) and bool(lower.isfinite().all()):
            _invert_lower(lower)
            return lower.float().flip(0, 1), strength
        del lower
    return None, DAMPINGS[-1]


def _invert_lower(matrix: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: `[[A, 0], [B, C]]^-1 = [[A', 0], [-C' B A', C']]`."""
    if len(matrix) <= _DIRECT:
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = len(matrix) // 2
    first, last = matrix[:half, :half], matrix[half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    matrix[half:, :half] = (last @ matrix[half:, :half]).neg_() @ first


def without_dead_inputs(hessian: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs that are always 0 get the others' mean for `H_jj`, and `w_j = 0`, in copies.

    Without such inputs nothing is copied. The new `H_jj` lets H be inverted, and says nothing of an input's importance.
    """
    dead = hessian.diagonal() <= 0
    if not bool(dead.any()):
        return hessian, weight
    hessian, weight = hessian.clone(), weight.clone()
    live = hessian.diagonal()[~dead]
    hessian.diagonal().masked_fill_(dead, float(live.mean()) if len(live) else 1.0)
    weight[:, dead] = 0
    return hessian, weight


def asymmetric_term(hessian: Tensor, cross: Tensor, factor: Tensor, alpha: float) -> Tensor:
    """GPTAQ's `P = alpha * triu(D U^T, 1) U` with `D = E[(x - x~)^T x~] = G - H`; `[in, in]`.

    `alpha` is 1 in the paper and 0.25 as GPTQModel ships it.
    """
    return alpha * torch.triu((cross - hessian) @ factor.T, diagonal=1) @ factor


def column_order(hessian: Tensor, group_width: int, kind: str) -> Tensor:
    """The order in which columns are quantized, `[in]`.

    `static`: by falling `diag(H)` over the whole row. `group-aware`: groups by the falling maximum of their
    diagonal, and by falling diagonal inside a group. `none`: as stored.
    """
    importance = hessian.diagonal()
    if kind == "none":
        return torch.arange(len(importance), device=hessian.device)
    if kind == "static":
        return importance.argsort(descending=True, stable=True)
    groups = [
        torch.arange(start, min(start + group_width, len(importance)), device=hessian.device)
        for start in range(0, len(importance), group_width)
    ]
    groups.sort(key=lambda columns: -float(importance[columns].max()))
    return torch.cat([columns[importance[columns].argsort(descending=True, stable=True)] for columns in groups])


def quantize_columns(
    weight: Tensor,
    factor: Tensor,
    order: Tensor,
    format: Format,
    tables: Mapping[str, Tensor],
    asymmetry: Tensor | None = None,
    grid_of: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None,
    spans: Sequence[int] | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Codes of `weight` with error feedback.

    Args:
        weight: float32 `[out, in]`.
        factor: `U` of the Hessian whose rows and columns are already in `order`, `[in, in]`.
        order: columns of `weight` in the order of their quantization, `[in]`.
        tables: the grid, fixed beforehand; with `grid_of` only a start.
        asymmetry: `asymmetric_term` in `order`, or None.
        grid_of: fits the grid of one group when the loop reaches it: (columns, their current values
            `[out, n]`) -> tables of the whole weight with that group's entries replaced.
        spans: with `grid_of`: where the groups end, in `order`.

    Returns:
        uint8 codes `[out, in]` in the stored column order, and the tables they refer to.
    """
    columns = weight.T[order].contiguous()  # one row a column: the loop then works on contiguous memory
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    for start, stop in _lazy_blocks(len(order), spans):
        block = columns[start:stop]
        errors, factor_block = torch.empty_like(block), factor[start:stop, start:stop]
        diagonal = factor_block.diagonal().tolist()
        nearest = format.rounder(tables, order[start:stop])
        for column in range(stop - start):
            if grid_of is not None and spans is not None and (start + column == 0 or start + column in spans):
                end = next(span for span in spans if span > start + column)
                members = slice(start + column, end)
                tables = grid_of(order[members], columns[members].T)
                nearest = format.rounder(tables, order[start:stop])
            values = block[column]
            code, value = nearest(column, values)
            codes[start + column] = code
            torch.sub(values, value, out=errors[column]).div_(diagonal[column])
            rest = block[column + 1 :]
            rest.addr_(factor_block[column, column + 1 :], errors[column], alpha=-1)
            if asymmetry is not None:
                rest.addr_(asymmetry[start + column, start + column + 1 : stop], values)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if asymmetry is not None:
            columns[stop:].addmm_(asymmetry[start:stop, stop:].T, block)
    stored = torch.empty_like(codes)
    stored[order] = codes
    return stored.T.contiguous(), tables


def _lazy_blocks(columns: int, spans: Sequence[int] | None) -> list[tuple[int, int]]:
    """Blocks of about `_LAZY` columns; with `spans`, of whole groups, so that a grid sees every earlier error."""
    ends = [*list(range(_LAZY, columns, _LAZY)), columns] if spans is None else []
    if spans is not None:
        for span in spans:
            if span == columns or span - (ends[-1] if ends else 0) >= _LAZY:
                ends.append(span)
    return list(zip([0, *ends[:-1]], ends, strict=True))
