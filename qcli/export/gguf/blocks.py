"""Quantized weights as blocks of GGUF. A weight is stored only in a type that represents it exactly.

A uniform grid `scale * (code - zero_point)` with an integer zero point is a grid of signed integers, so it fits a type
without an offset as soon as its integers do: 4 asymmetric bits, -15..15, fit the five of `Q5_0`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcli.core.formats.affine import Affine
from qcli.core.weight import QuantizedWeight
from qcli.export.gguf.types import BLOCK, BLOCK_TYPES, BlockType


def exact_types(weight: QuantizedWeight) -> Iterator[BlockType]:
    """The block types that store the decoded weight exactly, smallest first."""
    return (type for type in BLOCK_TYPES if holds(type, weight))


def holds(type: BlockType, weight: QuantizedWeight) -> bool:
    """Whether a block type stores the decoded weight exactly."""
    return _in_blocks(weight) and _holds(type, weight)


def encode(weight: QuantizedWeight, type: BlockType) -> Tensor:
    """The weight as blocks of a type that stores it exactly: uint8 `[out, in / 32 * type.bytes]`."""
    rows = weight.shape[0]
    scale = _scale(weight)
    head = [scale.contiguous().view(torch.uint8).view(rows, -1, 2)]
    if type.offset:
        head.append(_offset(weight).half().contiguous().view(torch.uint8).view(rows, -1, 2))
        codes = weight.codes
    else:
        codes = (_signed(weight) + (0 if type.bits == 8 else 1 << (type.bits - 1))).to(torch.int8).view(torch.uint8)
    codes = codes.reshape(rows, -1, BLOCK)
    if type.bits == 8:
        return torch.cat([*head, codes], dim=2).view(rows, -1)
    low, high = codes[..., : BLOCK // 2] & 15, codes[..., BLOCK // 2 :] & 15
    if type.bits == 5:
        head.append(_bits(codes >> 4))
    return torch.cat([*head, low | high << 4], dim=2).view(rows, -1)


def _in_blocks(weight: QuantizedWeight) -> bool:
    """Whether the weights of every block share one scale."""
    format, columns = weight.format, weight.shape[1]
    if not isinstance(format, Affine) or columns % BLOCK:
        return False
    return format.group_width(columns) % BLOCK == 0 or format.groups(columns) == 1


def _holds(type: BlockType, weight: QuantizedWeight) -> bool:
    if type.offset:
        offset = _offset(weight)
        fits = int(weight.codes.max()) < 1 << type.bits and torch.equal(offset.half().float(), offset)
        return fits and torch.equal(_scaled(weight.codes, weight) + _repeated(offset, weight), weight.dense())
    zero_point = _zero_point(weight)
    if not torch.equal(zero_point, zero_point.round()):
        return False
    signed, half = _signed(weight), 1 << (type.bits - 1)
    return -half <= int(signed.min()) and int(signed.max()) < half


def _signed(weight: QuantizedWeight) -> Tensor:
    """Codes minus zero points, which are integers: int16 `[out, in]`."""
    zero_point = _zero_point(weight).to(torch.int16)
    return weight.codes.to(torch.int16) - _affine(weight).spread(zero_point, weight.shape[1])


def _zero_point(weight: QuantizedWeight) -> Tensor:
    """float32 `[out, groups]`."""
    scale = weight.tables["weight_scale"].float()
    table = weight.tables.get("weight_zero_point")
    return torch.full_like(scale, float(_affine(weight).center)) if table is None else table.float()


def _scale(weight: QuantizedWeight) -> Tensor:
    """The scale of every block, float16 `[out, in / 32]`."""
    return _affine(weight).spread(weight.tables["weight_scale"], weight.shape[1])[:, ::BLOCK]


def _offset(weight: QuantizedWeight) -> Tensor:
    """The value of code 0 in every block, float32 `[out, in / 32]`."""
    return _affine(weight).spread(-_zero_point(weight), weight.shape[1])[:, ::BLOCK] * _scale(weight).float()


def _scaled(codes: Tensor, weight: QuantizedWeight) -> Tensor:
    return codes.float() * _repeated(_scale(weight).float(), weight)


def _repeated(table: Tensor, weight: QuantizedWeight) -> Tensor:
    return table.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]


def _affine(weight: QuantizedWeight) -> Affine:
    assert isinstance(weight.format, Affine)
    return weight.format


def _bits(fifth: Tensor) -> Tensor:
    """32 single bits as a little-endian word: uint8 `[..., 32]` -> uint8 `[..., 4]`."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=fifth.device)
    eights: Tensor = fifth.unflatten(-1, (4, 8))
    return (eights * weights).sum(-1).to(torch.uint8)
