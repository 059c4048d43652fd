"""Rounding to signs with a scale for each row and column, and its gradients, in one pass over the weight each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _WIDTH = 16, 256  # that a program holds at a time


@torch.library.custom_op("qcli::fake_sign", mutates_args=())
def forward(latents: Tensor, units: Tensor, in_scale: Tensor, out_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values nearest to `units * latents`, to the last bit as `formats.sign` encodes and decodes.

    Args:
        latents, units: float32 `[out, in]`.
        in_scale, out_scale: float32 `[in]`, `[out, 1]`.
    """
    flat, value = latents.contiguous(), torch.empty(latents.shape, dtype=dtype, device=latents.device)
    rows, width = flat.shape
    with torch.cuda.device_of(flat):
        sign_rows[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _WIDTH))](
            flat,
            units.contiguous(),
            in_scale.contiguous(),
            out_scale.contiguous(),
            value,
            rows,
            width,
            ROWS=_ROWS,
            WIDTH=_WIDTH,
            enable_fp_fusion=False,  # codes are those of `encode`
        )
    return value


@torch.library.custom_op("qcli::fake_sign_backward", mutates_args=())
def backward(
    gradient: Tensor, latents: Tensor, units: Tensor, in_scale: Tensor, out_scale: Tensor, smooth: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by latents, float32 `[out, in]`; by the input scales, `[parts, in]`, to be summed up; and by the
    output scales, `[out, 1]`.

    Args:
        smooth: latents have the slope of OneBit's authors, not 1 within a unit of their value.
    """
    flat = latents.contiguous()
    rows, width = flat.shape
    parts = triton.cdiv(rows, _ROWS)
    by_latents = torch.empty_like(flat)
    by_in, by_out = in_scale.new_empty(parts, width), torch.empty_like(out_scale)
    with torch.cuda.device_of(flat):
        gradients_of_signs[(parts,)](
            gradient.contiguous(),
            flat,
            units.contiguous(),
            in_scale.contiguous(),
            out_scale.contiguous(),
            by_latents,
            by_in,
            by_out,
            rows,
            width,
            SMOOTH=smooth,
            ROWS=_ROWS,
            WIDTH=_WIDTH,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return by_latents, by_in, by_out


@triton.jit
def _sign(value):
    return (value > 0).to(tl.float32) - (value < 0).to(tl.float32)


@triton.jit
def _code(values, in_scale, out_scale):
    """1 or -1: the sign of the code of each value."""
    return 2 * (values * (_sign(in_scale)[None, :] * _sign(out_scale)[:, None]) >= 0).to(tl.float32) - 1


@triton.jit
def sign_rows(latents_ptr, units_ptr, in_ptr, out_ptr, value_ptr, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None].to(tl.int64) * width + column[None, :]
    in_scale = tl.load(in_ptr + column, mask=column < width, other=0.0)
    out_scale = tl.load(out_ptr + row, mask=row < rows, other=0.0)
    values = tl.load(units_ptr + place, mask=mask, other=0.0) * tl.load(latents_ptr + place, mask=mask, other=0.0)
    value = _code(values, in_scale, out_scale) * in_scale[None, :] * out_scale[:, None]
    tl.store(value_ptr + place, value.to(value_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradients_of_signs(
    gradient_ptr,
    latents_ptr,
    units_ptr,
    in_ptr,
    out_ptr,
    by_latents_ptr,
    by_in_ptr,
    by_out_ptr,
    rows,
    width,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out_scale = tl.load(out_ptr + row, mask=row < rows, other=0.0)
    by_out = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        in_scale = tl.load(in_ptr + column, mask=column < width, other=0.0)
        units = tl.load(units_ptr + place, mask=mask, other=0.0)
        values = units * tl.load(latents_ptr + place, mask=mask, other=0.0)
        gradient = tl.load(gradient_ptr + place, mask=mask, other=0.0).to(tl.float32)
        signs = _code(values, in_scale, out_scale)
        half = signs * in_scale[None, :]
        if SMOOTH:
            decay = tl.exp(-2 * tl.abs(2 * values / tl.maximum(units, 1e-30)))
            tanh = (1 - decay) / (1 + decay)
            slope = 1.001 - tanh * tanh
        else:
            slope = (tl.abs(values - half * out_scale[:, None]) <= units).to(tl.float32)
        tl.store(by_latents_ptr + place, gradient * slope * units, mask=mask)
        by_in = tl.sum(gradient * out_scale[:, None] * signs, axis=0)
        tl.store(by_in_ptr + tl.program_id(0).to(tl.int64) * width + column, by_in, mask=column < width)
        by_out += gradient * half
    tl.store(by_out_ptr + row, tl.sum(by_out, axis=1), mask=row < rows)
