"""Rounding to the levels of small codebooks and back in one pass over the weight, and its gradients in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ENTRIES = 16
WIDEST = 8192  # weights of a group: a program holds all of them
_TILE = 2048  # weights that a program holds, unless a group has more


@torch.library.custom_op("qcli::fake_look_up", mutates_args=())
def forward(latents: Tensor, units: Tensor, tables: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """The levels nearest to `units * latents`, to the last bit as the formats encode and decode.

    Args:
        latents, units: float32 `[..., group]`.
        tables: float32 `[..., n]`; with the rule `table` ascending levels, with `fdb` and `symmetric` the two alphas
            of `formats.dual_binary`.
    """
    flat, value = latents.contiguous(), torch.empty(latents.shape, dtype=dtype, device=latents.device)
    rows, grid, sizes = _cut(flat)
    with torch.cuda.device_of(flat):
        look_up_rows[grid](
            flat,
            units.contiguous(),
            tables.contiguous(),
            value,
            rows,
            flat.shape[-1],
            RULE=rule,
            ENTRIES=tables.shape[-1],
            **sizes,
        )
    return value


@torch.library.custom_op("qcli::fake_look_up_backward", mutates_args=())
def backward(gradient: Tensor, latents: Tensor, units: Tensor, tables: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Gradients by latents, 0 where one is more than its unit from its level, and by tables at fixed codes; float32 in
    their shapes."""
    flat, by_tables = latents.contiguous(), torch.empty(tables.shape, device=tables.device)
    by_latents = torch.empty_like(flat)
    rows, grid, sizes = _cut(flat)
    with torch.cuda.device_of(flat):
        gradients_of_look_up[grid](
            gradient.contiguous(),
            flat,
            units.contiguous(),
            tables.contiguous(),
            by_latents,
            by_tables,
            rows,
            flat.shape[-1],
            RULE=rule,
            ENTRIES=tables.shape[-1],
            **sizes,
        )
    return by_latents, by_tables


def _cut(latents: Tensor) -> tuple[int, tuple[int], dict[str, int | bool]]:
    """Rows, programs, and the tile of a program. Products and sums are not fused: codes must be those of `encode`."""
    rows, width = latents.numel() // latents.shape[-1], triton.next_power_of_2(latents.shape[-1])
    tile, warps = max(1, _TILE // width), 4 if width <= _TILE else 8
    return (
        rows,
        (triton.cdiv(rows, tile),),
        {"ROWS": tile, "WIDTH": width, "num_warps": warps} | {"enable_fp_fusion": False},
    )


@triton.jit
def _nearest(values, tables_ptr, row, inside, RULE: tl.constexpr, ENTRIES: tl.constexpr):
    """The level of each value, and what names it: its code, or the factors of the alphas."""
    tables = tables_ptr + row[:, None].to(tl.int64) * ENTRIES
    inside = inside[:, None]
    lower = tl.load(tables, mask=inside, other=0.0)
    if RULE == "table":
        level = values * 0 + lower
        code = (values * 0).to(tl.int32)
        for entry in range(1, ENTRIES):
            higher = tl.load(tables + entry, mask=inside, other=0.0)
            above = values > (higher + lower) / 2
            level = tl.where(above, higher, level)
            code = tl.where(above, entry, code)
            lower = higher
        first = code
        second = code
    else:
        alpha1 = lower
        alpha2 = tl.load(tables + 1, mask=inside, other=0.0)
        if RULE == "fdb":
            first = (values >= (alpha1 + alpha2) / 2).to(tl.float32)
            second = (values - alpha1 * first <= alpha2 / 2).to(tl.float32)
        else:
            first = 2 * (values >= 0).to(tl.float32) - 1
            second = 2 * (values - alpha1 * first >= 0).to(tl.float32) - 1
        level = first * alpha1 + second * alpha2
    return level, first, second


@triton.jit
def look_up_rows(
    latents_ptr,
    units_ptr,
    tables_ptr,
    value_ptr,
    rows,
    width,
    RULE: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, inside = tl.arange(0, WIDTH)[None, :], row < rows
    mask = inside[:, None] & (column < width)
    place = row[:, None].to(tl.int64) * width + column
    values = tl.load(units_ptr + place, mask=mask, other=0.0) * tl.load(latents_ptr + place, mask=mask, other=0.0)
    level, _, _ = _nearest(values, tables_ptr, row, inside, RULE, ENTRIES)
    tl.store(value_ptr + place, level.to(value_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradients_of_look_up(
    gradient_ptr,
    latents_ptr,
    units_ptr,
    tables_ptr,
    by_latents_ptr,
    by_tables_ptr,
    rows,
    width,
    RULE: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, inside = tl.arange(0, WIDTH)[None, :], row < rows
    mask = inside[:, None] & (column < width)
    place = row[:, None].to(tl.int64) * width + column
    units = tl.load(units_ptr + place, mask=mask, other=0.0)
    values = units * tl.load(latents_ptr + place, mask=mask, other=0.0)
    gradient = tl.load(gradient_ptr + place, mask=mask, other=0.0).to(tl.float32)
    level, first, second = _nearest(values, tables_ptr, row, inside, RULE, ENTRIES)
    near = tl.abs(values - level) <= units
    tl.store(by_latents_ptr + place, tl.where(near, gradient, 0.0) * units, mask=mask)
    sums = by_tables_ptr + row.to(tl.int64) * ENTRIES
    if RULE == "table":
        for entry in range(ENTRIES):
            tl.store(sums + entry, tl.sum(tl.where(first == entry, gradient, 0.0), axis=1), mask=inside)
    else:
        tl.store(sums, tl.sum(gradient * first, axis=1), mask=inside)
        tl.store(sums + 1, tl.sum(gradient * second, axis=1), mask=inside)
