"""Triton kernels that read the tensors on disk as they are: `gemv`, `matmul` and `decode`.

A row's codes are a dense bit stream, so 32 codes of any width are `bits` whole words: a chunk. Threads own chunks, and
code i of a chunk lies at the same place in every one. Sums over a chunk's codes need no shuffles, scales are applied
once for each chunk, and the columns may be taken in the order (i, chunk), in which all accesses are coalesced.

`gemv` never expands the weight. A code masked out of its word, `q << s`, is taken as a float32: the denormal
`q 2**(s - 149)`, which the chip multiplies at full speed. The input that it meets has been multiplied by `2**(90 - s)`,
so a weight costs one logical operation and one fused multiplication and addition in place of shift, mask, conversion
and addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(32)  # codes
_UP = tl.constexpr(90)  # exponent that lifts denormals: inputs may be as large as 2**37 and as small as 2**-67
_MAGIC = tl.constexpr(0x4B000000)  # 2**23 as a float32: below it lie 23 bits of integer


@triton.jit
def _element(packed, e: tl.constexpr, X: tl.constexpr):
    """Element e of the 2 or 4 in an int64, as float32."""
    if X == "fp32":
        return (packed >> (32 * e)).to(tl.int32).to(tl.float32, bitcast=True)
    elif X == "fp16":
        return (packed >> (16 * e)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (packed >> (16 * e)).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def _by_place(ptr, spans, live, K, SPAN: tl.constexpr, X: tl.constexpr):
    """A vector's elements by their place in a span: SPAN tensors of spans, float32; beyond K they are 0."""
    each: tl.constexpr = 2 if X == "fp32" else 4
    elements = ()
    for u in tl.static_range(SPAN // each):
        packed = tl.load(ptr + spans * (SPAN // each) + u, mask=live & (spans * SPAN + u * each < K), other=0)
        for e in tl.static_range(each):
            elements = elements + (_element(packed, e, X),)
    return elements


@triton.constexpr_function
def _words_at_once(count):
    """Words that one load takes: up to 16 bytes."""
    return 4 if count % 4 == 0 else 2 if count % 2 == 0 else 1


@triton.jit
def _words(base, first, mask, row_words, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """COUNT words from each pointer of `base`, a tuple of tensors; EVEN: no row ends among them.

    first: the place of the first words in their rows.
    """
    words = ()
    width: tl.constexpr = _words_at_once(COUNT) if EVEN else 1
    for c in tl.static_range(COUNT // width):
        if width == 1:
            inside = mask if EVEN else mask & (first + c < row_words)
            words = words + (tl.load(base + c, mask=inside, other=0),)
        else:
            places = (base + c * width)[:, :, None] + tl.arange(0, width)[None, None, :]
            whole = tl.load(places, mask=mask[:, :, None], other=0)
            if width == 2:
                words = words + tl.split(whole)
            else:
                even, odd = tl.split(tl.reshape(whole, [base.shape[0], base.shape[1], 2, 2]))
                w0, w2 = tl.split(even)
                w1, w3 = tl.split(odd)
                words = words + (w0, w1, w2, w3)
    return words


@triton.jit
def _place(words, i: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr):
    """Words that hold code i in their low TOP bits; `_shift` says where."""
    s: tl.constexpr = i * BITS % 32
    c: tl.constexpr = i * BITS // 32
    step: tl.constexpr = s % BITS + (TOP - s % BITS) // BITS * BITS
    if s + BITS > 32:
        return ((words[c] >> s) & ((1 << (32 - s)) - 1)) | (words[c + 1] << (32 - s))
    elif s < step:
        return words[c]
    else:
        return words[c] >> step


@triton.constexpr_function
def _shift(i, bits, top):
    """Where code i starts in the words of `_place`."""
    s = i * bits % 32
    step = s % bits + (top - s % bits) // bits * bits
    return 0 if s + bits > 32 else s if s < step else s - step


@triton.jit
def _code(words, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of each chunk, int32."""
    return (_place(words, i, BITS, 31) >> _shift(i, BITS, 31)) & ((1 << BITS) - 1)


@triton.jit
def _zero_point(ptr, n, g, mask, groups, ZERO: tl.constexpr, BITS: tl.constexpr):
    """Zero points of rows n and groups g, float32: none, packed along the rows, or float16."""
    if ZERO == "half":
        return 0.5
    elif ZERO == "none":
        return 1.0 * (1 << (BITS - 1))
    elif ZERO == "float":
        return tl.load(ptr + n * groups + g, mask=mask, other=0).to(tl.float32)
    else:
        bit = n * BITS
        word = ptr + (bit // 32) * groups + g
        low = (tl.load(word, mask=mask, other=0) >> (bit % 32)) & ((1 << BITS) - 1)
        if 32 % BITS != 0:
            over = bit % 32 + BITS - 32
            high = tl.load(word + groups, mask=mask & (over > 0), other=0)
            kept = (1 << tl.minimum(BITS, 32 - bit % 32)) - 1
            low = (low & kept) | ((high << (BITS - tl.maximum(over, 0))) & ((1 << BITS) - 1))
        return low.to(tl.float32)


@triton.jit
def _scale(ptr, entry, mask, ZERO: tl.constexpr):
    """Scales of an affine grid, float32; signs lie on either side of "half", a step of twice their magnitude apart."""
    scale = tl.load(ptr + entry, mask=mask, other=0).to(tl.float32)
    return 2 * scale if ZERO == "half" else scale


@triton.jit
def _table(ptr, scale_ptr, entry, step: tl.constexpr, r: tl.constexpr, mask, EIGHT: tl.constexpr):
    """Entries of a table with `step` values each, the r-th of them; 8-bit ones with a scale for each 256 entries."""
    value = tl.load(ptr + entry * step + r, mask=mask, other=0).to(tl.float32)
    if EIGHT:
        value *= tl.load(scale_ptr + entry // 256 * step + r, mask=mask, other=0).to(tl.float32)
    return value


@triton.jit
def _sum(words, xs, first: tl.constexpr, last: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr, like):
    """`sum_i part(q_i) x_i` over codes first..last-1 of each span.

    PART: the mask of bits taken, in place; or "both", bit 0 and bit 1 (of 2-bit codes)."""
    total = tl.zeros(like.shape, tl.float32)
    for i in tl.static_range(first, last):
        word = _place(words, i, BITS, 23)
        if PART == "both":
            bits = word & (word >> 1) & (1 << _shift(i, BITS, 23))
        else:
            bits = word & (PART << _shift(i, BITS, 23))
        x = xs[i] * (2.0 ** (_UP - _shift(i, BITS, 23)))
        total += bits.to(tl.float32, bitcast=True) * x[:, None]
    return total * (2.0 ** (149 - _UP))


@triton.jit(do_not_specialize=["word_step"])
def gemv(
    x_ptr,
    in_scale_ptr,
    words_ptr,
    scale_ptr,
    scale_scale_ptr,
    zero_ptr,
    zero_scale_ptr,
    basis_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
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
    X: tl.constexpr,
    IN_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    SPAN: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """`y[n] = sum_k w[n, k] x[k]`, summed in float32.

    A thread holds the inputs of a span, SPAN columns in whole chunks, and meets them with the same span of many rows of
    the weight. Program (p, s) computes BN outputs from the columns of BJ spans; y is `[splits, N]`.

    word_step: 1, where spans are words; as an argument, so that neighbouring ones go to neighbouring threads.
    GROUP: columns that share scales, a divisor or a multiple of SPAN, or 0 for the whole row.
    """
    spans = tl.program_id(1) * BJ + tl.arange(0, BJ)
    live = spans * SPAN < K
    first = spans * word_step if SPAN * BITS == 32 else spans * (SPAN * BITS // 32)
    step: tl.constexpr = SPAN if GROUP == 0 else min(GROUP, SPAN)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(row, N - 1)
    mask = live[:, None] & (n >= 0)[None, :]
    base = words_ptr + first[:, None] + n[None, :].to(tl.int64) * row_words
    words = _words(base, first[:, None], mask, row_words, SPAN * BITS // 32, EVEN)  # first: they take the longest
    xs = _by_place(x_ptr, spans, live, K, SPAN, X)
    if IN_SCALE:
        in_scale = _by_place(in_scale_ptr, spans, live, K, SPAN, "fp16")
        scaled = ()
        for i in tl.static_range(SPAN):
            scaled = scaled + (xs[i] * in_scale[i],)
        xs = scaled
    y = tl.zeros([BJ, BN], tl.float32)
    for part in tl.static_range(SPAN // step):
        column = spans * SPAN + part * step
        g = column * 0 if GROUP == 0 else column // GROUP
        inside = mask if GROUP == 0 else mask & (g < groups)[:, None]
        y += _term(
            words, xs, part * step, (part + 1) * step, n, g, inside, groups,
            scale_ptr, scale_scale_ptr, zero_ptr, zero_scale_ptr, basis_ptr,
            KIND, BITS, ZERO, RANK, EIGHT, BASIS_ROWS,
        )  # fmt: skip
    total = tl.sum(y, axis=0)
    if BIAS:
        total += tl.load(bias_ptr + n).to(tl.float32)
    tl.store(y_ptr + tl.program_id(1) * N + row, total.to(y_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def _term(
    words, xs, first: tl.constexpr, last: tl.constexpr, n, g, mask, groups,
    scale_ptr, scale_scale_ptr, zero_ptr, zero_scale_ptr, basis_ptr,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, RANK: tl.constexpr, EIGHT: tl.constexpr,
    BASIS_ROWS: tl.constexpr,
):  # fmt: skip
    """The scaled sums of columns first..last-1 of each span, which are in one group: `[spans, n]`."""
    entry = n[None, :] * groups + g[:, None]
    x_sum = xs[first]
    for i in tl.static_range(first + 1, last):
        x_sum += xs[i]
    x_sum = x_sum[:, None]
    if KIND == "affine":
        scale = _scale(scale_ptr, entry, mask, ZERO)
        zero = _zero_point(zero_ptr, n[None, :], g[:, None], mask, groups, ZERO, BITS)
        term = scale * (_sum(words, xs, first, last, (1 << BITS) - 1, BITS, entry) - zero * x_sum)
    elif KIND == "planes" or KIND == "signs":
        alpha1 = tl.load(scale_ptr + entry, mask=mask, other=0).to(tl.float32)
        alpha2 = tl.load(zero_ptr + entry, mask=mask, other=0).to(tl.float32)
        plane1 = _sum(words, xs, first, last, 1, BITS, entry)
        plane2 = 0.5 * _sum(words, xs, first, last, 2, BITS, entry)
        if KIND == "signs":
            plane1 = 2 * plane1 - x_sum
            plane2 = 2 * plane2 - x_sum
        term = alpha1 * plane1 + alpha2 * plane2
    else:
        term = -_table(zero_ptr, zero_scale_ptr, entry, 1, 0, mask, EIGHT) * x_sum
        basis = basis_ptr if BASIS_ROWS == 0 else basis_ptr + (n // BASIS_ROWS)[None, :] * (RANK << BITS)
        if BITS <= 2:
            bit0 = _sum(words, xs, first, last, 1, BITS, entry)
            if BITS == 2:
                bit1 = 0.5 * _sum(words, xs, first, last, 2, BITS, entry)
                both = _sum(words, xs, first, last, "both", BITS, entry)
        for r in tl.static_range(RANK):
            values = basis + (r << BITS)
            if BITS <= 2:
                v0 = tl.load(values).to(tl.float32)
                v1 = tl.load(values + 1).to(tl.float32)
                total = v0 * x_sum + (v1 - v0) * bit0
                if BITS == 2:
                    v2 = tl.load(values + 2).to(tl.float32)
                    v3 = tl.load(values + 3).to(tl.float32)
                    total += (v2 - v0) * bit1 + (v3 - v2 - v1 + v0) * both
            else:
                total = tl.zeros(entry.shape, tl.float32)
                for i in tl.static_range(first, last):
                    value = tl.load(values + _code(words, i, BITS)).to(tl.float32)
                    total += value * xs[i][:, None]
            term += _table(scale_ptr, scale_scale_ptr, entry, RANK, r, mask, EIGHT) * total
    return term


@triton.jit
def _float_code(words, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of each chunk as float32, times 2 to the power of `_shift(i, BITS, 23)`."""
    bits = _place(words, i, BITS, 23) & (((1 << BITS) - 1) << _shift(i, BITS, 23))
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
        scale = _scale(scale_ptr, entry, mask, ZERO)
        levels = (scale, scale * _zero_point(zero_ptr, n, g, mask, groups, ZERO, BITS))
    elif KIND == "planes":
        alpha1 = tl.load(scale_ptr + entry, mask=mask, other=0).to(tl.float32)
        alpha2 = tl.load(zero_ptr + entry, mask=mask, other=0).to(tl.float32)
        levels = (alpha1 * 0, alpha1, alpha2, alpha1 + alpha2)
    elif KIND == "signs":
        alpha1 = tl.load(scale_ptr + entry, mask=mask, other=0).to(tl.float32)
        alpha2 = tl.load(zero_ptr + entry, mask=mask, other=0).to(tl.float32)
        levels = (-alpha1 - alpha2, alpha1 - alpha2, alpha2 - alpha1, alpha1 + alpha2)
    else:
        offset = _table(zero_ptr, zero_scale_ptr, entry, 1, 0, mask, EIGHT)
        basis = basis_ptr + (n * 0 if BASIS_ROWS == 0 else n // BASIS_ROWS) * (RANK << BITS) + 0 * entry
        if BITS <= 2:
            levels = ()
            for code in tl.static_range(1 << BITS):
                level = -offset
                for r in tl.static_range(RANK):
                    scale = _table(scale_ptr, scale_scale_ptr, entry, RANK, r, mask, EIGHT)
                    level += scale * tl.load(basis + (r << BITS) + code).to(tl.float32)
                levels = levels + (level,)
        else:
            levels = (offset, basis)
            for r in tl.static_range(RANK):
                levels = levels + (_table(scale_ptr, scale_scale_ptr, entry, RANK, r, mask, EIGHT),)
    return levels


@triton.jit
def _value(words, i: tl.constexpr, levels, KIND: tl.constexpr, BITS: tl.constexpr, RANK: tl.constexpr):
    """Weight i of each chunk, float32."""
    if KIND == "affine":
        return _float_code(words, i, BITS) * (levels[0] * (2.0 ** -_shift(i, BITS, 23))) - levels[1]
    elif BITS <= 2:
        word = _place(words, i, BITS, 31)
        bit0 = (word & (1 << _shift(i, BITS, 31))) != 0
        value = tl.where(bit0, levels[1], levels[0])
        if BITS == 2:
            bit1 = (word & (2 << _shift(i, BITS, 31))) != 0
            value = tl.where(bit1, tl.where(bit0, levels[3], levels[2]), value)
        return value
    else:
        code = _code(words, i, BITS)
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
    mask = (chunks * CHUNK < K)[:, None] & (n >= 0)
    first = chunks * word_step if BITS == 1 else chunks * BITS
    base = words_ptr + first[:, None] + n.to(tl.int64) * row_words
    words = _words(base, first[:, None], mask, row_words, BITS, EVEN)
    step: tl.constexpr = 32 if GROUP == 0 else min(GROUP, 32)
    for part in tl.static_range(CHUNK // step):
        column = chunks * CHUNK + part * step
        g = (column * 0 if GROUP == 0 else column // GROUP)[:, None]
        levels = _levels(
            n, g, mask & (g < groups), groups, scale_ptr, scale_scale_ptr, zero_ptr, zero_scale_ptr, basis_ptr,
            KIND, BITS, ZERO, RANK, EIGHT, BASIS_ROWS,
        )  # fmt: skip
        for i in tl.static_range(part * step, (part + 1) * step):
            value = _value(words, i, levels, KIND, BITS, RANK)
            place = weight_ptr + row[None, :].to(tl.int64) * (CHUNK * J) + i * J + chunks[:, None]
            tl.store(place, value.to(weight_ptr.dtype.element_ty), mask=(chunks < J)[:, None] & (row < rows)[None, :])


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
            scale = _scale(scale_ptr, entry, n >= 0, ZERO)
            zero = _zero_point(zero_ptr, n, g, n >= 0, groups, ZERO, BITS) + 0 * scale + BASE
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
            acc -= _table(zero_ptr, zero_scale_ptr, entry, 1, 0, n >= 0, EIGHT)[:, None] * x_sum
            values = basis_ptr if BASIS_ROWS == 0 else basis_ptr + (n // BASIS_ROWS)[:, None] * (RANK << BITS)
            for r in tl.static_range(RANK):
                basis = ()
                for code in tl.static_range(1 << BITS):
                    basis = basis + (tl.load(values + (r << BITS) + code),)
                scale = _table(scale_ptr, scale_scale_ptr, entry, RANK, r, n >= 0, EIGHT)[:, None]
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
