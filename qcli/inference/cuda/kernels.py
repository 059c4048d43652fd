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
def _chunk_of(ptr, chunks, live, K, X: tl.constexpr):
    """A vector's elements by their place in a chunk: 32 tensors of chunks, float32; beyond K they are 0."""
    each: tl.constexpr = 2 if X == "fp32" else 4
    elements = ()
    for u in tl.static_range(CHUNK // each):
        packed = tl.load(ptr + chunks * (CHUNK // each) + u, mask=live & (chunks * CHUNK + u * each < K), other=0)
        for e in tl.static_range(each):
            elements = elements + (_element(packed, e, X),)
    return elements


@triton.jit
def _words(base, chunks, mask, row_words, BITS: tl.constexpr, EVEN: tl.constexpr):
    """The words of each chunk: BITS tensors in the shape of `base`, pointers to the first ones."""
    if EVEN and (BITS == 2 or BITS == 4 or BITS == 8):
        places = base[:, :, None] + tl.arange(0, BITS)[None, None, :]
        whole = tl.load(places, mask=mask[:, :, None], other=0)
        if BITS == 2:
            words = tl.split(whole)
        elif BITS == 4:
            even, odd = tl.split(tl.reshape(whole, [base.shape[0], base.shape[1], 2, 2]))
            w0, w2 = tl.split(even)
            w1, w3 = tl.split(odd)
            words = (w0, w1, w2, w3)
        else:
            even, odd = tl.split(tl.reshape(whole, [base.shape[0], base.shape[1], 2, 2, 2]))
            w04, w26 = tl.split(even)
            w15, w37 = tl.split(odd)
            w0, w4 = tl.split(w04)
            w2, w6 = tl.split(w26)
            w1, w5 = tl.split(w15)
            w3, w7 = tl.split(w37)
            words = (w0, w1, w2, w3, w4, w5, w6, w7)
    else:
        words = ()
        for c in tl.static_range(BITS):
            inside = mask if EVEN else mask & (chunks * BITS + c < row_words)
            words = words + (tl.load(base + c, mask=inside, other=0),)
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
def _table(ptr, scale_ptr, entry, step: tl.constexpr, r: tl.constexpr, mask, EIGHT: tl.constexpr):
    """Entries of a table with `step` values each, the r-th of them; 8-bit ones with a scale for each 256 entries."""
    value = tl.load(ptr + entry * step + r, mask=mask, other=0).to(tl.float32)
    if EIGHT:
        value *= tl.load(scale_ptr + entry // 256 * step + r, mask=mask, other=0).to(tl.float32)
    return value


@triton.jit
def _sum(
    words, xs, m: tl.constexpr, first: tl.constexpr, last: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr, like
):
    """`sum_i part(q_i) x_i 2**-59` over codes first..last-1 of each chunk, for row m of the inputs.

    PART: the mask of bits taken, in place; or "both", bit 0 and bit 1 (of 2-bit codes)."""
    total = tl.zeros(like.shape, tl.float32)
    for i in tl.static_range(first, last):
        word = _place(words, i, BITS, 23)
        if PART == "both":
            bits = word & (word >> 1) & (1 << _shift(i, BITS, 23))
        else:
            bits = word & (PART << _shift(i, BITS, 23))
        x = xs[m * CHUNK + i] * (2.0 ** (_UP - _shift(i, BITS, 23)))
        total += bits.to(tl.float32, bitcast=True) * x[:, None]
    return total * (2.0 ** (149 - _UP))


@triton.jit
def _sum_of_pairs(words, xs, m: tl.constexpr, first: tl.constexpr, last: tl.constexpr, pairs, like):
    """`sum_i v(q_i) x_i` over 2-bit codes first..last-1 of each chunk, for row m of the inputs."""
    total = tl.zeros(like.shape, tl.float32)
    for p in tl.static_range(first // 2, last // 2):
        both = tl.load(pairs + ((words[p // 8] >> (p % 8 * 4)) & 15))
        total += _element(both, 0, "fp32") * xs[m * CHUNK + 2 * p][:, None]
        total += _element(both, 1, "fp32") * xs[m * CHUNK + 2 * p + 1][:, None]
    return total


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
    pairs_ptr,
    y_ptr,
    rows,
    N,
    K,
    row_words,
    word_step,
    groups,
    rows_per_program,
    x_stride,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    RANK: tl.constexpr,
    EIGHT: tl.constexpr,
    BASIS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    X: tl.constexpr,
    ROWS: tl.constexpr,
    IN_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """`y[m, n] = sum_k w[n, k] x[m, k]` for a few rows m, summed in float32.

    Program (p, s) computes `rows_per_program` outputs from the columns of BJ chunks; y is `[splits, rows, N]`.
    GROUP: columns that share scales, a divisor or a multiple of 32, or 0 for the whole row.
    PAIRS: look up the values of two 2-bit codes at once, in scratch memory `[RANK, 16]` for one basis. Every program
    writes it whole, with the same values, so none waits for another.
    """
    if PAIRS:
        pair = tl.arange(0, 16)
        for r in tl.static_range(RANK):
            low = tl.load(basis_ptr + r * 4 + pair % 4).to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
            high = tl.load(basis_ptr + r * 4 + pair // 4).to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
            tl.store(pairs_ptr + r * 16 + pair, (high << 32) | (low & 0xFFFFFFFF))
        tl.debug_barrier()
    chunks = tl.program_id(1) * BJ + tl.arange(0, BJ)
    live = chunks * CHUNK < K
    xs = ()
    for m in tl.static_range(ROWS):
        xs = xs + _chunk_of(x_ptr + tl.minimum(m, rows - 1) * x_stride, chunks, live, K, X)
    if IN_SCALE:
        in_scale = _chunk_of(in_scale_ptr, chunks, live, K, "fp16")
        scaled = ()
        for m in tl.static_range(ROWS):
            for i in tl.static_range(CHUNK):
                scaled = scaled + (xs[m * CHUNK + i] * in_scale[i],)
        xs = scaled
    step: tl.constexpr = 32 if GROUP == 0 else min(GROUP, 32)
    sums = ()  # of the inputs, by row and group of a chunk
    for m in tl.static_range(ROWS):
        for part in tl.static_range(CHUNK // step):
            total = xs[m * CHUNK + part * step]
            for i in tl.static_range(part * step + 1, (part + 1) * step):
                total += xs[m * CHUNK + i]
            sums = sums + (total,)
    start = tl.program_id(0) * rows_per_program
    for n0 in range(start, min(start + rows_per_program, N), BN):
        row = n0 + tl.arange(0, BN)
        n = tl.minimum(row, N - 1)
        mask = live[:, None] & (n >= 0)[None, :]
        base = words_ptr + (chunks * word_step)[:, None] + n[None, :].to(tl.int64) * row_words
        words = _words(base, chunks[:, None], mask, row_words, BITS, EVEN)
        ys = ()
        for m in tl.static_range(ROWS):
            ys = ys + (tl.zeros([BJ, BN], tl.float32),)
        for part in tl.static_range(CHUNK // step):
            column = chunks * CHUNK + part * step
            g = column * 0 if GROUP == 0 else column // GROUP
            inside = mask if GROUP == 0 else mask & (g < groups)[:, None]
            terms = _terms(
                words, xs, sums, part, step, n, g, inside, groups,
                scale_ptr, scale_scale_ptr, zero_ptr, zero_scale_ptr, basis_ptr, pairs_ptr,
                KIND, BITS, ZERO, RANK, EIGHT, BASIS_ROWS, ROWS, PAIRS,
            )  # fmt: skip
            added = ()
            for m in tl.static_range(ROWS):
                added = added + (ys[m] + terms[m],)
            ys = added
        for m in tl.static_range(ROWS):
            y = tl.sum(ys[m], axis=0)
            if BIAS:
                y += tl.load(bias_ptr + n).to(tl.float32)
            place = y_ptr + (tl.program_id(1) * rows + m) * N + row
            tl.store(place, y.to(y_ptr.dtype.element_ty), mask=(row < N) & (row * 0 + m < rows))


@triton.jit
def _terms(
    words, xs, sums, part: tl.constexpr, step: tl.constexpr, n, g, mask, groups,
    scale_ptr, scale_scale_ptr, zero_ptr, zero_scale_ptr, basis_ptr, pairs_ptr,
    KIND: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, RANK: tl.constexpr, EIGHT: tl.constexpr,
    BASIS_ROWS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The scaled sums of one group of each chunk: a tensor `[chunks, n]` for each row of the inputs."""
    first: tl.constexpr = part * step
    last: tl.constexpr = first + step
    entry = n[None, :] * groups + g[:, None]
    terms = ()
    if KIND == "affine":
        scale = tl.load(scale_ptr + entry, mask=mask, other=0).to(tl.float32)
        zero = _zero_point(zero_ptr, n[None, :], g[:, None], mask, groups, ZERO, BITS)
        for m in tl.static_range(ROWS):
            total = _sum(words, xs, m, first, last, (1 << BITS) - 1, BITS, entry)
            terms = terms + (scale * (total - zero * sums[m * (CHUNK // step) + part][:, None]),)
    elif KIND == "planes" or KIND == "signs":
        alpha1 = tl.load(scale_ptr + entry, mask=mask, other=0).to(tl.float32)
        alpha2 = tl.load(zero_ptr + entry, mask=mask, other=0).to(tl.float32)
        for m in tl.static_range(ROWS):
            plane1 = _sum(words, xs, m, first, last, 1, BITS, entry)
            plane2 = 0.5 * _sum(words, xs, m, first, last, 2, BITS, entry)
            if KIND == "signs":
                plane1 = 2 * plane1 - sums[m * (CHUNK // step) + part][:, None]
                plane2 = 2 * plane2 - sums[m * (CHUNK // step) + part][:, None]
            terms = terms + (alpha1 * plane1 + alpha2 * plane2,)
    else:
        offset = _table(zero_ptr, zero_scale_ptr, entry, 1, 0, mask, EIGHT)
        basis = basis_ptr if BASIS_ROWS == 0 else basis_ptr + (n // BASIS_ROWS)[None, :] * (RANK << BITS)
        for m in tl.static_range(ROWS):
            x_sum = sums[m * (CHUNK // step) + part][:, None]
            term = -offset * x_sum
            if BITS <= 2 and not PAIRS:
                bit0 = _sum(words, xs, m, first, last, 1, BITS, entry)
                if BITS == 2:
                    bit1 = 0.5 * _sum(words, xs, m, first, last, 2, BITS, entry)
                    both = _sum(words, xs, m, first, last, "both", BITS, entry)
            for r in tl.static_range(RANK):
                values = basis + (r << BITS)
                if PAIRS:
                    total = _sum_of_pairs(words, xs, m, first, last, pairs_ptr + r * 16, entry)
                elif BITS <= 2:
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
                        total += value * xs[m * CHUNK + i][:, None]
                term += _table(scale_ptr, scale_scale_ptr, entry, RANK, r, mask, EIGHT) * total
            terms = terms + (term,)
    return terms


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
        scale = tl.load(scale_ptr + entry, mask=mask, other=0).to(tl.float32)
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
    base = words_ptr + (chunks * word_step)[:, None] + n.to(tl.int64) * row_words
    words = _words(base, chunks[:, None], mask, row_words, BITS, EVEN)
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
def _codes(ptr, n, j0, K, row_words, BITS: tl.constexpr, BJ: tl.constexpr):
    """Codes of rows n and BJ chunks from j0, in their low bits: int32 or int64 `[n, words, codes]`.

    ptr: int32, or uint8 where a word holds no whole number of codes: eight codes are BITS bytes.
    """
    if 32 % BITS == 0:
        word = j0 * BITS + tl.arange(0, BJ * BITS)
        inside = (n >= 0)[:, None] & (word < row_words)[None, :]
        fields = tl.load(ptr + n[:, None].to(tl.int64) * row_words + word[None, :], mask=inside, other=0)
        return fields[:, :, None] >> (BITS * tl.arange(0, 32 // BITS))[None, None, :]
    else:
        unit = j0 * 4 + tl.arange(0, BJ * 4)
        start = ptr + n[:, None].to(tl.int64) * (row_words * 4) + unit[None, :] * BITS
        wide: tl.constexpr = tl.int32 if BITS == 3 else tl.int64
        fields = tl.zeros(start.shape, wide)
        for byte in tl.static_range(BITS):
            inside = (n >= 0)[:, None] & (unit * BITS + byte < row_words * 4)[None, :]
            fields |= tl.load(start + byte, mask=inside, other=0).to(wide) << (8 * byte)
        return fields[:, :, None] >> (BITS * tl.arange(0, 8))[None, None, :]


@triton.jit
def _factor(codes, basis, PART: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, BASE: tl.constexpr):
    """What the inputs of a tile are multiplied by, `[n, columns]`: codes or one bit of them, plus BASE, or the values
    of a codebook's basis vector.

    PART: "code", 0 or 1 (a bit), or "basis".
    """
    if PART == "basis" and BITS <= 2:
        values = tl.where((codes & 1) != 0, basis[1], basis[0])
        if BITS == 2:
            values = tl.where((codes & 2) != 0, tl.where((codes & 1) != 0, basis[3], basis[2]), values)
        values = values.to(DTYPE)
    elif PART == "basis":
        values = tl.load(basis[0] + (codes & ((1 << BITS) - 1))).to(DTYPE)
    else:
        bits = codes & ((1 << BITS) - 1) if PART == "code" else (codes >> PART) & 1
        if BASE == 0:
            values = bits.to(tl.float32).to(DTYPE)
        else:
            values = (bits | (0x4300 if BASE == 128 else 0x6400)).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(values, [values.shape[0], values.shape[1] * values.shape[2]])


@triton.jit
def matmul(
    x_ptr,
    words_ptr,
    scale_ptr,
    scale_scale_ptr,
    zero_ptr,
    zero_scale_ptr,
    basis_ptr,
    y_ptr,
    rows,
    N,
    K,
    row_words,
    groups,
    chunks_per_program,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    RANK: tl.constexpr,
    EIGHT: tl.constexpr,
    BASIS_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BASE: tl.constexpr,
    DOT32: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
    BM: tl.constexpr,
):
    """`y[s, n, m] = sum_k w[n, k] x[m, k]` over the columns of split s, on tensor cores, summed in float32.

    The tensor cores multiply codes; their sums over a tile of BJ chunks, which lie in one group, are scaled. Codes come
    as `BASE + q`, a power of 2 whose mantissa ends in the code's bits, which takes no conversion.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(row, N - 1)
    m = tl.arange(0, BM)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BN, BM], tl.float32)
    start = tl.program_id(1) * chunks_per_program
    for j0 in range(start, min(start + chunks_per_program, tl.cdiv(K, CHUNK)), BJ):
        codes = _codes(words_ptr, n, j0, K, row_words, BITS, BJ)
        k = j0 * CHUNK + tl.arange(0, BJ * CHUNK)
        x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=(k < K)[:, None] & (m < rows)[None, :], other=0)
        x_sum = tl.sum(x.to(tl.float32), axis=0)[None, :]
        g = 0 if GROUP == 0 else j0 * CHUNK // GROUP
        entry = n * groups + g
        if KIND == "affine":
            scale = tl.load(scale_ptr + entry).to(tl.float32)
            zero = _zero_point(zero_ptr, n, g, n >= 0, groups, ZERO, BITS)
            w = _factor(codes, (), "code", BITS, DTYPE, BASE)
            acc += scale[:, None] * (_dot(w, x, DOT32) - (zero + 1.0 * BASE + scale * 0)[:, None] * x_sum)
        elif KIND == "planes" or KIND == "signs":
            alpha1 = tl.load(scale_ptr + entry).to(tl.float32)[:, None]
            alpha2 = tl.load(zero_ptr + entry).to(tl.float32)[:, None]
            plane1 = _dot(_factor(codes, (), 0, BITS, DTYPE, BASE), x, DOT32) - BASE * x_sum
            plane2 = _dot(_factor(codes, (), 1, BITS, DTYPE, BASE), x, DOT32) - BASE * x_sum
            if KIND == "signs":
                plane1 = 2 * plane1 - x_sum
                plane2 = 2 * plane2 - x_sum
            acc += alpha1 * plane1 + alpha2 * plane2
        else:
            acc -= _table(zero_ptr, zero_scale_ptr, entry, 1, 0, n >= 0, EIGHT)[:, None] * x_sum
            values = basis_ptr if BASIS_ROWS == 0 else basis_ptr + (n // BASIS_ROWS)[:, None, None] * (RANK << BITS)
            for r in tl.static_range(RANK):
                basis = (values + (r << BITS),)
                if BITS <= 2:
                    basis = ()
                    for code in tl.static_range(1 << BITS):
                        basis = basis + (tl.load(values + (r << BITS) + code),)
                scale = _table(scale_ptr, scale_scale_ptr, entry, RANK, r, n >= 0, EIGHT)[:, None]
                acc += scale * _dot(_factor(codes, basis, "basis", BITS, DTYPE, 0), x, DOT32)
    place = y_ptr + (tl.program_id(1) * N + row[:, None]) * BM + m[None, :]
    tl.store(place, acc, mask=(row < N)[:, None] & (m >= 0)[None, :])


@triton.jit
def _dot(w, x, DOT32: tl.constexpr):
    """`w x`, float32; DOT32: from float32 operands, as the interpreter needs them."""
    return tl.dot(w.to(tl.float32), x.to(tl.float32)) if DOT32 else tl.dot(w, x)
