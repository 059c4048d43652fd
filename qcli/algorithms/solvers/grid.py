"""Scales and zero points of uniform grids: from each group's range, by search, or by least squares at fixed codes.

Tables are those of `core/formats/affine.py`, rounded to their stored dtype before any code is chosen, so that codes are
nearest on the grid that will be read back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.algorithms.solvers.least_squares import fit_factors
from qcli.algorithms.solvers.tiles import row_tiles, tile_size
from qcli.core.formats._tables import SMALLEST_SCALE
from qcli.core.formats.affine import Affine

_CLIPS = tuple((1 - step / 20,) * 2 for step in range(13))  # ours: down to 0.4 of the range, which 2 bits need
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
    return _tables(*_covering(*_range(format.grouped(weight), -1), format), format)


def round_to_minmax(weight: Tensor, format: Affine) -> tuple[Tensor, dict[str, Tensor]]:
    """`minmax` and the nearest codes, in one pass over cache-sized tiles.

    Args:
        weight: `[out, in]`, any floating dtype.

    Returns:
        Codes uint8 `[out, in]`, and tables of `format`.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    signed = codes.view(torch.int8) if format.bits < 8 else codes  # torch vectorizes float to int8, not to uint8
    tiles, parts = [*row_tiles(weight)], []
    tile = torch.empty(tiles[0].stop, weight.shape[1], device=weight.device)
    steps = torch.empty_like(format.grouped(tile))
    for rows in tiles:
        part = weight[rows]
        groups = format.grouped(tile[: len(part)].copy_(part) if part.dtype != torch.float32 else part)
        scale, zero_point = _covering(*_range(groups, -1), format)
        stepped = torch.div(groups, scale[..., None], out=steps[: len(part)])
        stepped.add_(zero_point[..., None]).round_().clamp_(format.lowest, format.highest)
        signed[rows] = stepped.view(len(part), -1)[:, : weight.shape[1]]
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
    weights = format.grouped((weight.new_ones(weight.shape[1]) if importance is None else importance)[None])
    parts = [
        _search_rows(format.grouped(weight[rows]), weights[0][:, None], format, power) for rows in row_tiles(weight)
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


def _search_rows(rows: Tensor, importance: Tensor, format: Affine, power: float) -> dict[str, Tensor]:
    """Search the grids of `rows` `[rows, groups, n]`; `importance` `[groups, 1, n]` is 0 in the padding."""
    groups = rows.permute(1, 2, 0).contiguous()  # rows last: operations on a group's table then vectorize
    best = _BestGrid(groups, importance, format, power)
    best.consider(*_candidates(*_range(groups, 1), format))
    if power == 2.0:
        moments = _Moments(groups, importance)
        for _ in range(_ROUNDS):
            best.consider(*(table[None] for table in moments.fit(best)))
    return _tables(best.scale.T, best.zero_point.T, format)


def _candidates(low: Tensor, high: Tensor, format: Affine) -> tuple[Tensor, Tensor]:
    """Scales and zero points of clipped ranges: `[groups, rows]` -> `[candidates, groups, rows]` each."""
    clips = (*_CLIPS, *_UNEVEN_CLIPS) if format.zero_point == "float" else _CLIPS
    lows, highs = torch.tensor(clips, device=low.device).T[..., None, None]
    scale, zero_point = _covering(low * lows, high * highs, format)
    if format.zero_point == "integer" and format.bits <= 3:
        shifted = torch.stack([zero_point, zero_point - 1, zero_point + 1]).clamp_(0, format.highest)
        return scale.repeat(3, 1, 1), shifted.flatten(0, 1)
    return scale, zero_point


class _BestGrid:
    """The best grid of each group among those considered.

    Args:
        groups: `[groups, n, rows]`.
        importance: `[groups, 1, n]`.

    Attributes:
        scale, zero_point: float32 `[groups, rows]`.
    """

    def __init__(self, groups: Tensor, importance: Tensor, format: Affine, power: float) -> None:
        self.groups, self.importance, self.format, self.power = groups, importance, format, power
        self.error = groups.new_full((len(groups), groups.shape[2]), torch.inf)
        self.scale, self.zero_point = torch.ones_like(self.error), torch.zeros_like(self.error)

    def consider(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take the best of these grids, `[candidates, groups, rows]`, in the groups where its error is smaller."""
        together = max(1, tile_size(self.groups) // self.groups.numel())
        parts = zip(scale.split(together), zero_point.split(together), strict=True)
        total = torch.cat([self._total(*part) for part in parts]).mul_(scale.abs().pow_(self.power))
        error, index = total.min(0, keepdim=True)
        better = error[0] < self.error
        self.error = torch.where(better, error[0], self.error)
        self.scale = torch.where(better, scale.gather(0, index)[0], self.scale)
        self.zero_point = torch.where(better, zero_point.gather(0, index)[0], self.zero_point)

    def _total(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Error of each group in units of its scale, `[candidates, groups, rows]`."""
        steps = self._steps(scale, zero_point)
        difference = self._rounded(steps).sub_(steps)
        difference = difference.square_() if self.power == 2.0 else difference.abs_().pow_(self.power)
        return (self.importance @ difference).squeeze(2)

    def codes(self) -> Tensor:
        """Codes on the best grid, as floats `[groups, n, rows]`."""
        return self._rounded(self._steps(self.scale[None], self.zero_point[None])[0])

    def _steps(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes before rounding, `[candidates, groups, n, rows]`."""
        return torch.addcmul(zero_point[:, :, None], self.groups, scale.reciprocal()[:, :, None])

    def _rounded(self, steps: Tensor) -> Tensor:
        return steps.round().clamp_(self.format.lowest, self.format.highest)


class _Moments:
    """Weighted moments of the weights of each group; of weights and codes, for scale and zero point at fixed codes.

    Args:
        groups: `[groups, n, rows]`.
        importance: `[groups, 1, n]`.
    """

    def __init__(self, groups: Tensor, importance: Tensor) -> None:
        self.share = importance / importance.sum(-1, keepdim=True).clamp_(min=1e-30)
        self.mean = self._mean(groups)
        self.centered = groups - self.mean[:, None]

    def fit(self, current: _BestGrid) -> tuple[Tensor, Tensor]:
        """Scale and zero point with the least weighted squared error of each group, for the codes of its best grid."""
        codes, format = current.codes(), current.format
        mean = self._mean(codes)
        product, square = self._mean(codes * self.centered), self._mean(codes.square_())
        variance = square - mean.square()
        usable = variance > 1e-6 * square  # below, rounding errors of the subtraction

        def slope(origin: Tensor | float) -> Tensor:
            """The best scale for codes that count from `origin`."""
            from_origin = mean - origin
            covariance = torch.addcmul(product, self.mean, from_origin)
            return covariance / torch.addcmul(variance, from_origin, from_origin).clamp_(min=1e-30)

        if format.zero_point == "none":
            return _round_scale(torch.where(usable, slope(format.center), current.scale)), current.zero_point
        scale = product / variance.clamp(min=1e-30)
        usable &= scale.abs() > 1e-12
        scale = _round_scale(torch.where(usable, scale, current.scale))
        zero_point = _round_zero_point(mean - self.mean / scale, format)
        if format.zero_point == "integer":  # the zero point was rounded: fit the scale once more
            scale = _round_scale(torch.where(usable, slope(zero_point), scale))
        return scale, torch.where(usable, zero_point, current.zero_point)

    def _mean(self, values: Tensor) -> Tensor:
        """`[groups, n, rows]` -> `[groups, rows]`."""
        return (self.share @ values).squeeze(1)


def _range(groups: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, whose weights are along `dim`, and 0."""
    return groups.amin(dim).clamp_(max=0), groups.amax(dim).clamp_(min=0)


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
    stored = torch.copysign(scale.abs().clamp_(min=SMALLEST_SCALE).half().float(), scale)
    return stored.masked_fill_(scale == 0, 1.0)


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
