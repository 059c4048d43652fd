"""Formats with a low-rank term: nearest codes by brute force, storage bit for bit, validation."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qcli.algorithms.solvers import grid
from qcli.algorithms.solvers.dual_binary import published
from qcli.core.formats.affine import Affine, ZeroPoint
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.low_rank import FactorBits, LowRank
from qcli.core.weight import QuantizedWeight, from_spec
from qcli.inference.backends import reference
from qcli.inference.linear import QuantLinear
from qcli.utils.errors import VerificationError

FACTOR_BITS: tuple[FactorBits, ...] = (8, 16)
ZERO_POINTS: tuple[ZeroPoint, ...] = ("none", "integer", "float")
BASE = {"format": "affine", "bits": 3, "group_size": 16, "zero_point": "integer"}
SPEC = {"format": "low-rank", "bits": 3, "rank": 2, "factor_bits": 8, "base": BASE}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(format: LowRank, shape: tuple[int, int]) -> QuantizedWeight:
    assert isinstance(format.base, Affine)
    codes, tables = grid.round_to_minmax(drawn(*shape), format.base)
    factors = format.round_factor("a", drawn(shape[0], format.rank, seed=1) * 0.2)
    factors |= format.round_factor("b", drawn(format.rank, shape[1], seed=2) * 0.2)
    return format.wrap(QuantizedWeight(format.base, shape, codes, tables), factors)


def low_rank(bits: int = 3, zero_point: ZeroPoint = "integer", factor_bits: FactorBits = 8, rank: int = 2) -> LowRank:
    return LowRank.around(Affine(bits=bits, group_size=16, zero_point=zero_point), rank, factor_bits)


@pytest.mark.parametrize(("bits", "zero_point", "factor_bits"), product((2, 3, 8), ZERO_POINTS, FACTOR_BITS))
def test_storage_round_trips_bit_for_bit(bits: int, zero_point: ZeroPoint, factor_bits: FactorBits) -> None:
    format = low_rank(bits, zero_point, factor_bits)
    weight = weight_of(format, (12, 40))
    weight.check()
    stored = format.to_stored(weight)
    assert {name: (t.torch_dtype, t.shape) for name, t in format.stored((12, 40)).items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in stored.items()
    }
    again = format.from_stored(stored, (12, 40))
    assert torch.equal(again.codes, weight.codes)
    assert again.tables.keys() == weight.tables.keys()
    assert all(torch.equal(again.tables[name], table) for name, table in weight.tables.items())
    assert torch.equal(again.dense(), weight.dense())
    base = format.base.decode(weight.codes, weight.tables)
    torch.testing.assert_close(
        again.dense() - base, format.factor("a", again.tables) @ format.factor("b", again.tables)
    )


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_encode_finds_the_nearest_value(zero_point: ZeroPoint) -> None:
    format = low_rank(2, zero_point)
    tables, target = weight_of(format, (5, 20)).tables, drawn(5, 20, seed=3)
    every = torch.stack([format.decode(torch.full((5, 20), k, dtype=torch.uint8), tables) for k in range(4)])
    chosen = format.decode(format.encode(target, tables), tables)
    torch.testing.assert_close((chosen - target).abs(), (every - target).abs().amin(0))


@pytest.mark.parametrize(("factor_bits", "scales"), [(8, 2 * 16), (16, 0)])
def test_bits_per_weight_count_the_factors(factor_bits: FactorBits, scales: int) -> None:
    rank, rows, columns = 8, 128, 256
    format = LowRank.around(Affine(bits=3, group_size=64, zero_point="integer"), rank, factor_bits)
    added = (factor_bits * rank * (rows + columns) + scales * rank) / (rows * columns)
    assert format.bits_per_weight((rows, columns)) == pytest.approx(3 + 19 / 64 + added)


@pytest.mark.parametrize("factor_bits", FACTOR_BITS)
def test_factors_are_rounded_to_the_nearest(factor_bits: FactorBits) -> None:
    format = low_rank(factor_bits=factor_bits, rank=4)
    values = drawn(30, 4) * torch.tensor([1.0, 1e-4, 0.0, 50.0])  # directions of different magnitudes
    for which, factor in (("a", values), ("b", values.T)):
        tables = format.round_factor("a" if which == "a" else "b", factor)
        decoded = format.factor("a" if which == "a" else "b", tables)
        along = 0 if which == "a" else 1
        step = factor.abs().amax(along, keepdim=True) / 127 if factor_bits == 8 else factor.abs() * 2**-10
        assert bool(((decoded - factor).abs() <= 0.501 * step + 2.0**-24).all())


@pytest.mark.parametrize(("zero_point", "factor_bits", "tile"), product(ZERO_POINTS, FACTOR_BITS, (1 << 20, 40 * 7)))
def test_quant_linear_computes_with_the_decoded_weight(
    zero_point: ZeroPoint, factor_bits: FactorBits, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_TILE", tile)
    format = low_rank(zero_point=zero_point, factor_bits=factor_bits)
    weight, bias, x = weight_of(format, (24, 40)), drawn(24, seed=5), drawn(3, 5, 40, seed=6)
    layer = QuantLinear(format, 40, 24, bias)
    layer.load_state_dict({**format.to_stored(weight), "bias": bias})
    torch.testing.assert_close(layer(x), F.linear(x, weight.dense(), bias), rtol=1e-5, atol=1e-5)
    halved = layer.to(torch.bfloat16)
    assert {name: table.dtype for name, table in halved.named_buffers()} == {
        name: stored.torch_dtype for name, stored in format.stored((24, 40)).items()
    }
    assert halved(x.bfloat16()).dtype == torch.bfloat16


def test_row_slices_decode_the_same() -> None:
    format = low_rank()
    weight = weight_of(format, (24, 40))
    rows = slice(5, 18)
    tile = format.decode(weight.codes[rows], format.slice_rows(weight.tables, rows))
    torch.testing.assert_close(tile, weight.dense()[rows])


def test_facts_are_those_of_the_base() -> None:
    base = DualBinary(group_size=16)
    plain = QuantizedWeight(
        base, (12, 40), base.encode(drawn(12, 40), tables := published(drawn(12, 40), base)), tables
    )
    format = LowRank.around(base, 2, 8)
    factors = format.round_factor("a", drawn(12, 2)) | format.round_factor("b", drawn(2, 40))
    wrapped = format.wrap(plain, factors)
    assert format.facts(wrapped) == base.facts(plain) != {}


def test_decode_is_differentiable_in_the_factors() -> None:
    format = low_rank(factor_bits=16)
    weight = weight_of(format, (12, 40))
    tables = {
        name: table.float().requires_grad_() if table.is_floating_point() else table
        for name, table in weight.tables.items()
    }
    seen = drawn(12, 40, seed=7)
    (format.decode(weight.codes, tables) * seen).sum().backward()
    torch.testing.assert_close(tables["lowrank_a"].grad, (seen @ tables["lowrank_b"].T).detach())
    torch.testing.assert_close(tables["lowrank_b"].grad, (tables["lowrank_a"].T @ seen).detach())
    assert tables["weight_scale"].grad is not None


def test_specs_survive_json() -> None:
    format = from_spec(SPEC)
    assert format.spec() == SPEC
    assert format == low_rank() == from_spec(json.loads(json.dumps(format.spec())))
    assert len({format, low_rank(), low_rank(rank=3), low_rank(factor_bits=16), low_rank(zero_point="float")}) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, "bits is 4, its base has 3"),
        ({"rank": 0}, "rank"),
        ({"factor_bits": 4}, "factor_bits"),
        ({"scale": 1}, "scale"),
        ({"base": None}, "base"),
        ({"base": {**BASE, "format": "fractal"}}, "unknown weight format 'fractal'"),
        ({"base": {**BASE, "group": 3}}, "bad affine format in quantization_config: group"),
        ({"base": SPEC}, "cannot be the base of another"),
    ],
)
def test_invalid_specs_are_rejected(change: dict[str, object], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        from_spec({**SPEC, **change})


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("lowrank_a_scale", lambda t: t * torch.inf, "lowrank_a_scale holds NaN or infinity"),
        ("lowrank_a", lambda t: t.float(), "lowrank_a is torch.float32"),
        ("lowrank_b", lambda t: t[:, 1:], "lowrank_b is torch.int8 \\[2, 39\\]"),
        ("weight_scale", lambda t: t * torch.nan, "weight_scale holds NaN or infinity"),
    ],
)
def test_check_rejects_invalid_weights(name: str, spoil: object, message: str) -> None:
    format = low_rank()
    good = weight_of(format, (12, 40))
    assert callable(spoil)
    with pytest.raises(VerificationError, match=message):
        QuantizedWeight(format, (12, 40), good.codes, {**good.tables, name: spoil(good.tables[name])}).check()
