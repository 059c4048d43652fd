"""Up to 64 rows of inputs by packed weights on tensor cores, which take levels decoded in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from qcli.inference.cuda import stored


@triton.jit
def arrange(
    x_ptr,
    in_scale_ptr,
    arranged_ptr,
    sums_ptr,
    rows,
    K,
    IN_SCALE: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
):
    """Inputs as `matmul` reads them, a tile of columns in each program: `[tiles, TILE, BM]`, and their float32 sums
    `[tiles, BM]`. Of the columns of a word, the two halves take turns, as `_factor` interleaves their codes."""
    tile = tl.program_id(0)
    m = tl.arange(0, BM)
    place = tl.arange(0, TILE)
    each: tl.constexpr = 32 // BITS
    k = tile * TILE + place // each * each + place % each // 2 + place % 2 * (each // 2)
    inside = (k < K)[:, None] & (m < rows)[None, :]
    x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=inside, other=0)
    if IN_SCALE:
        x = (x.to(tl.float32) * tl.load(in_scale_ptr + k, mask=k < K, other=0).to(tl.float32)[:, None]).to(x.dtype)
    tl.store(arranged_ptr + (tile * TILE + place)[:, None] * BM + m[None, :], x)
    tl.store(sums_ptr + tile * BM + m, tl.sum(x.to(tl.float32), axis=0))


@triton.constexpr_function
def _first_bit(i, part, bits):
    return i * bits + (0 if part == "code" else part)


@triton.constexpr_function
def _mask(part, bits):
    return ((1 << bits) - 1 if part == "code" else 1) * 0x10001


@triton.jit
def _factor(words, basis, PART: tl.constexpr, BITS: tl.constexpr, BASE: tl.constexpr, DTYPE: tl.constexpr):
    """What the inputs of a tile are multiplied by, `[n, TILE]`: codes or one bit of them, plus BASE, or the values of a
    codebook's basis vector; in the order of `arrange`. BITS divides 32.

    PART: "code", 0 or 1 (a bit), or "basis".
    """
    low = ()
    high = ()
    for i in tl.static_range(16 // BITS):
        if PART == "basis":
            low = low + (_level(words >> (i * BITS), basis, BITS).to(DTYPE),)
            high = high + (_level(words >> (16 + i * BITS), basis, BITS).to(DTYPE),)
        else:
            # Two codes at once: 16 bits apart, as the operands of the tensor cores are.
            pair = (words >> _first_bit(i, PART, BITS)) & _mask(PART, BITS)
            if BASE == 0:
                low = low + ((pair & 0xFFFF).to(tl.float32).to(DTYPE),)
                high = high + ((pair >> 16).to(tl.float32).to(DTYPE),)
            else:
                pair |= 0x43004300 if BASE == 128 else 0x64006400
                low = low + ((pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True),)
                high = high + ((pair >> 16).to(tl.int16).to(DTYPE, bitcast=True),)
    pairs = tl.join(_joined(low, 16 // BITS), _joined(high, 16 // BITS))
    return tl.reshape(pairs, [words.shape[0], words.shape[1] * (32 // BITS)])


@triton.jit
def _level(codes, basis, BITS: tl.constexpr):
    """The values of a codebook's basis vector for codes of 1 or 2 bits in the low bits."""
    values = tl.where((codes & 1) != 0, basis[1], basis[0])
    if BITS == 2:
        values = tl.where((codes & 2) != 0, tl.where((codes & 1) != 0, basis[3], basis[2]), values)
    return values


