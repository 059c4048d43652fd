"""Rounding to the levels of small codebooks and back with closed-form gradients, by torch: some weights at a time, so
that what is made on the way stays in a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qcli.core.by_code import sums_by_code

MOST_ENTRIES = 16  # above, torch's binary search is faster than counting boundaries
_TILE = {"cpu": 1 << 17, "cuda": 1 << 25}  # weights at a time


def fake_look_up_in_tiles(latents: Tensor, units: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """The levels nearest to `units * latents`, straight through the rounding, as `Format.fake_quantize` defines it.

    Args:
        latents, units: float32 `[out, groups, group]`.
        levels: float32 `[out, groups, n]`, ascending.
        dtype: of the result; arithmetic is float32.

    Returns:
        `[out, groups, group]`, differentiable in latents and levels.
    """
    output: Tensor = _LookUpInTiles.apply(latents, units, levels, dtype)  # type: ignore[no-untyped-call]
    return output


def boundaries(levels: Tensor) -> Tensor:
    """Midway between ascending levels: `[..., n]` -> `[..., n - 1]`."""
    return ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()


def count_boundaries(values: Tensor, between: Tensor) -> Tensor:
    """How many of the boundaries `[..., n]` are below each of the values `[..., group]`: uint8 `[..., group]`."""
    first, *others = (boundary[..., None] for boundary in between.unbind(-1))
    count = (values > first).view(torch.uint8)
    for boundary in others:
        count += (values > boundary).view(torch.uint8)  # a bool would be converted first, in ten times the time
    return count


class _LookUpInTiles(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, latents: Tensor, units: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
        value, between = torch.empty_like(latents, dtype=dtype), boundaries(levels)
        codes, near = (torch.empty_like(latents, dtype=kind) for kind in (torch.uint8, torch.bool))
        for rows in _tiles(latents):
            latent = units[rows] * latents[rows]
            codes[rows] = own = count_boundaries(latent, between[rows])
            value[rows] = level = levels[rows].gather(-1, own.long())
            torch.le(latent.sub_(level).abs_(), units[rows], out=near[rows])
        context.save_for_backward(units, codes, near)
        context.entries = levels.shape[-1]
        return value

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        units, codes, near = context.saved_tensors
        by_latents, by_levels = torch.empty_like(units), units.new_empty(*units.shape[:-1], context.entries)
        for rows in _tiles(units):
            gradient = gradients[0][rows].float()
            by_levels[rows] = sums_by_code(gradient, codes[rows], context.entries)
            torch.mul(gradient.mul(near[rows]), units[rows], out=by_latents[rows])
        return by_latents, None, by_levels, None


def _tiles(values: Tensor) -> Iterator[slice]:
    step = max(1, _TILE[values.device.type] // values[0].numel())
    return (slice(start, start + step) for start in range(0, len(values), step))
