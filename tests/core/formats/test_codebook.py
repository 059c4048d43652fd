"""The codebook format: nearest entries by brute force, storage bit for bit, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcli.algorithms.solvers import grid
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import BASIS, OFFSET, SCALE, SCALE_BLOCK, Codebook, TableBits
from qcli.core.weight import QuantizedWeight, from_spec
from qcli.inference.linear import QuantLinear
from qcli.utils.errors import VerificationError
from tests.core.formats.checks import (
    drawn,
    gradients_are_finite_differences,
    round_trip,
    rounder_agrees_with_encode,
)


def tables_of(format: Codebook, shape: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """A weight whose codebooks are near a ramp, with entries out of order where the rank allows it."""
    out, groups, entries = shape[0], format.groups(shape[1]), 1 << format.bits
    blocks = format.stored(shape)[BASIS].shape[0]
    basis = torch.linspace(-1, 1, entries).repeat(blocks, format.rank, 1)
    basis += 0.3 * drawn(blocks, format.rank, entries, seed=seed)
    scale = 0.05 * drawn(out, groups, format.rank, seed=seed + 1)
    offset = 0.02 * drawn(out, groups, seed=seed + 2)
    tables = {BASIS: basis.half()}
    if format.table_bits == 16:
        return tables | {SCALE: scale.half(), OFFSET: offset.half()}
    return tables | format.round_table(SCALE, scale) | format.round_table(OFFSET, offset)


def quantized(format: Codebook, shape: tuple[int, int], seed: int = 0) -> QuantizedWeight:
    tables = tables_of(format, shape, seed)
    return QuantizedWeight(format, shape, format.encode(0.05 * drawn(*shape, seed=seed + 3), tables), tables)


def by_hand(format: Codebook, tables: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Reference: the codebook of every weight, `[out, in, K]`, from the stored tables by definition."""
    out, groups = shape[0], format.groups(shape[1])
    books = torch.empty(*shape, 1 << format.bits)
    for row in range(out):
        for column in range(shape[1]):
            group = column // format.group_width(shape[1])
            place = (row * groups + group) // SCALE_BLOCK
            scale, offset = tables[SCALE][row, group].float(), tables[OFFSET][row, group].float()
            if format.table_bits == 8:
                scale = scale * tables[f"{SCALE}_scale"][place].float()
                offset = offset * tables[f"{OFFSET}_scale"][place].float()
            basis = tables[BASIS][row // format.basis_rows if format.basis_rows else 0].float()
            books[row, column] = (scale[:, None] * basis).sum(0) - offset
    return books


FORMATS = [
    Codebook(bits=2, group_size=8, rank=1, table_bits=16),
    Codebook(bits=2, group_size=8, rank=2, table_bits=8),
    Codebook(bits=3, group_size=7, rank=3, table_bits=8, basis_rows=4),
    Codebook(bits=4, group_size=-1, rank=2, table_bits=16, basis_rows=3),
    Codebook(bits=5, group_size=16, rank=2, table_bits=8, basis_rows=1),
]
SHAPE = (10, 20)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.sampled_from([-1, 1, 7, 16, 64]),
    st.integers(1, 4),
    st.sampled_from([8, 16]),
    st.sampled_from([0, 1, 5]),
    st.tuples(st.integers(1, 12), st.integers(1, 90)),
    st.integers(0, 2**31),
)
def test_storage_round_trips_bit_for_bit(
    bits: int,
    group_size: int,
    rank: int,
    table_bits: TableBits,
    basis_rows: int,
    shape: tuple[int, int],
    seed: int,
) -> None:
    format = Codebook(bits=bits, group_size=group_size, rank=rank, table_bits=table_bits, basis_rows=basis_rows)
    weight = quantized(format, shape, seed)
    weight.check()
    round_trip(weight)
    assert from_spec(format.spec()) == format


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_are_those_of_the_nearest_entries(format: Codebook) -> None:
    weight = quantized(format, SHAPE)
    books = by_hand(format, dict(weight.tables), SHAPE)
    target = 0.05 * drawn(*SHAPE, seed=3)
    torch.testing.assert_close(weight.dense(), books.gather(2, weight.codes.long()[..., None])[..., 0])
    least = (books - target[..., None]).abs().amin(-1)
    torch.testing.assert_close((weight.dense() - target).abs(), least, rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rounder_agrees_with_encode_in_any_column_order(format: Codebook) -> None:
    weight, target = quantized(format, SHAPE), 0.05 * drawn(*SHAPE, seed=3)
    rounder_agrees_with_encode(weight, target)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_row_slices_and_float_tables_decode_the_same(format: Codebook) -> None:
    weight = quantized(format, SHAPE)
    floats = format.float_tables(weight.tables)
    assert torch.equal(format.decode(weight.codes, floats), weight.dense())
    rounded = format.round_tables(floats, weight.tables)
    assert all(torch.equal(rounded[name], table) for name, table in weight.tables.items())
    for tile in (slice(0, 1), slice(3, 8), slice(4, 10)):
        assert torch.equal(
            format.decode(weight.codes[tile], format.slice_rows(weight.tables, tile)), weight.dense()[tile]
        )


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradients_are_finite_differences(format: Codebook) -> None:
    """`dL/dV = S dL/dC`, `dL/dS = V (dL/dC)^T`, `dL/dbeta = -sum dL/dC`, `dL/dC` scattered from the weights."""
    gradients_are_finite_differences(quantized(format, SHAPE))


def test_table_units_are_half_the_range_of_a_codebook() -> None:
    """A change of one unit moves the entries by at most half their codebook's range, and one by all of it."""
    format = FORMATS[1]
    floats = format.float_tables(quantized(format, SHAPE).tables)
    entries, units = format.entries(floats), format.table_units(floats)
    half = (entries.amax(-1) - entries.amin(-1)) / 2
    assert torch.equal(units[OFFSET], half.clamp(min=0.1 * float(half.mean())))
    moved = format.entries(floats | {SCALE: floats[SCALE] + units[SCALE] * torch.tensor([1.0, 0.0])})
    torch.testing.assert_close((moved - entries).abs().amax(-1), units[OFFSET])


@pytest.mark.parametrize("zero_point", ["integer", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rank_one_with_a_ramp_is_asymmetric_rounding(bits: int, zero_point: str) -> None:
    affine = Affine.model_validate({"bits": bits, "group_size": 16, "zero_point": zero_point})
    weight = 0.05 * drawn(*SHAPE)
    codes, tables = grid.round_to_minmax(weight, affine)
    format = Codebook(bits=bits, group_size=16, rank=1, table_bits=16)
    scale, zero = tables["weight_scale"].float(), tables["weight_zero_point"].float()
    ramp = torch.arange(1 << bits, dtype=torch.float32).view(1, 1, -1)
    same = {BASIS: ramp, SCALE: scale[..., None], OFFSET: scale * zero}
    assert torch.equal(format.encode(weight, same), codes)
    torch.testing.assert_close(format.decode(codes, same), affine.decode(codes, tables), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("bits", "group_size", "rank", "table_bits", "expected"),
    [(2, 128, 1, 16, 2.25), (2, 128, 2, 8, 2.19), (2, 128, 4, 8, 2.31)],
)
def test_bits_per_weight(bits: int, group_size: int, rank: int, table_bits: TableBits, expected: float) -> None:
    format, shape = Codebook(bits=bits, group_size=group_size, rank=rank, table_bits=table_bits), (4096, 4096)
    actual = format.bits_per_weight(shape)
    assert round(actual, 2) == expected
    exact = bits + (rank + 1) * table_bits / group_size + 16 * rank * 2**bits / 4096**2
    shared = 16 * (rank + 1) / (SCALE_BLOCK * group_size) if table_bits == 8 else 0
    assert actual == pytest.approx(exact + shared, abs=1e-12)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quant_linear_computes_with_the_decoded_weight(format: Codebook) -> None:
    weight = quantized(format, SHAPE)
    layer = QuantLinear(format, SHAPE[1], SHAPE[0])
    for name, tensor in format.to_stored(weight).items():
        getattr(layer, name).copy_(tensor)
    x = drawn(4, SHAPE[1], seed=6)
    torch.testing.assert_close(layer(x), x @ weight.dense().T)


def test_check_rejects_invalid_weights() -> None:
    format = FORMATS[1]
    good = quantized(format, SHAPE)
    for name, spoilt, message in (
        (f"{SCALE}_scale", torch.full_like(good.tables[f"{SCALE}_scale"], torch.nan), "NaN or infinity"),
        (OFFSET, good.tables[OFFSET].half(), "codebook_offset is torch.float16"),
        (BASIS, good.tables[BASIS][:, :1], "codebook_basis is"),
    ):
        with pytest.raises(VerificationError, match=message):
            QuantizedWeight(format, SHAPE, good.codes, {**good.tables, name: spoilt}).check()
    with pytest.raises(VerificationError, match="does not fit 2 bits"):
        QuantizedWeight(format, SHAPE, good.codes + 4, good.tables).check()
