"""Few rows of inputs by packed weights, which are never expanded.

A code masked out of its word, `q << s`, is taken as a float32: the denormal `q 2**(s - 149)`, which the chip multiplies
at full speed. The input that it meets has been multiplied by `2**(90 - s)`, so a weight costs one logical operation and
one fused multiplication and addition in place of shift, mask, conversion and addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcli.inference.cuda import stored

_UP = tl.constexpr(90)  # exponent that lifts denormals: inputs may be as large as 2**37 and as small as 2**-67


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


@triton.jit
def _sum(words, xs, first: tl.constexpr, last: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr, like):
    """`sum_i part(q_i) x_i` over codes first..last-1 of each span.

    PART: the mask of bits taken, in place; or "both", bit 0 and bit 1 (of 2-bit codes)."""
    total = tl.zeros(like.shape, tl.float32)
    for i in tl.static_range(first, last):
        word = stored.place(words, i, BITS, 23)
        if PART == "both":
            bits = word & (word >> 1) & (1 << stored.shift(i, BITS, 23))
        else:
            bits = word & (PART << stored.shift(i, BITS, 23))
        x = xs[i] * (2.0 ** (_UP - stored.shift(i, BITS, 23)))
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
    words = stored.words(base, first[:, None], mask, row_words, SPAN * BITS // 32, EVEN)  # first: they take the longest
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
        scale = stored.scale(scale_ptr, entry, mask, ZERO)
        zero = stored.zero_point(zero_ptr, n[None, :], g[:, None], mask, groups, ZERO, BITS)
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
        term = -stored.table(zero_ptr, zero_scale_ptr, entry, 1, 0, mask, EIGHT) * x_sum
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
                    value = tl.load(values + stored.code(words, i, BITS)).to(tl.float32)
                    total += value * xs[i][:, None]
            term += stored.table(scale_ptr, scale_scale_ptr, entry, RANK, r, mask, EIGHT) * total
    return term
