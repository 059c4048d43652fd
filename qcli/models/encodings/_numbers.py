"""Small numbers and their scales, as several encodings have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcli.core import packing

if TYPE_CHECKING:
    from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_TILE = 512  # rows whose scales are spread out at a time


def unpack_fp4(packed: Tensor) -> Tensor:
    """Two four-bit floats a byte, the lower half first: bytes `[..., n]` -> float32 `[..., 2 n]`."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    packed = packed.view(torch.uint8)
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return table[both.int()]


def unpack_down(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of a bit stream down each column: int32 `[ceil(count * bits / 32), n]` -> uint8 `[n, count]`."""
    return packing.unpack_bits(words.T.contiguous(), bits, count)


def exponents(scales: Tensor) -> Tensor:
    """Scales in float32; those in bytes are exponents of two, 127 for one."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - _BIAS)
    return scales.float()


def in_groups(columns: int, size: int) -> Tensor:
    """The group of each of `columns` inputs, int64, in groups of `size`."""
    return torch.arange(columns) // size


def dequantize(
    values: Tensor, scales: Tensor, groups: Tensor, zeros: Tensor | None = None, *, height: int = 1
) -> Tensor:
    """`(value - zero) * scale`, in place.

    Args:
        values: float32 `[rows, columns]`.
        scales: `[ceil(rows / height), groups]`.
        groups: int64 `[columns]`, the group of each.
        zeros: as `scales`; None: zero.
        height: rows that share scales.
    """
    scales = exponents(scales)
    for start in range(0, len(values), _TILE):
        tile = values[start : start + _TILE]
        rows = torch.arange(start, start + len(tile)) // height
        if zeros is not None:
            tile -= zeros.float()[rows][:, groups]
        tile *= scales[rows][:, groups]
    return values
