"""Rounding to a uniform grid and back in one pass over the weight, and its gradients in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # weights that a program holds at a time
_WIDEST = 1024  # of them in a row
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float32 that is added to it loses its fraction, half to even


@torch.library.custom_op("qcli::fake_quantize", mutates_args=())
def forward(
    latents: Tensor, scale: Tensor, zero_point: Tensor | None, center: float, codes: list[int], dtype: torch.dtype
) -> Tensor:
    """`scale * (clamp(round(latents)) - zero_point)`, to the last bit as torch computes it.

    Args:
        latents: `[..., group]`, float32, or the codes themselves, uint8.
        scale: float32 `[..., 1]`.
        zero_point: likewise; None: `center` for all.
        codes: the lowest and the highest.
    """
    flat, value = latents.contiguous(), torch.empty(latents.shape, dtype=dtype, device=latents.device)
    rows, grid, sizes = _cut(flat)
    with torch.cuda.device_of(flat):
        quantize_rows[grid](
            flat,
            scale.contiguous(),
            scale if zero_point is None else zero_point.contiguous(),
            value,
            rows,
            flat.shape[-1],
            center,
            LOWEST=codes[0],
            HIGHEST=codes[1],
            LATENTS=latents.is_floating_point(),
            ZERO=zero_point is not None,
            **sizes,
        )
    return value


@torch.library.custom_op("qcli::fake_quantize_backward", mutates_args=())
def backward(
    gradient: Tensor,
    latents: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    center: float,
    codes: list[int],
    of_zero_point: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by latents, scale and zero point, float32 in their shapes; empty by codes, and by zero points if not
    `of_zero_point`. Sums are added in another order than torch's."""
    flat = latents.contiguous()
    by_latents = torch.empty_like(flat) if latents.is_floating_point() else scale.new_empty(0)
    by_scale = torch.empty(scale.shape, device=scale.device)
    by_zero_point = torch.empty_like(by_scale) if of_zero_point else scale.new_empty(0)
    rows, grid, sizes = _cut(flat)
    with torch.cuda.device_of(flat):
        gradients_of_rows[grid](
            gradient.contiguous(),
            flat,
            scale.contiguous(),
            scale if zero_point is None else zero_point.contiguous(),
            by_latents,
            by_scale,
            by_zero_point,
            rows,
            flat.shape[-1],
            center,
            LOWEST=codes[0],
            HIGHEST=codes[1],
            LATENTS=latents.is_floating_point(),
            ZERO=zero_point is not None,
            OF_ZERO=of_zero_point,
            **sizes,
        )
    return by_latents, by_scale, by_zero_point


def _cut(latents: Tensor) -> tuple[int, tuple[int], dict[str, int | bool]]:
    """Rows, programs, and the tile of a program."""
    rows, width = latents.numel() // latents.shape[-1], min(_WIDEST, triton.next_power_of_2(latents.shape[-1]))
    tile = max(1, _TILE // width)
    return rows, (triton.cdiv(rows, tile),), {"ROWS": tile, "WIDTH": width, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _steps(latents, zero, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, LATENTS: tl.constexpr):
    """Codes, less their zero point."""
    codes = latents.to(tl.float32)
    if LATENTS:
        codes = tl.clamp(codes, 1.0 * LOWEST, 1.0 * HIGHEST, propagate_nan=tl.PropagateNan.ALL)
        codes = (codes + _TO_INTEGER) - _TO_INTEGER
    return codes - zero


@triton.jit
def quantize_rows(
    latents_ptr,
    scale_ptr,
    zero_ptr,
    value_ptr,
    rows,
    width,
    center,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    LATENTS: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    scale = tl.load(scale_ptr + row, mask=inside, other=0.0)[:, None]
    zero = tl.load(zero_ptr + row, mask=inside, other=0.0)[:, None] if ZERO else center
    for start in range(0, width, WIDTH):
        column = (start + tl.arange(0, WIDTH))[None, :]
        mask = inside[:, None] & (column < width)
        place = row[:, None].to(tl.int64) * width + column
        steps = _steps(tl.load(latents_ptr + place, mask=mask, other=0), zero, LOWEST, HIGHEST, LATENTS)
        tl.store(value_ptr + place, (steps * scale).to(value_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradients_of_rows(
    gradient_ptr,
    latents_ptr,
    scale_ptr,
    zero_ptr,
    by_latents_ptr,
    by_scale_ptr,
    by_zero_ptr,
    rows,
    width,
    center,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    LATENTS: tl.constexpr,
    ZERO: tl.constexpr,
    OF_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
    zero = tl.load(zero_ptr + row, mask=inside, other=0.0)[:, None] if ZERO else center
    by_scale = tl.zeros([ROWS, WIDTH], tl.float32)
    by_zero = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        column = (start + tl.arange(0, WIDTH))[None, :]
        mask = inside[:, None] & (column < width)
        place = row[:, None].to(tl.int64) * width + column
        gradient = tl.load(gradient_ptr + place, mask=mask, other=0).to(tl.float32)
        latents = tl.load(latents_ptr + place, mask=mask, other=0)
        by_scale += tl.where(mask, gradient * _steps(latents, zero, LOWEST, HIGHEST, LATENTS), 0.0)
        if OF_ZERO:
            by_zero += gradient
        if LATENTS:
            within = (latents > LOWEST - 1) & (latents < HIGHEST + 1)
            tl.store(by_latents_ptr + place, tl.where(within, gradient * scale[:, None], 0.0), mask=mask)
    tl.store(by_scale_ptr + row, tl.sum(by_scale, axis=1), mask=inside)
    if OF_ZERO:
        tl.store(by_zero_ptr + row, -scale * tl.sum(by_zero, axis=1), mask=inside)
