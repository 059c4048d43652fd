"""Exact least squares of all table entries of a row under a full Hessian, at fixed codes (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    rows = max(1, _MAX_NUMBERS // unknowns**2)
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
    rows, in_features = target.shape
    groups, width = format.groups(in_features), format.group_width(in_features)
    parts = [slice(number * groups, (number + 1) * groups) for number in range(len(bases) + offset)]
    normal = torch.zeros(rows, parts[-1].stop, parts[-1].stop, dtype=torch.float64, device=target.device)
    right = torch.zeros(rows, parts[-1].stop, dtype=torch.float64, device=target.device)

    def group_sums(values: Tensor) -> Tensor:
        return format.grouped(values).sum(-1)

    target_hessian = target @ hessian
    for part, basis in zip(parts, bases, strict=False):
        right[:, part] = group_sums(basis * target_hessian)
    if offset:
        right[:, parts[-1]] = group_sums(target_hessian)
    for group in range(groups):
        columns = slice(group * width, min((group + 1) * width, in_features))
        for part, basis in zip(parts, bases, strict=False):
            basis_hessian = basis[:, columns] @ hessian[columns]
            for other_part, other in zip(parts, bases, strict=False):
                normal[:, part.start + group, other_part] = group_sums(other * basis_hessian)
            if offset:
                with_offsets = group_sums(basis_hessian)
                normal[:, part.start + group, parts[-1]] = with_offsets
                normal[:, parts[-1], part.start + group] = with_offsets
        if offset:
            normal[:, parts[-1].start + group, parts[-1]] = group_sums(hessian[columns].sum(0, keepdim=True))
    return normal, right