@triton.jit
def _joined(parts, count: tl.constexpr):
    """`count` tensors, a power of 2, joined along new last dimensions, whose indices are the bits of the place."""
    if count == 1:
        return parts[0]
    else:
        return _joined(_paired(parts, count // 2), count // 2)


@triton.jit
def _paired(parts, half: tl.constexpr):
    """The halves of a tuple of tensors, joined pair by pair."""
    pairs = ()
    for i in tl.static_range(half):
        pairs = pairs + (tl.join(parts[i], parts[i + half]),)
    return pairs


@triton.jit
def _dot(w, x, DOT32: tl.constexpr):
    """`w x`, float32; DOT32: from float32 operands, as the interpreter needs them."""
    return tl.dot(w.to(tl.float32), x.to(tl.float32)) if DOT32 else tl.dot(w, x)


@triton.jit
def matmul(
    x_ptr,
    sums_ptr,
    words_ptr,
    scale_ptr,
    scale_scale_ptr,
    zero_ptr,
    zero_scale_ptr,
    basis_ptr,
    y_ptr,
    N,
    tiles,
    row_words,
    groups,
    tiles_per_program,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    RANK: tl.constexpr,
    EIGHT: tl.constexpr,
    BASIS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BASE: tl.constexpr,
    DOT32: tl.constexpr,
    TILE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """`y[s, n, m] = sum_k w[n, k] x[m, k]` over the columns of split s, on tensor cores, summed in float32.

    The tensor cores multiply codes; their sums over a tile of columns, which is in one group, are scaled. Inputs come
    from `arrange`. Codes come as `BASE + q`, a power of 2 whose mantissa ends in the code's bits, which takes no
    conversion: two weights cost a shift and a logical operation. BITS divides 32; codebooks have 1 or 2 bits.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(row, N - 1)
    m = tl.arange(0, BM)
    acc = tl.zeros([BN, BM], tl.float32)
    start = tl.program_id(1) * tiles_per_program
    for tile in range(start, min(start + tiles_per_program, tiles)):
        word = tile * (TILE * BITS // 32) + tl.arange(0, TILE * BITS // 32)
        place = words_ptr + n[:, None].to(tl.int64) * row_words + word[None, :]
        words = tl.load(place, mask=(n >= 0)[:, None] & (word < row_words)[None, :], other=0)
        x = tl.load(x_ptr + (tile * TILE + tl.arange(0, TILE))[:, None] * BM + m[None, :])
        x_sum = tl.load(sums_ptr + tile * BM + m)[None, :]
        g = 0 if GROUP == 0 else tile * TILE // GROUP
        entry = n * groups + g
        if KIND == "affine":
            scale = stored.scale(scale_ptr, entry, n >= 0, ZERO)
            zero = stored.zero_point(zero_ptr, n, g, n >= 0, groups, ZERO, BITS) + 0 * scale + BASE
            product = _dot(_factor(words, (), "code", BITS, BASE, x.dtype), x, DOT32)
            acc += scale[:, None] * (product - zero[:, None] * x_sum)
        elif KIND == "planes" or KIND == "signs":
            alpha1 = tl.load(scale_ptr + entry).to(tl.float32)[:, None]
            alpha2 = tl.load(zero_ptr + entry).to(tl.float32)[:, None]
            plane1 = _dot(_factor(words, (), 0, BITS, BASE, x.dtype), x, DOT32) - BASE * x_sum
            plane2 = _dot(_factor(words, (), 1, BITS, BASE, x.dtype), x, DOT32) - BASE * x_sum
            if KIND == "signs":
                plane1 = 2 * plane1 - x_sum
                plane2 = 2 * plane2 - x_sum
            acc += alpha1 * plane1 + alpha2 * plane2
        else:
            acc -= stored.table(zero_ptr, zero_scale_ptr, entry, 1, 0, n >= 0, EIGHT)[:, None] * x_sum
            values = basis_ptr if BASIS_ROWS == 0 else basis_ptr + (n // BASIS_ROWS)[:, None] * (RANK << BITS)
            for r in tl.static_range(RANK):
                basis = ()
                for code in tl.static_range(1 << BITS):
                    basis = basis + (tl.load(values + (r << BITS) + code),)
                scale = stored.table(scale_ptr, scale_scale_ptr, entry, RANK, r, n >= 0, EIGHT)[:, None]
                acc += scale * _dot(_factor(words, basis, "basis", BITS, 0, x.dtype), x, DOT32)
    place = y_ptr + (tl.program_id(1) * N + row[:, None]) * BM + m[None, :]
    tl.store(place, acc, mask=(row < N)[:, None] & (m >= 0)[None, :])


@triton.jit
def collect(parts_ptr, bias_ptr, y_ptr, splits, rows, N, BIAS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Sum the splits of `matmul`: `[splits, N, BM]` -> y `[rows, N]`."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    inside = (n < N)[:, None] & (m < rows)[None, :]
    total = tl.zeros([BN, BM], tl.float32)
    for s in range(splits):
        total += tl.load(parts_ptr + (s * N + n[:, None]) * BM + m[None, :], mask=inside, other=0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    tl.store(y_ptr + m[None, :] * N + n[:, None], total.to(y_ptr.dtype.element_ty), mask=inside)
