"""Exact least squares of all numbers in a row's tables, once its codes are fixed (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcli.algorithms.solvers.grid import rounded_scale, rounded_zero_point
from qcli.core.formats._grouped import Grouped
from qcli.core.formats.affine import Affine

_RIDGE = 1e-3  # towards the current tables, relative to each unknown's own curvature
_SYSTEMS = 1 << 26  # numbers in the systems that are solved together: half a gigabyte


def refit_tables(
    target: Tensor, codes: Tensor, tables: dict[str, Tensor], format: Affine, hessian: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Affine tables that minimise `(w* - w_hat) H (w* - w_hat)^T` for each row at fixed codes.

    With a float zero point the unknowns of a row are `scale` and `offset = -scale * zero_point` of each group; with an
    integer or no zero point, the scales alone.

    Args:
        target: float32 `[out, in]`, `w*`.
        codes: uint8 `[out, in]`.
        tables: the grid the codes were chosen on.
        hessian: `[in, in]`.

    Returns:
        The new tables, and for which rows the solution was usable, bool `[out]`; the others kept the old ones.
    """
    free_offset = format.zero_point == "float"
    scale = tables["weight_scale"].float()
    zero_point = tables["weight_zero_point"].float() if format.zero_point != "none" else None
    basis = codes.float()
    if not free_offset:
        basis = basis - (format.center if zero_point is None else format.spread(zero_point, codes.shape[1]))
    current = [scale] if zero_point is None or not free_offset else [scale, -scale * zero_point]
    solved, usable = least_squares(target, [basis], current, hessian, format)

    new_scale, new_zero_point = rounded_scale(solved[0]), zero_point
    usable &= new_scale.isfinite().all(1) & (new_scale.abs() > 1e-3 * scale.abs()).all(1)
    if free_offset:
        new_zero_point = rounded_zero_point(-solved[1] / new_scale, format)
        usable &= new_zero_point.isfinite().all(1)
    refitted = {"weight_scale": torch.where(usable[:, None], new_scale, scale).to(torch.float16)}
    if zero_point is not None and new_zero_point is not None:
        chosen = torch.where(usable[:, None], new_zero_point, zero_point)
        refitted["weight_zero_point"] = chosen.to(tables["weight_zero_point"].dtype)
    return refitted, usable


def least_squares(
    target: Tensor, bases: Sequence[Tensor], current: Sequence[Tensor], hessian: Tensor, format: Grouped
) -> tuple[list[Tensor], Tensor]:
    """Factors `f` of each group that minimise `(w* - w_hat) H (w* - w_hat)^T` with `w_hat = sum_b f_b basis_b`.

    Args:
        target: float32 `[out, in]`, `w*`.
        bases: float32 `[out, in]` each.
        current: the factors now, float32 `[out, groups]` each, towards which a small ridge pulls; one more than
            `bases` if the groups also have an offset, the last.
        hessian: `[in, in]`.

    Returns:
        The factors as `current`, and for which rows the system could be solved, bool `[out]`.
    """
    unknowns = sum(table.shape[1] for table in current)
    rows = max(1, _SYSTEMS // unknowns**2)
    parts, usable = [], []
    for start in range(0, len(target), rows):
        part = slice(start, start + rows)
        own = [basis[part] for basis in bases]
        normal, right = _normal_equations(target[part], own, hessian, format, ones=len(current) > len(bases))
        diagonal = normal.diagonal(dim1=1, dim2=2).clone()
        ridge = _RIDGE * diagonal + 1e-12 * diagonal.amax(dim=1, keepdim=True)
        normal.diagonal(dim1=1, dim2=2).add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(normal)
        right += ridge * torch.cat([table[part] for table in current], 1).double()
        parts.append(torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1).float())
        usable.append(failed == 0)
    groups = [table.shape[1] for table in current]
    return list(torch.cat(parts).split(groups, dim=1)), torch.cat(usable)


def _normal_equations(
    target: Tensor, bases: Sequence[Tensor], hessian: Tensor, format: Grouped, *, ones: bool
) -> tuple[Tensor, Tensor]:
    """`A^T H A` `[out, n, n]` and `A^T H w*` `[out, n]` in float64, where row `j` of `A [in, n]` holds every `basis_j`
    in its group's column and, with `ones`, a 1 in the column of its group's offset."""
    rows, in_features = target.shape
    groups, width = format.groups(in_features), format.group_width(in_features)
    parts = [slice(number * groups, (number + 1) * groups) for number in range(len(bases) + ones)]
    normal = torch.zeros(rows, parts[-1].stop, parts[-1].stop, dtype=torch.float64, device=target.device)
    right = torch.zeros(rows, parts[-1].stop, dtype=torch.float64, device=target.device)

    def sums(values: Tensor) -> Tensor:
        return format.grouped(values).sum(-1)

    pulled = target @ hessian
    for part, basis in zip(parts, bases, strict=False):
        right[:, part] = sums(basis * pulled)
    if ones:
        right[:, parts[-1]] = sums(pulled)
    for group in range(groups):
        columns = slice(group * width, min((group + 1) * width, in_features))
        for part, basis in zip(parts, bases, strict=False):
            reach = basis[:, columns] @ hessian[columns]
            for other, against in zip(parts, bases, strict=False):
                normal[:, part.start + group, other] = sums(against * reach)
            if ones:
                offsets = sums(reach)
                normal[:, part.start + group, parts[-1]] = offsets
                normal[:, parts[-1], part.start + group] = offsets
        if ones:
            normal[:, parts[-1].start + group, parts[-1]] = sums(hessian[columns].sum(0, keepdim=True))
    return normal, right
