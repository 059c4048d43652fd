"""Packing against Python integers: the bit stream of a row is one little-endian number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcli.core.packing import pack_bits, unpack_bits, words_per_row


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 140), st.integers(0, 2**31))
def test_pack_is_the_little_endian_bit_stream(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words_per_row(columns, bits))
    for row, words in zip(codes.tolist(), packed.numpy(), strict=True):
        stream = sum(code << (index * bits) for index, code in enumerate(row))
        assert int.from_bytes(words.tobytes(), "little") == stream
    assert torch.equal(unpack_bits(packed, bits, columns), codes)


def test_several_tiles_of_rows_round_trip() -> None:
    codes = random_codes(3000, 400, 3, 0)
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, 400), codes)


def test_strided_codes_pack_like_contiguous_ones() -> None:
    codes = random_codes(40, 24, 5, 1)
    assert torch.equal(pack_bits(codes.T, 5), pack_bits(codes.T.contiguous(), 5))


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_per_row_wastes_less_than_a_word(bits: int) -> None:
    for columns in range(1, 100):
        assert 0 <= 32 * words_per_row(columns, bits) - columns * bits < 32
