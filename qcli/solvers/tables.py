"""Exact least squares of all scales and offsets of a row, once its codes are fixed (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.formats.affine import Affine
from qcli.solvers.grid import rounded_scale, rounded_zero_point

_RIDGE = 1e-3  # towards the current tables, relative to each unknown's own curvature
_SYSTEMS = 1 << 26  # numbers in the systems that are solved together: half a gigabyte


def refit_tables(
    target: Tensor, codes: Tensor, tables: dict[str, Tensor], format: Affine, hessian: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Tables that minimise `(w* - w_hat) H (w* - w_hat)^T` for each row at fixed codes.

    With a float zero point the unknowns of a row are `scale` and `offset = -scale * zero_point` of each group
    (one `2G x 2G` system a row); with an integer or no zero point, the scales alone.

    Args:
        target: float32 `[out, in]`, `w*`.
        codes: uint8 `[out, in]`.
        tables: the grid the codes were chosen on.
        hessian: `[in, in]`.

    Returns:
        The new tables, and for which rows the solution was usable, bool `[out]`; the others kept the old ones.
    """
    unknowns = format.groups(codes.shape[1]) * (2 if format.zero_point == "float" else 1)
    rows = max(1, _SYSTEMS // unknowns**2)
    parts, usable = [], []
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        own = {name: table[part] for name, table in tables.items()}
        refitted, accepted = _refit_rows(target[part], codes[part], own, format, hessian)
        parts.append(refitted)
        usable.append(accepted)
    return {name: torch.cat([part[name] for part in parts]) for name in tables}, torch.cat(usable)


def _refit_rows(
    target: Tensor, codes: Tensor, tables: dict[str, Tensor], format: Affine, hessian: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    free_offset = format.zero_point == "float"
    scale = tables["weight_scale"].float()
    zero_point = tables["weight_zero_point"].float() if format.zero_point != "none" else None
    basis = codes.float()
    if not free_offset:
        basis = basis - (format.center if zero_point is None else format.spread(zero_point, codes.shape[1]))

    normal, right = _normal_equations(target, basis, hessian, format, ones=free_offset)
    current = torch.cat([scale, -scale * zero_point], 1) if free_offset and zero_point is not None else scale
    diagonal = normal.diagonal(dim1=1, dim2=2).clone()
    ridge = _RIDGE * diagonal + 1e-12 * diagonal.amax(dim=1, keepdim=True)
    normal.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(normal)
    solved = torch.cholesky_solve((right + ridge * current.double()).unsqueeze(-1), factor).squeeze(-1).float()

    groups = scale.shape[1]
    new_scale, new_zero_point = rounded_scale(solved[:, :groups]), zero_point
    usable = (failed == 0) & new_scale.isfinite().all(1) & (new_scale.abs() > 1e-3 * scale.abs()).all(1)
    if free_offset:
        new_zero_point = rounded_zero_point(-solved[:, groups:] / new_scale, format)
        usable &= new_zero_point.isfinite().all(1)
    refitted = {"weight_scale": torch.where(usable[:, None], new_scale, scale).to(torch.float16)}
    if zero_point is not None and new_zero_point is not None:
        chosen = torch.where(usable[:, None], new_zero_point, zero_point)
        refitted["weight_zero_point"] = chosen.to(tables["weight_zero_point"].dtype)
    return refitted, usable


def _normal_equations(
    target: Tensor, basis: Tensor, hessian: Tensor, format: Affine, *, ones: bool
) -> tuple[Tensor, Tensor]:
    """`A^T H A` `[out, n, n]` and `A^T H w*` `[out, n]` in float64, where row `j` of `A [in, n]` holds `basis_j` in
    its group's column and, with `ones`, a 1 in the column of its group's offset."""
    rows, in_features = basis.shape
    groups, width = format.groups(in_features), format.group_width(in_features)
    unknowns = groups * (2 if ones else 1)
    normal = torch.zeros(rows, unknowns, unknowns, dtype=torch.float64, device=basis.device)
    right = torch.zeros(rows, unknowns, dtype=torch.float64, device=basis.device)
    pulled = target @ hessian
    right[:, :groups] = _group_sums(basis * pulled, format)
    if ones:
        right[:, groups:] = _group_sums(pulled, format)
    for group in range(groups):
        columns = slice(group * width, min((group + 1) * width, in_features))
        reach = basis[:, columns] @ hessian[columns]
        normal[:, group, :groups] = _group_sums(basis * reach, format)
        if ones:
            offsets = _group_sums(reach, format)
            normal[:, group, groups:] = offsets
            normal[:, groups:, group] = offsets
            normal[:, groups + group, groups:] = _group_sums(hessian[columns].sum(0, keepdim=True), format)
    return normal, right


def _group_sums(rows: Tensor, format: Affine) -> Tensor:
    return format.grouped(rows).sum(-1)
