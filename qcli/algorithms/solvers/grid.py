"""Scales and zero points of uniform grids: from each group's range, by search, or by least squares at fixed codes.

Tables are those of `core/formats/affine.py`, rounded to their stored dtype before any code is chosen, so that codes are
nearest on the grid that will be read back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.algorithms.solvers.least_squares import fit_factors
from qcli.core.formats._tables import SMALLEST_SCALE
from qcli.core.formats.affine import Affine

_CPU_TILE, _GPU_TILE = 1 << 19, 1 << 25  # weights per tile: one core's cache; enough to fill a GPU
_CLIPS = tuple(1.0 - 0.05 * step for step in range(1, 13))  # ours: down to 0.4 of the range, which 2 bits need
_UNEVEN_CLIPS = tuple(  # ours: (low, high), one side clipped more than the other, by up to 0.2 of the range
    (low / 10, high / 10) for low in range(4, 11) for high in range(4, 11) if 0 < abs(low - high) <= 2
)
_ROUNDS = 3  # ours: least-squares rounds after the clip search; a fourth no longer changes codes


def minmax(weight: Tensor, format: Affine) -> dict[str, Tensor]:
    """Grids that cover each group's range, 0 included.

    Asymmetric: `scale = (max - min) / (2**bits - 1)`. Symmetric: the side with the larger magnitude lands on the lowest
    code `-2**(bits-1)`, so that all codes are used; the scale is negative where that side is positive. Restricted:
    `scale = max(-min, max) / (2**(bits-1) - 1)`.

    Args:
        weight: float32 `[out, in]`.

    Returns:
        Tables of `format`.
    """
    return _tables(*_covering(*_range(format.grouped(weight)), format), format)


def round_to_minmax(weight: Tensor, format: Affine) -> tuple[Tensor, dict[str, Tensor]]:
    """`minmax` and the nearest codes, in one pass over cache-sized tiles.

    Args:
        weight: `[out, in]`, any floating dtype.

    Returns:
        Codes uint8 `[out, in]`, and tables of `format`.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    signed = codes.view(torch.int8) if format.bits < 8 else codes  # torch vectorizes float to int8, not to uint8
    rows, parts = min(_tile_rows(weight), len(weight)), []
    tile = torch.empty(rows, weight.shape[1], device=weight.device)
    steps = torch.empty_like(format.grouped(tile))
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        groups = format.grouped(tile[: len(part)].copy_(part) if part.dtype != torch.float32 else part)
        scale, zero_point = _covering(*_range(groups), format)
        stepped = torch.div(groups, scale[..., None], out=steps[: len(part)])
        stepped.add_(zero_point[..., None]).round_().clamp_(format.lowest, format.highest)
        signed[start : start + rows] = stepped.view(len(part), -1)[:, : weight.shape[1]]
        parts.append(_tables(scale, zero_point, format))
    return codes, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def search(weight: Tensor, format: Affine, importance: Tensor | None = None, power: float = 2.0) -> dict[str, Tensor]:
    """Grids with the least `sum importance * |w - w_hat|**power` in each group among many candidates.

    Candidates are clipped ranges, at 2 and 3 bits with an integer zero point also shifted by one code, with a float
    zero point also clipped unevenly; then, if `power` is 2, rounds of weighted least squares for scale and offset at
    fixed codes. A group is never worse than with `minmax`.

    Args:
        weight: float32 `[out, in]`.
        importance: float32 `[in]`, such as `diag(H)`; None: all ones.
        power: 2, or 2.4 as GPTQ implementations use without data.

    Returns:
        Tables of `format`.
    """
    rows = _tile_rows(weight)
    weights = format.grouped((weight.new_ones(weight.shape[1]) if importance is None else importance)[None])
    parts = [
        _search_rows(format.grouped(weight[start : start + rows]), weights, format, power)
        for start in range(0, len(weight), rows)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def refit(
    target: Tensor, codes: Tensor, tables: dict[str, Tensor], format: Affine, hessian: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Tables that minimize each row's `(w* - w_hat) H (w* - w_hat)^T` at fixed codes, by exact least squares (ours).

    With a float zero point the unknowns of a row are `scale` and `offset = -scale * zero_point` of each group;
    otherwise the scales alone.

    Args:
        target: float32 `[out, in]`, `w*`.
        codes: uint8 `[out, in]`.
        tables: those the codes were chosen with.
        hessian: `[in, in]`.

    Returns:
        Tables of `format`, and bool `[out]`: the rows whose solution is usable; the others keep their tables.
    """
    free_offset = format.zero_point == "float"
    scale = tables["weight_scale"].float()
    zero_point = tables["weight_zero_point"].float() if format.zero_point != "none" else None
    basis = codes.float()
    if not free_offset:
        basis = basis - (format.center if zero_point is None else format.spread(zero_point, codes.shape[1]))
    current = [scale] if zero_point is None or not free_offset else [scale, -scale * zero_point]
    solution, usable = fit_factors(target, [basis], current, hessian, format)

    new_scale, new_zero_point = _round_scale(solution[0]), zero_point
    usable &= new_scale.isfinite().all(1) & (new_scale.abs() > 1e-3 * scale.abs()).all(1)
    if free_offset:
        new_zero_point = _round_zero_point(-solution[1] / new_scale, format)
        usable &= new_zero_point.isfinite().all(1)
    refitted = {"weight_scale": torch.where(usable[:, None], new_scale, scale).to(torch.float16)}
    if zero_point is not None and new_zero_point is not None:
        kept = torch.where(usable[:, None], new_zero_point, zero_point)
        refitted["weight_zero_point"] = kept.to(tables["weight_zero_point"].dtype)
    return refitted, usable


def _tile_rows(weight: Tensor) -> int:
    return max(1, (_CPU_TILE if weight.device.type == "cpu" else _GPU_TILE) // weight.shape[1])


def _search_rows(groups: Tensor, importance: Tensor, format: Affine, power: float) -> dict[str, Tensor]:
    """Search the grids of `groups` `[rows, groups, n]`; `importance` `[1, groups, n]` is 0 in the padding."""
    low, high = _range(groups)
    best = _BestGrid(groups, importance, format, power)
    best.consider(*_covering(low, high, format))
    clips = torch.tensor(_CLIPS, device=groups.device)[:, None, None]
    for scale, zero_point in zip(*_covering(low * clips, high * clips, format), strict=True):
        best.consider(scale, zero_point)
        if format.zero_point == "integer" and format.bits <= 3:
            for shift in (-1, 1):
                best.consider(scale, (zero_point + shift).clamp_(0, (1 << format.bits) - 1))
    if format.zero_point == "float":
        low_clips, high_clips = torch.tensor(_UNEVEN_CLIPS, device=groups.device).T[..., None, None]
        for scale, zero_point in zip(*_covering(low * low_clips, high * high_clips, format), strict=True):
            best.consider(scale, zero_point)
    if power == 2.0:
        for _ in range(_ROUNDS):
            best.consider(*_fit_groups(groups, best.codes(), importance, best, format))
    return _tables(best.scale, best.zero_point, format)


class _BestGrid:
    """The best grid of each group among those considered: scale and zero point, float32 `[rows, groups]`."""

    def __init__(self, groups: Tensor, importance: Tensor, format: Affine, power: float) -> None:
        self.groups, self.importance, self.format, self.power = groups, importance, format, power
        self.error = groups.new_full(groups.shape[:2], torch.inf)
        self.scale = groups.new_ones(groups.shape[:2])
        self.zero_point = groups.new_zeros(groups.shape[:2])

    def codes(self) -> Tensor:
        """Codes on the best grid, as floats `[rows, groups, n]`."""
        return self._codes(self.scale, self.zero_point)

    def consider(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take this grid in the groups where its error is smaller."""
        error = (self._codes(scale, zero_point) - zero_point[..., None]).mul_(scale[..., None]).sub_(self.groups)
        error = error.square_() if self.power == 2.0 else error.abs_().pow_(self.power)
        total = error.mul_(self.importance).sum(-1)
        better = total < self.error
        self.error = torch.where(better, total, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)

    def _codes(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = (self.groups / scale[..., None]).add_(zero_point[..., None])
        return codes.round_().clamp_(self.format.lowest, self.format.highest)


def _fit_groups(
    groups: Tensor, codes: Tensor, importance: Tensor, current: _BestGrid, format: Affine
) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least weighted squared error of each group at fixed codes."""

    def mean(values: Tensor) -> Tensor:
        return (values * importance).sum(-1) / importance.sum(-1).clamp_(min=1e-30)

    if format.zero_point == "none":
        centered = codes - format.center
    else:
        code_mean, weight_mean = mean(codes), mean(groups)
        centered = codes - code_mean[..., None]
    variance = mean(centered.square())
    scale = mean(centered * groups) / variance.clamp(min=1e-30)
    usable = (variance > 1e-12) & (scale.abs() > 1e-12)
    scale = _round_scale(torch.where(usable, scale, current.scale))
    if format.zero_point == "none":
        return scale, current.zero_point
    zero_point = _round_zero_point(code_mean - weight_mean / scale, format)
    if format.zero_point == "integer":  # the zero point was rounded: fit the scale once more
        centered = codes - zero_point[..., None]
        refitted = mean(centered * groups) / mean(centered.square()).clamp(min=1e-30)
        scale = _round_scale(torch.where(usable & (refitted.abs() > 1e-12), refitted, scale))
    return scale, torch.where(usable, zero_point, current.zero_point)


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group and 0: `[rows, groups, n]` -> `[rows, groups]` each."""
    return groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)


def _covering(low: Tensor, high: Tensor, format: Affine) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers `low <= 0 <= high`, rounded as stored, in float32."""
    if format.zero_point == "none":
        if format.restricted:
            scale = _round_scale(torch.maximum(-low, high) / (format.center - 1))
            return scale, torch.full_like(scale, format.center)
        longest = torch.where(-low >= high, low, high)
        scale = _round_scale(longest / -format.center)
        return scale, torch.full_like(scale, format.center)
    scale = _round_scale((high - low) / ((1 << format.bits) - 1))
    return scale, _round_zero_point(-low / scale, format)


def _round_scale(scale: Tensor) -> Tensor:
    """Round to nonzero float16 values, in float32; 0, the scale of a group of zeros, becomes 1."""
    stored = scale.to(torch.float16).float()
    smallest = torch.copysign(torch.full_like(scale, SMALLEST_SCALE), scale)
    return torch.where(scale == 0, 1.0, torch.where(stored == 0, smallest, stored))


def _round_zero_point(zero_point: Tensor, format: Affine) -> Tensor:
    """Round to the zero points that `format` can store, in float32."""
    if format.zero_point == "integer":
        return zero_point.round().clamp_(0, (1 << format.bits) - 1)
    return zero_point.to(torch.float16).float()


def _tables(scale: Tensor, zero_point: Tensor, format: Affine) -> dict[str, Tensor]:
    """Tables of `format` in their stored dtype."""
    tables = {"weight_scale": scale.to(torch.float16)}
    if format.zero_point == "integer":
        tables["weight_zero_point"] = zero_point.to(torch.uint8)
    elif format.zero_point == "float":
        tables["weight_zero_point"] = zero_point.to(torch.float16)
    return tables
