"""Exact least squares of all table entries of a row under a full Hessian, at fixed codes (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcli.algorithms.solvers.tiles import tile_size
from qcli.core.formats._grouped import Grouped

_RIDGE = 1e-3  # towards the current values, relative to each unknown's own curvature
_MAX_NUMBERS = 1 << 26  # in the normal equations that are solved together: half a gigabyte


def fit_factors(
    target: Tensor, bases: Sequence[Tensor], current: Sequence[Tensor], hessian: Tensor, format: Grouped
) -> tuple[list[Tensor], Tensor]:
    """Factors `f` of each group that minimize each row's `(w* - w_hat) H (w* - w_hat)^T` with
    `w_hat = sum_b f_b basis_b`.

    Args:
        target: float32 `[out, in]`, `w*`.
        bases: float32 `[out, in]` each.
        current: the current factors, float32 `[out, groups]` each, towards which a small ridge pulls; one per basis,
            and optionally a last one for an offset of each group.
        hessian: `[in, in]`.
        format: of the groups.

    Returns:
        Factors like `current`, and bool `[out]`: the rows whose normal equations could be solved.
    """
    unknowns = sum(table.shape[1] for table in current)
    rows = max(1, min(_MAX_NUMBERS // unknowns**2, tile_size(target) // target.shape[1]))
    parts, solved = [], []
    for start in range(0, len(target), rows):
        part = slice(start, start + rows)
        own = [basis[part] for basis in bases]
        normal, right = _normal_equations(target[part], own, hessian, format, offset=len(current) > len(bases))
        diagonal = normal.diagonal(dim1=1, dim2=2).clone()
        ridge = _RIDGE * diagonal + 1e-12 * diagonal.amax(dim=1, keepdim=True)
        normal.diagonal(dim1=1, dim2=2).add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(normal)
        right += ridge * torch.cat([table[part] for table in current], 1).double()
        parts.append(torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1).float())
        solved.append(failed == 0)
    groups = [table.shape[1] for table in current]
    return list(torch.cat(parts).split(groups, dim=1)), torch.cat(solved)


def _normal_equations(
    target: Tensor, bases: Sequence[Tensor], hessian: Tensor, format: Grouped, *, offset: bool
) -> tuple[Tensor, Tensor]:
    """`A^T H A` `[out, n, n]` and `A^T H w*` `[out, n]`, float64, where `w_hat = A f`: row `j` of a weight row's
    `A [in, n]` holds every `basis_j` in the column of `j`'s group and, with `offset`, a 1 in the column of the group's
    offset."""

    def grouped(rows: Tensor) -> Tensor:  # `[out, in]` -> `[groups, width, out]`: rows last, so that sums vectorize
        return format.grouped(rows).permute(1, 2, 0).contiguous()

    weights, factors = grouped(target), [grouped(basis) for basis in bases]
    groups, width, rows = weights.shape
    count = len(bases) + offset
    normal = torch.zeros(rows, count, groups, count, groups, dtype=torch.float64, device=target.device)
    right = torch.zeros(rows, count, groups, dtype=torch.float64, device=target.device)
    by_group = format.grouped(format.grouped(hessian).flatten(1).T)  # `[in, groups, width]`, padded as `grouped` pads
    together = max(1, tile_size(target) // weights.numel())
    for start in range(0, groups, together):
        part = slice(start, start + together)
        hessian_part = by_group[:, part].transpose(0, 1)  # `[part, in, width]`
        for number, factor in enumerate(factors):
            products = (hessian_part @ factor[part]).view(-1, groups, width, rows)
            right[:, number, part] = (products * weights).sum((1, 2)).T
            sums = [(products * other).sum(2) for other in factors] + ([products.sum(2)] if offset else [])
            for other_number, entries in enumerate(sums):  # `[part, groups, out]`
                normal[:, number, part, other_number] = entries.permute(2, 0, 1)
            if offset:
                normal[:, -1, :, number, part] = sums[-1].permute(2, 1, 0)
    if offset:
        of_inputs = by_group.unflatten(0, (groups, width)).sum(3)
        right[:, -1] = (of_inputs.flatten(0, 1).T @ weights.flatten(0, 1)).T
        normal[:, -1, :, -1] = of_inputs.sum(1)
    return normal.flatten(3).flatten(1, 2), right.flatten(1)
