"""Packed weights decoded, tile by tile, for the vendor's matrix product."""

from __future__ import annotations

import triton
import triton.language as tl

from qcli.inference.cuda import stored

_CHUNK = tl.constexpr(32)  # codes
_MAGIC = tl.constexpr(0x4B000000)  # 2**23 as a float32: below it lie 23 bits of integer


@triton.jit
def _float_code(words, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of each chunk as float32, times 2 to the power of `stored.shift(i, BITS, 23)`."""
    bits = stored.place(words, i, BITS, 23) & (((1 << BITS) - 1) << stored.shift(i, BITS, 23))
    return (bits | _MAGIC).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _levels(
    n, g, mask, groups, scale_ptr, scale_scale_ptr, zero_ptr, zero_scale_ptr, basis_ptr,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, RANK: tl.constexpr, EIGHT: tl.constexpr,
    BASIS_ROWS: tl.constexpr,
):  # fmt: skip
    """What `_value` needs of each group: scale and shifted zero; or the levels of codes of 1 and 2 bits; or the scales
    of a codebook, its offset, and pointers to its basis."""
    entry = n * groups + g
    if KIND == "affine":
        scale = stored.scale(scale_ptr, entry, mask, ZERO)
        levels = (scale, scale * stored.zero_point(zero_ptr, n, g, mask, groups, ZERO, BITS))
    elif KIND == "planes":
        alpha1 = tl.load(scale_ptr + entry, mask=mask, other=0).to(tl.float32)
        alpha2 = tl.load(zero_ptr + entry, mask=mask, other=0).to(tl.float32)
        levels = (alpha1 * 0, alpha1, alpha2, alpha1 + alpha2)
    elif KIND == "signs":
        alpha1 = tl.load(scale_ptr + entry, mask=mask, other=0).to(tl.float32)
        alpha2 = tl.load(zero_ptr + entry, mask=mask, other=0).to(tl.float32)
        levels = (-alpha1 - alpha2, alpha1 - alpha2, alpha2 - alpha1, alpha1 + alpha2)
    else:
        offset = stored.table(zero_ptr, zero_scale_ptr, entry, 1, 0, mask, EIGHT)
        basis = basis_ptr + (n * 0 if BASIS_ROWS == 0 else n // BASIS_ROWS) * (RANK << BITS) + 0 * entry
        if BITS <= 2:
            levels = ()
            for code in tl.static_range(1 << BITS):
                level = -offset
                for r in tl.static_range(RANK):
                    scale = stored.table(scale_ptr, scale_scale_ptr, entry, RANK, r, mask, EIGHT)
                    level += scale * tl.load(basis + (r << BITS) + code).to(tl.float32)
                levels = levels + (level,)
        else:
            levels = (offset, basis)
            for r in tl.static_range(RANK):
                levels = levels + (stored.table(scale_ptr, scale_scale_ptr, entry, RANK, r, mask, EIGHT),)
    return levels


@triton.jit
def _value(words, i: tl.constexpr, levels, KIND: tl.constexpr, BITS: tl.constexpr, RANK: tl.constexpr):
    """Weight i of each chunk, float32."""
    if KIND == "affine":
        return _float_code(words, i, BITS) * (levels[0] * (2.0 ** -stored.shift(i, BITS, 23))) - levels[1]
    elif BITS <= 2:
        word = stored.place(words, i, BITS, 31)
        bit0 = (word & (1 << stored.shift(i, BITS, 31))) != 0
        value = tl.where(bit0, levels[1], levels[0])
        if BITS == 2:
            bit1 = (word & (2 << stored.shift(i, BITS, 31))) != 0
            value = tl.where(bit1, tl.where(bit0, levels[3], levels[2]), value)
        return value
    else:
        code = stored.code(words, i, BITS)
        value = -levels[0]
        for r in tl.static_range(RANK):
            value += levels[2 + r] * tl.load(levels[1] + (r << BITS) + code).to(tl.float32)
        return value


@triton.jit(do_not_specialize=["word_step"])
def decode(
    words_ptr,
    scale_ptr,
    scale_scale_ptr,
    zero_ptr,
    zero_scale_ptr,
    basis_ptr,
    weight_ptr,
    first_row,
    rows,
    N,
    K,
    J,
    row_words,
    word_step,
    groups,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    RANK: tl.constexpr,
    EIGHT: tl.constexpr,
    BASIS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """Decode `rows` rows of a weight from `first_row`: `[rows, 32, J]`, columns in the order (place, chunk)."""
    chunks = tl.program_id(1) * BJ + tl.arange(0, BJ)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(first_row + row, N - 1)[None, :]
    mask = (chunks * _CHUNK < K)[:, None] & (n >= 0)
    first = chunks * word_step if BITS == 1 else chunks * BITS
    base = words_ptr + first[:, None] + n.to(tl.int64) * row_words
    words = stored.words(base, first[:, None], mask, row_words, BITS, EVEN)
    step: tl.constexpr = 32 if GROUP == 0 else min(GROUP, 32)
    for part in tl.static_range(_CHUNK // step):
        column = chunks * _CHUNK + part * step
        g = (column * 0 if GROUP == 0 else column // GROUP)[:, None]
        levels = _levels(
            n, g, mask & (g < groups), groups, scale_ptr, scale_scale_ptr, zero_ptr, zero_scale_ptr, basis_ptr,
            KIND, BITS, ZERO, RANK, EIGHT, BASIS_ROWS,
        )  # fmt: skip
        for i in tl.static_range(part * step, (part + 1) * step):
            value = _value(words, i, levels, KIND, BITS, RANK)
            place = weight_ptr + row[None, :].to(tl.int64) * (_CHUNK * J) + i * J + chunks[:, None]
            tl.store(place, value.to(weight_ptr.dtype.element_ty), mask=(chunks < J)[:, None] & (row < rows)[None, :])
