"""The tensors on disk, read inside the kernels as they are.

A row's codes are a dense bit stream, so 32 codes of any width are `bits` whole words: a chunk. Threads own chunks, and
code i of a chunk lies at the same place in every one. Sums over a chunk's codes need no shuffles, scales are applied
once for each chunk, and the columns may be taken in the order (i, chunk), in which all accesses are coalesced.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _words_at_once(count):
    """Words that one load takes: up to 16 bytes."""
    return 4 if count % 4 == 0 else 2 if count % 2 == 0 else 1


@triton.jit
def words(base, first, mask, row_words, COUNT: tl.constexpr, EVEN: tl.constexpr):
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
def place(words, i: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr):
    """Words that hold code i in their low TOP bits; `shift` says where."""
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
def shift(i, bits, top):
    """Where code i starts in the words of `place`."""
    s = i * bits % 32
    step = s % bits + (top - s % bits) // bits * bits
    return 0 if s + bits > 32 else s if s < step else s - step


@triton.jit
def code(words, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of each chunk, int32."""
    return (place(words, i, BITS, 31) >> shift(i, BITS, 31)) & ((1 << BITS) - 1)


@triton.jit
def zero_point(ptr, n, g, mask, groups, ZERO: tl.constexpr, BITS: tl.constexpr):
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
def scale(ptr, entry, mask, ZERO: tl.constexpr):
    """Scales of an affine grid, float32; signs lie on either side of "half", a step of twice their magnitude apart."""
    scale = tl.load(ptr + entry, mask=mask, other=0).to(tl.float32)
    return 2 * scale if ZERO == "half" else scale


@triton.jit
def table(ptr, scale_ptr, entry, step: tl.constexpr, r: tl.constexpr, mask, EIGHT: tl.constexpr):
    """Entries of a table with `step` values each, the r-th of them; 8-bit ones with a scale for each 256 entries."""
    value = tl.load(ptr + entry * step + r, mask=mask, other=0).to(tl.float32)
    if EIGHT:
        value *= tl.load(scale_ptr + entry // 256 * step + r, mask=mask, other=0).to(tl.float32)
    return value
