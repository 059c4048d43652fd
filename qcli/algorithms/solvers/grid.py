"""Scales and zero points of uniform grids: by the range of a group, or by search.

Everything here works on groups `[rows, groups, group_size]` and returns the tables of `formats/affine.py`,
rounded to their stored dtype, so that codes chosen afterwards see the grid that will be read back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.core.formats._tables import SMALLEST_SCALE
from qcli.core.formats.affine import Affine

SMALLEST_NORMAL_SCALE = 2.0**-14  # of float16
_CPU_TILE, _GPU_TILE = 1 << 19, 1 << 25  # weights at a time: a core's cache; enough to fill a GPU
_CLIPS = tuple(1.0 - 0.05 * step for step in range(1, 13))  # ours: down to 0.4 of the range, which 2 bits use
_LEANING = tuple(  # ours: one side clipped more than the other, by up to 0.2 of the range
    (low / 10, high / 10) for low in range(4, 11) for high in range(4, 11) if 0 < abs(low - high) <= 2
)
_ROUNDS = 3  # ours: least-squares rounds after the clip search; a fourth no longer changes codes


def minmax(weight: Tensor, format: Affine) -> dict[str, Tensor]:
    """The grid that spans each group's range and 0 exactly.

    Asymmetric: `scale = (max - min) / (2**b - 1)`. Symmetric: the side with the larger magnitude lands on the
    lowest code `-2**(b-1)`, so the scale may be negative and the full range is used.

    Args:
        weight: float32 `[out, in]`.

    Returns:
        Tables of `format` for the whole weight.
    """
    return _tables(*_spanning(*_range(format.grouped(weight)), format), format)


def round_to_minmax(weight: Tensor, format: Affine) -> tuple[Tensor, dict[str, Tensor]]:
    """`minmax` and the nearest codes in one pass over cache-sized tiles.

    Args:
        weight: `[out, in]`, any floating dtype.

    Returns:
        uint8 codes `[out, in]` and the tables.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    signed = codes.view(torch.int8) if format.bits < 8 else codes  # float to int8 is vectorised, to uint8 is not
    rows, parts = min(_tile_rows(weight), len(weight)), []
    tile = torch.empty(rows, weight.shape[1], device=weight.device)
    steps = torch.empty_like(format.grouped(tile))
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        groups = format.grouped(tile[: len(part)].copy_(part) if part.dtype != torch.float32 else part)
        scale, zero_point = _spanning(*_range(groups), format)
        stepped = torch.div(groups, scale[..., None], out=steps[: len(part)])
        stepped.add_(zero_point[..., None]).round_().clamp_(0, (1 << format.bits) - 1)
        signed[start : start + rows] = stepped.view(len(part), -1)[:, : weight.shape[1]]
        parts.append(_tables(scale, zero_point, format))
    return codes, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def search(weight: Tensor, format: Affine, importance: Tensor | None = None, power: float = 2.0) -> dict[str, Tensor]:
    """The grid with the least `sum importance * |w - w_hat|**power` in each group.

    Candidates are clipped ranges: with integer zero points at 2 and 3 bits each with the neighbouring ones too, with
    float zero points also ranges clipped more on one side; then, for `power` 2, rounds of weighted least squares for
    scale and offset at fixed codes, kept where they help. A group is never worse than with `minmax`.

    Args:
        weight: float32 `[out, in]`.
        importance: float32 `[in]`, such as `diag(H)`; None: all ones.
        power: 2 with a Hessian's diagonal; 2.4 is what GPTQ implementations use without data.
    """
    rows, spread = _tile_rows(weight), _grouped_importance(weight, importance, format)
    parts = [
        _search_rows(format.grouped(weight[start : start + rows]), spread, format, power)
        for start in range(0, len(weight), rows)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _tile_rows(weight: Tensor) -> int:
    return max(1, (_CPU_TILE if weight.device.type == "cpu" else _GPU_TILE) // weight.shape[1])


def _grouped_importance(weight: Tensor, importance: Tensor | None, format: Affine) -> Tensor:
    """`[1, groups, group_size]`, zero in the padding of a ragged group."""
    ones = weight.new_ones(weight.shape[1]) if importance is None else importance
    return format.grouped(ones[None])


def _search_rows(groups: Tensor, importance: Tensor, format: Affine, power: float) -> dict[str, Tensor]:
    low, high = _range(groups)
    best = _Best(groups, importance, format, power)
    best.offer(*_spanning(low, high, format))
    for clip in _CLIPS:
        scale, zero_point = _spanning(low * clip, high * clip, format)
        best.offer(scale, zero_point)
        if format.zero_point == "integer" and format.bits <= 3:
            for step in (-1, 1):
                best.offer(scale, (zero_point + step).clamp_(0, (1 << format.bits) - 1))
    if format.zero_point == "float":
        for low_clip, high_clip in _LEANING:
            best.offer(*_spanning(low * low_clip, high * high_clip, format))
    if power == 2.0:
        for _ in range(_ROUNDS):
            best.offer(*_least_squares(groups, best.codes(), importance, best, format))
    return _tables(best.scale, best.zero_point, format)


class _Best:
    """The best grid of each group among those offered; scale and zero point `[rows, groups]`, float32."""

    def __init__(self, groups: Tensor, importance: Tensor, format: Affine, power: float) -> None:
        self.groups, self.importance, self.format, self.power = groups, importance, format, power
        self.error = groups.new_full(groups.shape[:2], torch.inf)
        self.scale = groups.new_ones(groups.shape[:2])
        self.zero_point = groups.new_zeros(groups.shape[:2])

    def codes(self) -> Tensor:
        """Codes `[rows, groups, group_size]` of the best grid, as floats."""
        return self._codes(self.scale, self.zero_point)

    def offer(self, scale: Tensor, zero_point: Tensor) -> None:
        error = (self._codes(scale, zero_point) - zero_point[..., None]).mul_(scale[..., None]).sub_(self.groups)
        error = error.square_() if self.power == 2.0 else error.abs_().pow_(self.power)
        total = error.mul_(self.importance).sum(-1)
        better = total < self.error
        self.error = torch.where(better, total, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)

    def _codes(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = (self.groups / scale[..., None]).add_(zero_point[..., None])
        return codes.round_().clamp_(0, (1 << self.format.bits) - 1)


def _least_squares(
    groups: Tensor, codes: Tensor, importance: Tensor, current: _Best, format: Affine
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that minimise the weighted error of each group at fixed codes."""

    def mean(values: Tensor) -> Tensor:
        return (values * importance).sum(-1) / importance.sum(-1).clamp_(min=1e-30)

    if format.zero_point == "none":
        centred = codes - format.center
    else:
        code_mean, weight_mean = mean(codes), mean(groups)
        centred = codes - code_mean[..., None]
    variance = mean(centred.square())
    scale = mean(centred * groups) / variance.clamp(min=1e-30)
    usable = (variance > 1e-12) & (scale.abs() > 1e-12)
    scale = rounded_scale(torch.where(usable, scale, current.scale))
    if format.zero_point == "none":
        return scale, current.zero_point
    zero_point = rounded_zero_point(code_mean - weight_mean / scale, format)
    if format.zero_point == "integer":
        centred = codes - zero_point[..., None]
        refit = mean(centred * groups) / mean(centred.square()).clamp(min=1e-30)
        scale = rounded_scale(torch.where(usable & (refit.abs() > 1e-12), refit, scale))
    return scale, torch.where(usable, zero_point, current.zero_point)


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight of each group, or 0 where that lies outside."""
    return groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)


def _spanning(low: Tensor, high: Tensor, format: Affine) -> tuple[Tensor, Tensor]:
    """Scale and zero point (float32, on the stored grids) of the range `low <= 0 <= high`."""
    if format.zero_point == "none":
        longest = torch.where(-low >= high, low, high)
        scale = rounded_scale(longest / -format.center)
        return scale, torch.full_like(scale, format.center)
    scale = rounded_scale((high - low) / ((1 << format.bits) - 1))
    return scale, rounded_zero_point(-low / scale, format)


def rounded_scale(scale: Tensor) -> Tensor:
    """The nearest float16 scales other than 0, as float32; 1 for groups of zeros, whose codes all stand for 0."""
    stored = scale.to(torch.float16).float()
    smallest = torch.copysign(torch.full_like(scale, SMALLEST_SCALE), scale)
    return torch.where(scale == 0, 1.0, torch.where(stored == 0, smallest, stored))


def rounded_zero_point(zero_point: Tensor, format: Affine) -> Tensor:
    """The nearest zero points that `format` can store, as float32."""
    if format.zero_point == "integer":
        return zero_point.round().clamp_(0, (1 << format.bits) - 1)
    return zero_point.to(torch.float16).float()


def _tables(scale: Tensor, zero_point: Tensor, format: Affine) -> dict[str, Tensor]:
    tables = {"weight_scale": scale.to(torch.float16)}
    if format.zero_point == "integer":
        tables["weight_zero_point"] = zero_point.to(torch.uint8)
    elif format.zero_point == "float":
        tables["weight_zero_point"] = zero_point.to(torch.float16)
    return tables
