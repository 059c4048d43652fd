"""Dense n-bit packing, n = 1..8: the only place that knows the bit layout of codes.

Code i of a row occupies bits `[i*n, (i+1)*n)` of the row's little-endian bit stream; rows are padded
with zeros to whole int32 words and a code may straddle two words. This is the layout of
compressed-tensors >= 0.18 (`pack-quantized`) for every width.

Both directions work on eight codes at a time in one int64: eight bytes of n significant bits become
n bytes in three folds (8 -> 16 -> 32 -> 64 bit lanes), so every width is vectorized alike.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

if sys.byteorder != "little":
    raise ImportError("qcli packs through integer views and needs a little-endian machine")

_TILE = 1 << 19  # codes packed at a time: small enough for a core's cache


def words_per_row(columns: int, bits: int) -> int:
    """Number of int32 words of a row of `columns` codes."""
    return -(-columns * bits // 32)


def _folds(bits: int) -> list[tuple[int, int, int]]:
    """(shift, low mask, high mask) of each fold from 8-bit lanes to one 64-bit lane.

    A fold joins neighbouring lanes, of which `bits * lane / 8` bits are used, into one of twice the width:
    `low` masks the even lanes, `high` the positions that the odd ones are shifted to. Unpacking runs the folds
    backwards.
    """
    folds = []
    for lane in (8, 16, 32):
        used = bits * lane // 8
        low = sum(((1 << used) - 1) << offset for offset in range(0, 64, 2 * lane))
        folds.append((lane - used, low, low << used))
    return folds


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes.

    Args:
        codes: uint8 `[rows, columns]`, each below `2**bits`.
        bits: 1..8.

    Returns:
        int32 `[rows, ceil(columns * bits / 32)]`.
    """
    rows, columns = codes.shape
    packed = torch.empty(rows, words_per_row(columns, bits), dtype=torch.int32, device=codes.device)
    step = max(1, _TILE // max(1, columns))
    work = torch.empty(2, min(step, rows) * -(-columns // 8), dtype=torch.int64, device=codes.device)
    for start in range(0, rows, step):
        packed[start : start + step] = _pack_rows(codes[start : start + step], bits, work)
    return packed


def _pack_rows(codes: Tensor, bits: int, work: Tensor) -> Tensor:
    """Pack a tile of rows; `work`, int64 `[2, >= rows * ceil(columns / 8)]`, is scratch."""
    rows, columns = codes.shape
    words = words_per_row(columns, bits)
    eights = -(-columns // 8)
    if columns % 8:
        codes = torch.nn.functional.pad(codes, (0, eights * 8 - columns))
    lanes = codes.reshape(-1).view(torch.int64)
    if bits < 8:
        even, odd = work[:, : lanes.numel()]
        for shift, low, high in _folds(bits):
            torch.bitwise_right_shift(lanes, shift, out=odd).bitwise_and_(high)
            lanes = torch.bitwise_and(lanes, low, out=even).bitwise_or_(odd)
    stream = _leading_bytes(lanes, bits).view(rows, eights * bits)
    if stream.shape[1] != words * 4:  # whole groups of eight codes and whole words may differ in length
        shared = min(words * 4, stream.shape[1])
        padded = stream.new_zeros(rows, words * 4)
        padded[:, :shared] = stream[:, :shared]
        stream = padded
    return stream.view(-1).view(torch.int32).view(rows, words)


def _leading_bytes(lanes: Tensor, count: int) -> Tensor:
    """The low `count` bytes of each int64: contiguous uint8.

    Copied in the widest integers that divide `count`: strided byte copies are the bottleneck of packing.
    """
    width = count & -count
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    source = lanes.view(integer).view(-1, 8 // width)
    target = torch.empty(lanes.numel(), count // width, dtype=integer, device=lanes.device)
    for column in range(count // width):
        target[:, column] = source[:, column]
    return target.view(-1).view(torch.uint8)


def cut_columns(packed: Tensor, bits: int, columns: int, part: slice) -> Tensor:
    """Some columns of packed rows of `columns` codes, packed; unpacks a tile at a time.

    Args:
        packed: int32 `[rows, words]`, as `pack_bits` returns it.
    """
    step = max(1, _TILE // max(1, columns))
    return torch.cat([pack_bits(unpack_bits(tile, bits, columns)[:, part], bits) for tile in packed.split(step)])


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_bits`: int32 `[rows, words]` -> uint8 `[rows, columns]`."""
    rows = packed.shape[0]
    eights = -(-columns // 8)
    stream = packed.reshape(-1).view(torch.uint8).view(rows, packed.shape[1] * 4)
    missing = eights * bits - stream.shape[1]
    if missing > 0:
        stream = torch.nn.functional.pad(stream, (0, missing))
    lanes = stream.new_zeros(rows, eights, 8)
    lanes[:, :, :bits] = stream[:, : eights * bits].view(rows, eights, bits)
    wide = lanes.view(-1).view(torch.int64)
    if bits < 8:
        for shift, low, high in reversed(_folds(bits)):
            wide = (wide & high).bitwise_left_shift_(shift).bitwise_or_(wide & low)
    return wide.view(torch.uint8).view(rows, eights * 8)[:, :columns]
