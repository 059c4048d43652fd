"""Scales of small floats that cover the range of their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.core.formats import fp8, nvfp4

_SMALLEST_ROW = 2.0**-120  # of a scale, for rows of zeros
_SMALLEST_BLOCK = 2.0**-9  # the smallest positive E4M3


def row_scales(weight: Tensor) -> dict[str, Tensor]:
    """Tables of `fp8` for a weight `[out, in]`: the largest magnitude of a row becomes the largest E4M3."""
    largest = weight.float().abs().amax(1, keepdim=True)
    return {fp8.SCALE: (largest / fp8.LARGEST).clamp(min=_SMALLEST_ROW).bfloat16()}


def block_scales(weight: Tensor) -> dict[str, Tensor]:
    """Tables of `nvfp4` for a weight `[out, in]`: the largest magnitude of a block becomes the largest level.

    The divisor is the largest power of two with which no scale exceeds the largest E4M3.
    """
    top = nvfp4.LEVELS[-1]
    largest = weight.float().unflatten(1, (-1, nvfp4.BLOCK)).abs().amax(2) / top
    whole = largest.max()
    exponent = torch.where(whole > 0, (fp8.LARGEST / whole).log2().floor(), 0.0).clamp(-100, 100)
    exponent = torch.where(whole * exponent.exp2() > fp8.LARGEST, exponent - 1, exponent)  # a logarithm is rounded
    divisor = exponent.exp2().view(1)
    scale = (largest * divisor).clamp(_SMALLEST_BLOCK, fp8.LARGEST).to(torch.float8_e4m3fn)
    return {nvfp4.SCALE: scale.view(torch.uint8), nvfp4.DIVISOR: divisor}
