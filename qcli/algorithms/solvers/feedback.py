"""Error feedback: quantize column by column; the columns still to come compensate each column's error.

GPTQ (arXiv 2210.17323, section 3) and GPTAQ's asymmetric term (arXiv 2504.02692, eq. 14), for every format. Ours: the
Cholesky factor of the inverse Hessian comes from one Cholesky of the flipped Hessian and one triangular inverse in
place, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcli.core.weight import Format

DAMPINGS = (0.01, 0.05, 0.1, 1.0)  # ours: tried in turn, relative to the Hessian's mean diagonal
_DIRECT = 256  # rows of a triangle that is inverted in one call
_LAZY = 64  # columns per lazy block: the rest of the matrix gets their errors in one product


@dataclass(frozen=True)
class DynamicTables:
    """Tables of each group fitted when error feedback reaches the group, as in GPTQ, instead of beforehand.

    Attributes:
        ends: positions in the column order at which groups end, ascending; each group is contiguous in the order.
        fit: (columns of a group, int64 `[n]`; their values after the feedback so far, `[out, n]`) -> tables of the
            whole weight with the entries of that group refitted.
    """

    ends: Sequence[int]
    fit: Callable[[Tensor, Tensor], Mapping[str, Tensor]]


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """Upper triangular `U` with `U^T U = (H + damping * mean(diag H) * I)^-1`.

    The damping is raised along `DAMPINGS` while the damped Hessian is not positive definite.

    Args:
        hessian: `[in, in]`; dead inputs need a nonzero diagonal (see `without_dead_inputs`).
        damping: the first one tried.

    Returns:
        float32 `[in, in]`, None if no damping suffices; and the damping used.
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
    """Copies with `w_j = 0` and `H_jj` the mean of the live inputs', for inputs j that are always 0.

    This `H_jj` makes H invertible; it says nothing about importance. Without dead inputs the arguments are returned.
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
    """GPTAQ's `P = alpha * triu(D U^T, 1) U`, `D = E[(x - x~)^T x~] = G - H`; `[in, in]`.

    Args:
        hessian: `H`, `[in, in]`.
        cross: `G`, `[in, in]`.
        factor: `U` (see `inverse_factor`).
        alpha: 1 in the paper, 0.25 as GPTQModel ships it.
    """
    return alpha * torch.triu((cross - hessian) @ factor.T, diagonal=1) @ factor


def column_order(hessian: Tensor, group_width: int, kind: str) -> Tensor:
    """The order in which columns are quantized, int64 `[in]`.

    Args:
        hessian: `[in, in]`.
        group_width: columns per group, for `group-aware`.
        kind: `static`: by decreasing `diag(H)`. `group-aware`: groups by the decreasing maximum of their diagonal,
            columns in a group by decreasing diagonal. `none`: as stored.
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
    *,
    asymmetry: Tensor | None = None,
    dynamic: DynamicTables | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Quantize a weight with error feedback.

    Args:
        weight: float32 `[out, in]`.
        factor: `U` of the Hessian with rows and columns in `order`, `[in, in]`.
        order: the columns in the order of their quantization, int64 `[in]`.
        format: of the codes.
        tables: of the whole weight; with `dynamic`, their initial values.
        asymmetry: `asymmetric_term` in `order`; None: 0.
        dynamic: fits tables on the way; None: `tables` are final.

    Returns:
        Codes uint8 `[out, in]` in the weight's own column order, and the tables they were chosen with.
    """
    columns = weight.T[order].contiguous()  # one row per column: the loop then reads contiguous memory
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    ends = None if dynamic is None else dynamic.ends
    for start, stop in _lazy_blocks(len(order), ends):
        block = columns[start:stop]
        errors, found = torch.empty_like(block), []
        # rows of the factor divided by its diagonal: what an error of 1 adds to the columns that follow
        relative = factor[start:stop, start:] / factor.diagonal()[start:stop, None]
        nearest = format.rounder(tables, order[start:stop])
        for column in range(stop - start):
            position = start + column
            if dynamic is not None and (position == 0 or position in dynamic.ends):
                members = slice(position, next(end for end in dynamic.ends if end > position))
                tables = dynamic.fit(order[members], columns[members].T)
                nearest = format.rounder(tables, order[start:stop])
            values = block[column]
            code, value = nearest(column, values)
            found.append(code)
            torch.sub(values, value, out=errors[column])
            rest = block[column + 1 :]
            rest.addr_(relative[column, column + 1 : stop - start], errors[column], alpha=-1)
            if asymmetry is not None:
                rest.addr_(asymmetry[position, position + 1 : stop], values)
        codes[start:stop] = torch.stack(found)
        columns[stop:].addmm_(relative[:, stop - start :].T, errors, alpha=-1)
        if asymmetry is not None:
            columns[stop:].addmm_(asymmetry[start:stop, stop:].T, block)
    stored = torch.empty_like(codes)
    stored[order] = codes
    return stored.T.contiguous(), tables


def _lazy_blocks(columns: int, group_ends: Sequence[int] | None) -> list[tuple[int, int]]:
    """(start, stop) of blocks of `_LAZY` columns; with `group_ends`, of whole groups and at least as many, so that a
    group's tables see the errors of all columns before it."""
    ends = [*range(_LAZY, columns, _LAZY), columns] if group_ends is None else []
    for end in group_ends or ():
        if end == columns or end - (ends[-1] if ends else 0) >= _LAZY:
            ends.append(end)
    return list(zip([0, *ends[:-1]], ends, strict=True))
