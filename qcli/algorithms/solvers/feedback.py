"""Error feedback: quantize column by column; the columns still to come compensate each column's error.

GPTQ (arXiv 2210.17323, section 3) and GPTAQ's asymmetric term (arXiv 2504.02692, eq. 14), for every format. Ours: the
Cholesky factor of the inverse Hessian comes from one Cholesky of the flipped Hessian and one triangular inverse in
place; in float32 where that is precise enough, else in float64. On a GPU a Triton kernel takes a block of columns at a
time for every format of qcli's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qcli.algorithms.solvers.cholesky import factor_in_place, invert_lower
from qcli.core.weight import Format, Rounder
from qcli.utils import triton_kernels

DAMPINGS = (0.01, 0.05, 0.1, 1.0)  # ours: tried in turn, relative to the Hessian's mean diagonal
_LEAST_PIVOT = 1e-4  # what of a diagonal entry may be left when it is reached: below, float32 has under three digits
_BAND = 1024  # rows of a Hessian that are moved together
_LAZY = 128  # columns per lazy block: the rest of the matrix gets their errors in one product
_STEP = 16  # columns per step: likewise the rest of the block
_TILE = 1 << 22  # weights encoded at a time


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


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor | None, float]:
    """Upper triangular `U` with `U^T U = (H + damping * mean(diag H) * I)^-1`, rows and columns of H in `order`.

    The damping is raised along `DAMPINGS` while the damped Hessian is not positive definite.

    Args:
        hessian: `[in, in]`; dead inputs need a nonzero diagonal (see `without_dead_inputs`).
        damping: the first one tried.
        order: int64 `[in]`; None: as they are.

    Returns:
        float32 `[in, in]`, None if no damping suffices; and the damping used.
    """
    size = len(hessian)
    flipped = torch.arange(size, device=hessian.device).flip(0) if order is None else order.flip(0)
    for strength in (damping, *(step for step in DAMPINGS if step > damping)):
        for dtype, least in ((torch.float32, _LEAST_PIVOT), (torch.float64, 0.0)):
            damped = torch.empty(size, size, dtype=dtype, device=hessian.device)
            for start in range(0, size, _BAND):
                band = slice(start, start + _BAND)
                damped[band] = hessian[flipped[band]][:, flipped]
            damped.diagonal().add_(strength * damped.diagonal().mean())
            diagonal = damped.diagonal().clone()
            lower, failed = factor_in_place(damped)
            pivots = lower.diagonal().square() / diagonal
            if bool((failed == 0) & pivots.isfinite().all() & (pivots.min() > least)):
                invert_lower(lower)
                upper = torch.empty(size, size, device=hessian.device)
                for start in range(0, size, _BAND):
                    rows = slice(start, min(start + _BAND, size))
                    upper[size - rows.stop : size - start] = lower[rows].flip(0, 1)
                return upper, strength
            del damped, lower
    return None, DAMPINGS[-1]


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
    order = importance.argsort(descending=True, stable=True)
    if kind == "static":
        return order
    # the first column of a group in `order` is its largest: groups rank by where that is
    groups = order // group_width
    first = torch.full_like(order, len(order)).scatter_reduce(
        0, groups, torch.arange(len(order), device=order.device), "amin"
    )
    return order[first[groups].argsort(stable=True)]


def quantize_columns(
    weight: Tensor,
    factor: Tensor,
    order: Tensor,
    format: Format,
    parts: Sequence[tuple[int, Mapping[str, Tensor]]],
    *,
    asymmetry: Tensor | None = None,
    dynamic: DynamicTables | None = None,
) -> Tensor:
    """Quantize a weight, or several stacked ones that read the same inputs, with error feedback.

    Args:
        weight: float32 `[out, in]`.
        factor: `U` of the Hessian with rows and columns in `order`, `[in, in]`.
        order: the columns in the order of their quantization, int64 `[in]`.
        format: of the codes.
        parts: for each stacked weight its number of rows and its tables.
        asymmetry: `asymmetric_term` in `order`; None: 0.
        dynamic: fits the tables of the only part on the way; None: they are final.

    Returns:
        Codes uint8 `[out, in]`, in the weight's own column order.
    """
    columns = weight.T[order].contiguous()  # one row per column: the loop then reads contiguous memory
    ends = [*range(_LAZY, len(order), _LAZY), len(order)] if dynamic is None else dynamic.ends
    for start, stop in pairwise([0, *ends]):
        block, rest = columns[start:stop], columns[stop:]
        if dynamic is not None:
            parts = [(len(weight), dynamic.fit(order[start:stop], block.T))]
        rounder = Rounder.stack([format.rounder(tables, order[start:stop]) for _, tables in parts])
        # rows of the factor divided by its diagonal: what an error of 1 takes from the columns that follow
        relative = factor[start:stop, start:] / factor.diagonal()[start:stop, None]
        within = None if asymmetry is None else asymmetry[start:stop, start:stop]
        round_columns = _kernel() if rounder.rule and triton_kernels.serve(block.device) else _round_columns
        errors = round_columns(block, relative[:, : stop - start], rounder, within)
        rest.addmm_(relative[:, stop - start :].T, errors, alpha=-1)
        if asymmetry is not None:
            rest.addmm_(asymmetry[start:stop, stop:].T, block + errors)
    return _codes(columns, order, format, parts)


def _kernel() -> Callable[..., Tensor]:
    from qcli.algorithms.solvers.feedback_kernel import round_columns

    return round_columns


def _round_columns(block: Tensor, relative: Tensor, rounder: Rounder, asymmetry: Tensor | None) -> Tensor:
    """Round the columns of a block in turn, in place; those that follow compensate.

    Args:
        block: `[n, out]`; becomes the rounded values.
        relative: what an error of 1 in each column takes from those that follow, `[n, n]`.
        asymmetry: what a value of 1 in each column adds to those that follow, `[n, n]`; None: 0.

    Returns:
        The error of each column, `[n, out]`.
    """
    errors, taken = torch.empty_like(block), relative.T.contiguous()
    shift = block.new_zeros(1, 1).expand(block.shape) if rounder.shift is None else rounder.shift
    block += shift
    values, results = block.unbind(), errors.unbind()
    operands = [*zip(*(operand.unbind() for operand in rounder.operands), strict=True)]
    for start in range(0, len(block), _STEP):
        step = slice(start, min(start + _STEP, len(block)))
        for column in range(step.start, step.stop):
            rounder.error(values[column], results[column], *operands[column])
            rest = slice(column + 1, step.stop)
            if column + 1 < step.stop:
                block[rest].addcmul_(taken[rest, column : column + 1], results[column], value=-1)
            if asymmetry is not None:
                block[rest].addr_(asymmetry[column, rest], values[column] - shift[column])
        rest = slice(step.stop, len(block))
        if step.stop < len(block):
            block[rest].addmm_(relative[step, rest].T, errors[step], alpha=-1)
        if asymmetry is not None:
            block[rest].addmm_(asymmetry[step, rest].T, block[step] - shift[step])
    block -= errors
    block -= shift
    return errors


def _codes(columns: Tensor, order: Tensor, format: Format, parts: Sequence[tuple[int, Mapping[str, Tensor]]]) -> Tensor:
    """The codes, uint8 `[out, in]`, of representable values `[in, out]` with their columns in `order`."""
    stored_order, step = order.argsort(), max(1, _TILE // len(order))
    codes, first = [], 0
    for rows, tables in parts:
        for tile in (slice(start, min(start + step, rows)) for start in range(0, rows, step)):
            values = columns[:, first + tile.start : first + tile.stop].T[:, stored_order]
            codes.append(format.encode(values, format.slice_rows(tables, tile)))
        first += rows
    return torch.cat(codes)
