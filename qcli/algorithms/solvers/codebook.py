"""Fitting low-rank codebooks (LCQ, arXiv 2405.20973; the paper gives no algorithm, these steps are ours).

The weights of each group are clustered on their own; the leading eigenvectors of the centroids' second moment are the
first basis V; then codes, scales and offsets, and V are updated in turn, each by exact minimization.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcli.algorithms.solvers import grid
from qcli.algorithms.solvers.least_squares import fit_factors
from qcli.algorithms.solvers.output_error import output_error
from qcli.core.by_code import sums_by_code
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import BASIS, OFFSET, SCALE, Codebook, nearest
from qcli.core.weight import QuantizedWeight

ROUNDS = 6  # ours: alternations; more change the error by less than 0.1 %
_KMEANS_ROUNDS = 4  # ours: from the best uniform grid
_TILE = 1 << 20  # weights per tile
_RIDGE = 1e-6  # of small normal equations, relative to their diagonal
_MIN_IMPORTANCE = 1e-6  # relative to the mean: every column keeps some weight
_TINY = 1e-30


def fit(weight: Tensor, format: Codebook, importance: Tensor | None = None, rounds: int = ROUNDS) -> dict[str, Tensor]:
    """Tables with a small `sum importance * (w - w_hat)^2`; never worse than the searched uniform grid.

    Args:
        weight: float32 `[out, in]`.
        importance: float32 `[in]`, such as `diag(H)`; None: all ones.
        rounds: alternations of codes, scales and basis.

    Returns:
        Tables of `format`, in their stored dtypes.
    """
    weights = weight.new_ones(weight.shape[1]) if importance is None else importance
    weights = weights.clamp(min=_MIN_IMPORTANCE * float(weights.mean()))
    rows = format.basis_rows or len(weight)
    blocks = [
        _fit_block(weight[start : start + rows], format, weights, rounds) for start in range(0, len(weight), rows)
    ]
    tables = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return _stored(tables, format)


def refit(target: Tensor, weight: QuantizedWeight, format: Codebook, hessian: Tensor) -> tuple[QuantizedWeight, int]:
    """Exact least squares of all scales and offsets of a row under H at fixed codes and basis, then rounded (ours).

    Args:
        target: float32 `[out, in]`.
        weight: the weight whose tables are refitted.
        hessian: `[in, in]`.

    Returns:
        The new weight, or `weight` itself if its error is not larger, and the number of rows whose solution was
        unusable; these keep their tables.
    """
    tables = format.float_tables(weight.tables)
    basis = format.spread(tables[BASIS], len(target)).expand(len(target), -1, -1)
    decoded = basis.gather(2, weight.codes.long()[:, None].expand(-1, format.rank, -1))
    current = [*tables[SCALE].unbind(-1), -tables[OFFSET]]
    solution, usable = fit_factors(target, list(decoded.unbind(1)), current, hessian, format)
    factors = [new.where(usable[:, None], old) for new, old in zip(solution, current, strict=True)]
    rounded = _stored(tables | {SCALE: torch.stack(factors[:-1], -1), OFFSET: -factors[-1]}, format)
    refitted = QuantizedWeight(format, weight.shape, weight.codes, rounded)
    best = min(weight, refitted, key=lambda choice: output_error(target - choice.dense(), hessian))
    return best, int((~usable).sum())


def _stored(tables: dict[str, Tensor], format: Codebook) -> dict[str, Tensor]:
    """Round float tables to those that `format` stores; each basis vector is scaled to a largest magnitude of 1."""
    size = tables[BASIS].abs().amax(-1).clamp(min=_TINY)
    size_by_row = format.spread(size, len(tables[SCALE]))
    scaled = {
        BASIS: tables[BASIS] / size[..., None],
        SCALE: tables[SCALE] * size_by_row[:, None],
        OFFSET: tables[OFFSET],
    }
    if format.table_bits == 16:
        return {name: table.half() for name, table in scaled.items()}
    scales, offsets = format.round_table(SCALE, scaled[SCALE]), format.round_table(OFFSET, scaled[OFFSET])
    return {BASIS: scaled[BASIS].half(), **scales, **offsets}


def _fit_block(weight: Tensor, format: Codebook, importance: Tensor, rounds: int) -> dict[str, Tensor]:
    """Float tables of rows that share a basis."""
    uniform = _uniform(weight, format, importance)
    clusters = [
        _cluster(tile, format.entries(format.slice_rows(uniform, rows)), format, importance)
        for rows, tile in _tiles(weight)
    ]
    codes = torch.cat([codes for codes, _ in clusters])
    moment: Tensor = torch.stack([moment for _, moment in clusters]).sum(0)
    basis = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : format.rank].T
    fitted = _alternate(weight, basis.float(), codes, format, importance, rounds)
    uniform[BASIS][0, 1:] = basis[1:]  # their scales are 0; were they 0 as well, training could never use them
    return min(fitted, uniform, key=lambda tables: _stored_error(weight, tables, format, importance))


def _uniform(weight: Tensor, format: Codebook, importance: Tensor) -> dict[str, Tensor]:
    """The searched uniform grid as a codebook: a ramp, and further basis vectors of zeros with scales of 0."""
    affine = Affine(bits=format.bits, group_size=format.group_size, zero_point="float")
    tables = grid.search(weight, affine, importance)
    scale, zero_point = tables["weight_scale"].float(), tables["weight_zero_point"].float()
    ramp = torch.arange(1 << format.bits, device=weight.device).float()
    basis, scales = ramp.new_zeros(1, format.rank, len(ramp)), scale.new_zeros(*scale.shape, format.rank)
    basis[0, 0], scales[..., 0] = ramp, scale
    return {BASIS: basis, SCALE: scales, OFFSET: scale * zero_point}


def _cluster(weight: Tensor, centroids: Tensor, format: Codebook, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted k-means of each group on its own, from `centroids` `[rows, groups, K]`.

    Returns:
        Codes uint8 `[rows, groups, n]`, and the second moment of the centroids about their group's mean, weighted by
        the group's importance, float64 `[K, K]`.
    """
    groups, weights = format.grouped(weight), format.grouped(importance[None])
    for _ in range(_KMEANS_ROUNDS):
        count, total = _sums_by_code(groups, weights, nearest(groups, centroids), centroids.shape[-1])
        centroids = torch.where(count > 0, total / count.clamp(min=_TINY), centroids)
        centroids = centroids.sort(dim=-1).values
    codes = nearest(groups, centroids)
    root = weights.sum(-1).double().sqrt()[..., None]
    centered = ((centroids - centroids.mean(-1, keepdim=True)).double() * root).flatten(0, 1)
    return codes, centered.T @ centered


