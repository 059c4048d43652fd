"""Parts of weights: rows and columns of a layer, as a layer of their own."""

from __future__ import annotations

import pytest
import torch

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.methods.fp8 import ToFP8
from qcli.algorithms.methods.nvfp4 import ToNVFP4
from qcli.core import packing
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import BASIS, OFFSET, SCALE, Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.fp8 import FP8
from qcli.core.formats.full_precision import FullPrecision
from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.nvfp4 import NVFP4
from qcli.core.formats.row_scaled import EXPONENT, RowScaled
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format, QuantizedWeight
from qcli.utils.errors import UnsupportedError
from tests.inference.weights import random_weight

EIGHT = Codebook(bits=2, group_size=16, rank=2, table_bits=8, basis_rows=12)
FORMATS: list[Format] = [
    Affine(bits=3, group_size=16),
    Affine(bits=4, group_size=32, zero_point="none"),
    Affine(bits=5, group_size=-1, zero_point="float"),
    Codebook(bits=3, group_size=16, rank=1, table_bits=16),
    Codebook(bits=2, group_size=16, rank=2, table_bits=16, basis_rows=12),
    Codebook(bits=2, group_size=-1, rank=1, table_bits=8),
    EIGHT,
    DualBinary(group_size=16),
    DualBinary(group_size=32, levels="symmetric"),
    Sign(),
    LowRank.around(Affine(bits=2, group_size=16), 3, 8),
    LowRank.around(EIGHT, 3, 16),
    RowScaled.around(EIGHT),
    FullPrecision.of("BF16"),
    FP8(),
    NVFP4(),
]
SHAPE = (96, 160)
PARTS = [
    (slice(0, 48), slice(0, 160)),
    (slice(56, 84), slice(0, 160)),
    (slice(0, 96), slice(32, 96)),
    (slice(32, 64), slice(64, 160)),
]


def weight_in(format: Format) -> QuantizedWeight:
    if isinstance(format, FullPrecision):
        return format.hold(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    if isinstance(format, FP8 | NVFP4):
        method = ToFP8() if isinstance(format, FP8) else ToNVFP4()
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        return method.quantize(LinearGroup({"w": drawn}))["w"].weight
    if isinstance(format, RowScaled):
        return format.wrap(random_weight(format.base, SHAPE), (torch.arange(SHAPE[0]) % 9 - 4).to(torch.int8))
    return random_weight(format, SHAPE)


@pytest.mark.parametrize("rows, columns", PARTS, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_parts_decode_to_the_same_values(format: Format, rows: slice, columns: slice) -> None:
    weight = weight_in(format)
    part_format, tables = format.cut(weight.tables, rows, columns)
    codes = weight.codes[rows, columns]
    part = QuantizedWeight(part_format, (codes.shape[0], codes.shape[1]), codes.contiguous(), tables)
    part.check()
    stored = part_format.to_stored(part)
    expected = part_format.stored(part.shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        name: (tensor.shape, tensor.torch_dtype) for name, tensor in expected.items()
    }
    again = part_format.from_stored(stored, part.shape).dense()
    torch.testing.assert_close(again, weight.dense()[rows, columns], rtol=1e-6, atol=1e-6)


def test_blocks_of_scales_that_survive_keep_8_bits() -> None:
    weight = random_weight(Codebook(bits=2, group_size=16, rank=1, table_bits=8), (512, 128))
    format, tables = weight.format.cut(weight.tables, slice(256, 512), slice(0, 128))
    assert format == weight.format
    assert torch.equal(tables[f"{SCALE}_scale"], weight.tables[f"{SCALE}_scale"][8:])


def test_others_become_16_bit_tables_without_rounding() -> None:
    weight = weight_in(EIGHT)
    format, tables = EIGHT.cut(weight.tables, slice(0, 96), slice(0, 80))
    assert isinstance(format, Codebook) and (format.rank, format.table_bits, format.basis_rows) == (5, 16, 12)
    floats = EIGHT.float_tables(weight.tables)
    high, low, offset_low = tables[SCALE].double().split([2, 2, 1], -1)
    assert torch.equal(high + low, floats[SCALE][:, :5].double())
    assert torch.equal(tables[OFFSET].double() + offset_low[..., 0], floats[OFFSET][:, :5].double())
    assert float(low.abs().max()) > 0


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    tables = dict(weight_in(EIGHT).tables)
    tables[f"{OFFSET}_scale"] = torch.full_like(tables[f"{OFFSET}_scale"], 6e4)
    with pytest.raises(UnsupportedError, match="largest float16"):
        EIGHT.cut(tables, slice(0, 96), slice(0, 80))


def test_parts_are_views_where_they_can_be() -> None:
    weight = weight_in(RowScaled.around(Affine(bits=3, group_size=16)))
    _, tables = weight.format.cut(weight.tables, slice(48, 96), slice(0, 160))
    assert tables[EXPONENT].untyped_storage().data_ptr() == weight.tables[EXPONENT].untyped_storage().data_ptr()


def test_basis_vectors_follow_their_rows() -> None:
    weight = weight_in(Codebook(bits=2, group_size=16, rank=2, table_bits=16, basis_rows=12))
    format, tables = weight.format.cut(weight.tables, slice(24, 48), slice(0, 160))
    assert format == weight.format and torch.equal(tables[BASIS], weight.tables[BASIS][2:4])


@pytest.mark.parametrize("bits", range(1, 9))
def test_columns_of_packed_rows(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (7, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    cut = packing.cut_columns(packing.pack_bits(codes, bits), bits, 50, slice(13, 45))
    assert torch.equal(cut, packing.pack_bits(codes[:, 13:45].contiguous(), bits))
