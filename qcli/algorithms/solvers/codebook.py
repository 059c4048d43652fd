"""Low-rank codebooks by clustering, truncated SVD and alternating least squares (LCQ, arXiv 2405.20973; details ours).

Every group's weights are clustered on their own; the SVD of all cluster centres gives the shapes V that a rank allows;
then codes, the scales and offsets of each group, and V take turns, each the best answer to the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcli.algorithms.solvers import grid
from qcli.algorithms.solvers.tables import least_squares
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import BASIS, OFFSET, SCALE, Codebook, nearest
from qcli.core.weight import QuantizedWeight

ROUNDS = 6  # ours: of the alternation; more change the error by less than .1 %
_CLUSTERING = 4  # ours: rounds of k-means, from the best uniform grid
_TILE = 1 << 20  # weights at a time
_RIDGE = 1e-6  # of the small systems, relative to their diagonal
_FAINT = 1e-6  # importance that unused inputs keep, relative to the mean


def fit(weight: Tensor, format: Codebook, importance: Tensor | None = None, rounds: int = ROUNDS) -> dict[str, Tensor]:
    """Tables with a small `sum importance * (w - w_hat)^2`; those of the searched uniform grid where they are better.

    Args:
        weight: float32 `[out, in]`.
        importance: float32 `[in]`, such as `diag(H)`; None: all ones.

    Returns:
        Tables of `format`, as they are stored.
    """
    weights = weight.new_ones(weight.shape[1]) if importance is None else importance
    weights = weights.clamp(min=_FAINT * float(weights.mean()))
    rows = format.basis_rows or len(weight)
    blocks = [
        _fit_block(weight[start : start + rows], format, weights, rounds) for start in range(0, len(weight), rows)
    ]
    relaxed = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return stored(relaxed, format)


def stored(relaxed: dict[str, Tensor], format: Codebook) -> dict[str, Tensor]:
    """Relaxed tables in the precision of `format`, the shapes of the basis scaled to a largest entry of 1."""
    size = relaxed[BASIS].abs().amax(-1).clamp(min=1e-30)
    per_row = format.spread(size, len(relaxed[SCALE]))
    scaled = {
        BASIS: relaxed[BASIS] / size[..., None],
        SCALE: relaxed[SCALE] * per_row[:, None],
        OFFSET: relaxed[OFFSET],
    }
    if format.table_bits == 16:
        return {name: table.half() for name, table in scaled.items()}
    scales, offsets = format.round_table(SCALE, scaled[SCALE]), format.round_table(OFFSET, scaled[OFFSET])
    return {BASIS: scaled[BASIS].half(), **scales, **offsets}


def refit(target: Tensor, weight: QuantizedWeight, format: Codebook, hessian: Tensor) -> tuple[QuantizedWeight, int]:
    """Exact least squares of all scales and offsets of a row under H at fixed codes and basis, then rounded.

    Args:
        target: float32 `[out, in]`, what `weight` stands for.
        hessian: `[in, in]`.

    Returns:
        The better of both, and how many rows could not be solved for and keep their tables.
    """
    relaxed = format.float_tables(weight.tables)
    basis = format.spread(relaxed[BASIS], len(target)).expand(len(target), -1, -1)
    looked_up = basis.gather(2, weight.codes.long()[:, None].expand(-1, format.rank, -1))
    current = [*relaxed[SCALE].unbind(-1), -relaxed[OFFSET]]
    solved, usable = least_squares(target, list(looked_up.unbind(1)), current, hessian, format)
    found = [table.where(usable[:, None], old) for table, old in zip(solved, current, strict=True)]
    tables = stored(relaxed | {SCALE: torch.stack(found[:-1], -1), OFFSET: -found[-1]}, format)
    refitted = QuantizedWeight(format, weight.shape, weight.codes, tables)

    def error(candidate: QuantizedWeight) -> float:
        difference = target - candidate.dense()
        return float((difference @ hessian * difference).sum(dtype=torch.float64))

    return min(weight, refitted, key=error), int((~usable).sum())


def _fit_block(weight: Tensor, format: Codebook, importance: Tensor, rounds: int) -> dict[str, Tensor]:
    """Relaxed tables of rows that share one basis."""
    ramp = _uniform(weight, format, importance)
    clusters = [
        _cluster(tile, format.entries(format.slice_rows(ramp, rows)), format, importance)
        for rows, tile in _tiles(weight)
    ]
    codes = torch.cat([codes for codes, _ in clusters])
    moment: Tensor = torch.stack([moment for _, moment in clusters]).sum(0)
    shapes = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : format.rank].T
    tables = _alternate(weight, shapes.float(), codes, format, importance, rounds)
    ramp[BASIS][0, 1:] = shapes[1:]  # unused so far; with 0 on both sides training could never use them
    return min(tables, ramp, key=lambda candidate: _error(weight, candidate, format, importance))


def _uniform(weight: Tensor, format: Codebook, importance: Tensor) -> dict[str, Tensor]:
    """The searched uniform grid as a codebook: a ramp, and shapes that are not used."""
    uniform = Affine(bits=format.bits, group_size=format.group_size, zero_point="float")
    found = grid.search(weight, uniform, importance)
    scale, zero_point = found["weight_scale"].float(), found["weight_zero_point"].float()
    ramp = torch.arange(1 << format.bits, device=weight.device).float()
    basis, scales = ramp.new_zeros(1, format.rank, len(ramp)), scale.new_zeros(*scale.shape, format.rank)
    basis[0, 0], scales[..., 0] = ramp, scale
    return {BASIS: basis, SCALE: scales, OFFSET: scale * zero_point}


def _cluster(weight: Tensor, centres: Tensor, format: Codebook, importance: Tensor) -> tuple[Tensor, Tensor]:
    """k-means of each group from `centres` `[rows, groups, K]`: codes `[rows, groups, n]`, and the second moment of the
    centres about their group's mean, weighted by the group's importance, float64 `[K, K]`."""
    groups, weights = format.grouped(weight), format.grouped(importance[None])
    for _ in range(_CLUSTERING):
        count, total = _sums(groups, weights, nearest(groups, centres), centres.shape[-1])
        centres = torch.where(count > 0, total / count.clamp(min=1e-30), centres)
        centres = centres.sort(dim=-1).values
    codes = nearest(groups, centres)
    heavy = weights.sum(-1).double().sqrt()[..., None]
    centred = ((centres - centres.mean(-1, keepdim=True)).double() * heavy).flatten(0, 1)
    return codes, centred.T @ centred


def _alternate(
    weight: Tensor, shapes: Tensor, codes: Tensor, format: Codebook, importance: Tensor, rounds: int
) -> dict[str, Tensor]:
    """Turns of (scales, offsets), basis and codes, from `shapes` `[rank, K]` and `codes` `[rows, groups, n]`."""
    rank, entries = shapes.shape
    scale = weight.new_empty(*codes.shape[:2], rank)
    offset = weight.new_empty(*codes.shape[:2])
    weights = format.grouped(importance[None])
    for turn in range(rounds):
        normal, right = weight.new_zeros(entries, rank, rank).double(), weight.new_zeros(entries, rank).double()
        for rows, tile in _tiles(weight):
            groups = format.grouped(tile)
            if turn:
                tables = {BASIS: shapes[None], SCALE: scale[rows], OFFSET: offset[rows]}
                codes[rows] = nearest(groups, format.entries(tables))
            count, total = _sums(groups, weights, codes[rows], entries)
            scale[rows], offset[rows] = _scales(count, total, shapes)
            own = scale[rows].double().flatten(0, 1)
            wanted = (total + count * offset[rows][..., None]).double().flatten(0, 1)
            weighted = count.double().flatten(0, 1)
            normal += torch.einsum("nk,nr,ns->krs", weighted, own, own)
            right += torch.einsum("nk,nr->kr", wanted, own)
        ridge = _RIDGE * normal.diagonal(dim1=1, dim2=2).mean(0).clamp(min=1e-30)
        normal += torch.diag(ridge)
        right += ridge * shapes.T.double()
        shapes = torch.linalg.solve(normal, right[..., None])[..., 0].T.float().contiguous()
    return {BASIS: shapes[None], SCALE: scale, OFFSET: offset}


def _scales(count: Tensor, total: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """The best `S [rows, groups, rank]` and `beta [rows, groups]` for the weights summed up by code.

    Args:
        count: `[rows, groups, K]`, importance by code.
        total: likewise, importance times weight.
        shapes: `[rank, K]`.
    """
    design = torch.cat([shapes, -torch.ones_like(shapes[:1])]).double()
    normal = torch.einsum("rk,ogk,sk->ogrs", design, count.double(), design)
    right = torch.einsum("rk,ogk->ogr", design, total.double())
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    normal = normal + torch.diag_embed(_RIDGE * diagonal + 1e-12 * diagonal.amax(-1, keepdim=True).clamp(min=1e-30))
    solved = torch.linalg.solve(normal, right[..., None])[..., 0].float()
    return solved[..., :-1], solved[..., -1]


def _sums(groups: Tensor, weights: Tensor, codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Importance, and importance times weight, by group and code: `[rows, groups, K]` each."""
    places, weights = codes.long(), weights.expand_as(groups)
    empty = groups.new_zeros(*groups.shape[:2], entries)
    return empty.scatter_add(2, places, weights), empty.scatter_add(2, places, weights * groups)


def _error(weight: Tensor, relaxed: dict[str, Tensor], format: Codebook, importance: Tensor) -> float:
    """Of the tables as they will be stored."""
    tables, total = stored(relaxed, format), 0.0
    for rows, tile in _tiles(weight):
        own = format.slice_rows(tables, rows)
        difference = format.decode(format.encode(tile, own), own) - tile
        total += float((difference.square() * importance).sum(dtype=torch.float64))
    return total


def _tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _TILE // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, start + step), weight[start : start + step]
