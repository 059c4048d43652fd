"""The affine format: nearest codes by brute force, storage bit for bit, sizes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcli.algorithms.solvers import grid
from qcli.core.formats.affine import Affine, ZeroPoint
from qcli.core.weight import Format, QuantizedWeight, from_spec
from qcli.inference.linear import QuantLinear
from qcli.utils.errors import VerificationError
from tests.core.formats.checks import round_trip, rounder_agrees_with_encode

ZERO_POINTS: tuple[ZeroPoint, ...] = ("none", "integer", "float")


def quantized(format: Affine, shape: tuple[int, int], seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    codes, tables = grid.round_to_minmax(weight, format)
    return QuantizedWeight(format, shape, codes, tables)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from([-1, 1, 7, 16, 64]),
    st.sampled_from(ZERO_POINTS),
    st.tuples(st.integers(1, 12), st.integers(1, 90)),
    st.integers(0, 2**31),
)
def test_storage_round_trips_bit_for_bit(
    bits: int, group_size: int, zero_point: ZeroPoint, shape: tuple[int, int], seed: int
) -> None:
    format = Affine(bits=bits, group_size=group_size, zero_point=zero_point)
    weight = quantized(format, shape, seed)
    again = round_trip(weight)
    assert all(torch.equal(again.tables[name], table) for name, table in weight.tables.items())
    weight.check()


@pytest.mark.parametrize(("bits", "zero_point"), product((2, 3, 4), ZERO_POINTS))
def test_encode_finds_the_nearest_value(bits: int, zero_point: ZeroPoint) -> None:
    format = Affine(bits=bits, group_size=8, zero_point=zero_point)
    weight = torch.randn(5, 20, generator=torch.Generator().manual_seed(bits))
    tables = grid.minmax(weight, format)
    every = torch.stack(
        [format.decode(torch.full_like(weight, k, dtype=torch.uint8), tables) for k in range(1 << bits)]
    )
    best = (every - weight).abs().amin(0)
    chosen = (format.decode(format.encode(weight, tables), tables) - weight).abs()
    assert torch.allclose(chosen, best, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_restricted_range_never_uses_the_lowest_code(bits: int) -> None:
    """Nearest among its levels by brute force, also of weights beyond its range; column by column alike."""
    format = Affine(bits=bits, group_size=8, zero_point="none", restricted=True)
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(bits))
    tables = {name: table * 0.5 for name, table in grid.minmax(weight, format).items()}
    half = 2 ** (bits - 1) - 1
    levels = torch.arange(-half, half + 1) * tables["weight_scale"].float().repeat_interleave(8, 1)[..., None]
    nearest = (levels - weight[..., None]).abs().amin(-1)
    quantized = QuantizedWeight(format, (6, 24), format.encode(weight, tables), tables)
    torch.testing.assert_close((quantized.dense() - weight).abs(), nearest)
    rounder_agrees_with_encode(quantized, weight)
    round_trip(quantized).check()
    assert from_spec(format.spec()) == format
    assert "restricted" not in Affine(bits=bits, group_size=8, zero_point="none").spec()
    quantized.codes[0, 0] = 0
    with pytest.raises(VerificationError, match="below the restricted range"):
        quantized.check()


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_rounder_agrees_with_encode_in_any_column_order(zero_point: ZeroPoint) -> None:
    format = Affine(bits=3, group_size=8, zero_point=zero_point)
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(3))
    tables = grid.minmax(weight, format)
    rounder_agrees_with_encode(QuantizedWeight(format, (6, 20), format.encode(weight, tables), tables), weight)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 4, "group_size": 32, "zero_point": "none"}, 4 + 16 / 32),
        ({"bits": 3, "group_size": 64, "zero_point": "integer"}, 3 + (16 + 3) / 64),
        ({"bits": 4, "group_size": 32, "zero_point": "float"}, 5.0),
        ({"bits": 2, "group_size": -1, "zero_point": "none"}, 2 + 16 / 256),
    ],
)
def test_bits_per_weight_count_everything(options: dict[str, object], expected: float) -> None:
    format = from_spec({"format": "affine", **options})
    assert format.bits_per_weight((128, 256)) == pytest.approx(expected)


def test_decode_is_differentiable_in_the_tables() -> None:
    format = Affine(bits=4, group_size=8, zero_point="float")
    weight = quantized(format, (4, 16))
    tables = {name: table.double().requires_grad_() for name, table in weight.tables.items()}
    format.decode(weight.codes, tables).square().sum().backward()
    scale, zero_point = tables["weight_scale"], tables["weight_zero_point"]
    centred = format.grouped(weight.codes).double() - zero_point[..., None]
    expected = (2 * scale[..., None] * centred.square()).sum(-1)
    assert scale.grad is not None
    assert torch.allclose(scale.grad, expected.detach(), rtol=1e-5)


def test_check_rejects_invalid_weights() -> None:
    format = Affine(bits=3, group_size=8, zero_point="integer")
    good = quantized(format, (4, 16))
    scale = good.tables["weight_scale"].clone()
    scale[1, 0] = torch.inf
    with pytest.raises(VerificationError, match="weight_scale holds NaN or infinity"):
        QuantizedWeight(format, (4, 16), good.codes, {**good.tables, "weight_scale": scale}).check()
    with pytest.raises(VerificationError, match="does not fit 3 bits"):
        QuantizedWeight(format, (4, 16), good.codes + 8, good.tables).check()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"format": "nonsense"}, "unknown weight format"),
        ({"format": "affine", "bits": 9, "group_size": 64}, "bits"),
        ({"format": "affine", "bits": 4, "group_size": 64, "new": 1}, "new"),
    ],
)
def test_unknown_formats_and_fields_are_rejected(spec: dict[str, object], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        from_spec(spec)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_quant_linear_computes_with_the_decoded_weight(zero_point: ZeroPoint) -> None:
    format = Affine(bits=3, group_size=16, zero_point=zero_point)
    weight, bias = quantized(format, (24, 40)), torch.randn(24)
    layer = QuantLinear(format, 40, 24, bias)
    layer.load_state_dict({**format.to_stored(weight), "bias": bias})
    x = torch.randn(3, 5, 40)
    expected = torch.nn.functional.linear(x, weight.dense(), bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    halved = layer.to(torch.bfloat16)
    assert halved.weight_scale.dtype == torch.float16, "tables keep the precision they were stored with"
    assert halved(x.bfloat16()).dtype == torch.bfloat16


def test_formats_compare_and_hash_by_value() -> None:
    a: Format = Affine(bits=4, group_size=64)
    assert a == from_spec(a.spec())
    assert len({a, from_spec(a.spec())}) == 1