def _alternate(
    weight: Tensor, basis: Tensor, codes: Tensor, format: Codebook, importance: Tensor, rounds: int
) -> dict[str, Tensor]:
    """Alternate codes, scales and offsets, and basis, each the exact minimizer given the others.

    Args:
        basis: initial V, float32 `[rank, K]`.
        codes: initial codes, uint8 `[rows, groups, n]`; overwritten.

    Returns:
        Float tables.
    """
    rank, entries = basis.shape
    scale = weight.new_empty(*codes.shape[:2], rank)
    offset = weight.new_empty(*codes.shape[:2])
    weights = format.grouped(importance[None])
    for number in range(rounds):
        normal, right = weight.new_zeros(entries, rank, rank).double(), weight.new_zeros(entries, rank).double()
        for rows, tile in _tiles(weight):
            groups = format.grouped(tile)
            if number:
                tables = {BASIS: basis[None], SCALE: scale[rows], OFFSET: offset[rows]}
                codes[rows] = nearest(groups, format.entries(tables))
            count, total = _sums_by_code(groups, weights, codes[rows], entries)
            scale[rows], offset[rows] = _fit_scales(count, total, basis)
            factors = scale[rows].double().flatten(0, 1)
            targets = (total + count * offset[rows][..., None]).double().flatten(0, 1)
            counts = count.double().flatten(0, 1)
            normal += torch.einsum("nk,nr,ns->krs", counts, factors, factors)
            right += torch.einsum("nk,nr->kr", targets, factors)
        ridge = _RIDGE * normal.diagonal(dim1=1, dim2=2).mean(0).clamp(min=_TINY)
        normal += torch.diag(ridge)
        right += ridge * basis.T.double()
        basis = torch.linalg.solve(normal, right[..., None])[..., 0].T.float().contiguous()
    return {BASIS: basis[None], SCALE: scale, OFFSET: offset}


def _fit_scales(count: Tensor, total: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of each group's `S [rows, groups, rank]` and `beta [rows, groups]` at fixed codes and basis.

    Args:
        count: `[rows, groups, K]`, importance summed by code.
        total: `[rows, groups, K]`, importance times weight summed by code.
        basis: `[rank, K]`.
    """
    design = torch.cat([basis, -torch.ones_like(basis[:1])]).double()
    normal = torch.einsum("rk,ogk,sk->ogrs", design, count.double(), design)
    right = torch.einsum("rk,ogk->ogr", design, total.double())
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    normal = normal + torch.diag_embed(_RIDGE * diagonal + 1e-12 * diagonal.amax(-1, keepdim=True).clamp(min=_TINY))
    solution = torch.linalg.solve(normal, right[..., None])[..., 0].float()
    return solution[..., :-1], solution[..., -1]


def _sums_by_code(groups: Tensor, weights: Tensor, codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Importance, and importance times weight, summed by group and code: `[rows, groups, K]` each."""
    weights = weights.expand_as(groups)
    return sums_by_code(weights, codes, entries), sums_by_code(weights * groups, codes, entries)


def _stored_error(weight: Tensor, tables: dict[str, Tensor], format: Codebook, importance: Tensor) -> float:
    """Weighted squared error with float tables rounded as they will be stored."""
    rounded, total = _stored(tables, format), 0.0
    for rows, tile in _tiles(weight):
        own = format.slice_rows(rounded, rows)
        difference = format.decode(format.encode(tile, own), own) - tile
        total += float((difference.square() * importance).sum(dtype=torch.float64))
    return total


def _tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _TILE // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, start + step), weight[start : start + step]
