"""The sign and dual-binary formats: nearest values by brute force, storage bit for bit, sizes."""

from __future__ import annotations

import copy
import io
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcli.core.formats.dual_binary import ALPHA1, ALPHA2, DualBinary, Levels
from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.sign import IN_SCALE, OUT_SCALE, Sign
from qcli.core.weight import Format, QuantizedWeight, from_spec
from qcli.inference.linear import QuantLinear
from qcli.utils.errors import VerificationError
from tests.core.formats.checks import (
    drawn,
    gradients_are_finite_differences,
    round_trip,
    rounder_agrees_with_encode,
)

SHAPE = (7, 40)
FORMATS: list[Format] = [
    Sign(),
    DualBinary(group_size=16),
    DualBinary(group_size=-1),
    DualBinary(group_size=16, levels="symmetric"),
]


def tables_of(format: Format, shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    out, columns = shape
    if isinstance(format, Sign):
        return {IN_SCALE: 0.3 * drawn(columns, seed=seed).half(), OUT_SCALE: 0.2 * drawn(out, 1, seed=seed + 1).half()}
    assert isinstance(format, DualBinary)
    groups = format.groups(columns)
    alphas = format.ordered(0.05 * drawn(out, groups, seed=seed), 0.05 * drawn(out, groups, seed=seed + 1))
    return dict(zip((ALPHA1, ALPHA2), (alpha.half() for alpha in alphas), strict=True))


def quantized(format: Format, shape: tuple[int, int], seed: int = 0) -> QuantizedWeight:
    tables = tables_of(format, shape, seed)
    return QuantizedWeight(format, shape, format.encode(0.05 * drawn(*shape, seed=seed + 2), tables), tables)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["sign", "fdb", "symmetric"]),
    st.sampled_from([-1, 1, 7, 64]),
    st.tuples(st.integers(1, 12), st.integers(1, 90)),
    st.integers(0, 2**31),
)
def test_storage_round_trips_bit_for_bit(kind: str, group_size: int, shape: tuple[int, int], seed: int) -> None:
    format: Format = Sign() if kind == "sign" else DualBinary.model_validate({"group_size": group_size, "levels": kind})
    weight = quantized(format, shape, seed)
    weight.check()
    round_trip(weight)
    assert from_spec(format.spec()) == format


@pytest.mark.parametrize(("format", "seed"), product(FORMATS, range(3)), ids=str)
def test_codes_are_those_of_the_nearest_level(format: Format, seed: int) -> None:
    """With sign scales of either sign, and any alphas in order."""
    weight, target = quantized(format, SHAPE, seed), 0.05 * drawn(*SHAPE, seed=seed + 2)
    levels = torch.stack(
        [format.decode(torch.full(SHAPE, code, dtype=torch.uint8), weight.tables) for code in range(1 << format.bits)]
    )
    torch.testing.assert_close((weight.dense() - target).abs(), (levels - target).abs().amin(0), rtol=0, atol=1e-7)
    distance = (levels - weight.dense()).abs()
    distance.scatter_(0, weight.codes.long()[None], torch.inf)
    torch.testing.assert_close(format.step_sizes(weight.codes, weight.tables), distance.amin(0))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rounder_agrees_with_encode_in_any_column_order(format: Format) -> None:
    weight, target = quantized(format, SHAPE), 0.05 * drawn(*SHAPE, seed=2)
    rounder_agrees_with_encode(weight, target)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_decode_is_differentiable_and_works_on_row_slices(format: Format) -> None:
    weight = quantized(format, SHAPE)
    gradients_are_finite_differences(weight)
    tile = slice(2, 5)
    assert torch.equal(format.decode(weight.codes[tile], format.slice_rows(weight.tables, tile)), weight.dense()[tile])


@pytest.mark.parametrize("levels", ["fdb", "symmetric"])
def test_rounded_alphas_are_in_order(levels: Levels) -> None:
    format = DualBinary(group_size=16, levels=levels)
    weight = quantized(format, SHAPE)
    floats = {
        name: table + 0.1 * drawn(*table.shape, seed=3) for name, table in format.float_tables(weight.tables).items()
    }
    floats[ALPHA2][0, 0] = 0
    moved = QuantizedWeight(format, SHAPE, weight.codes, format.round_tables(floats, weight.tables))
    moved.check()
    ordered = format.entries(moved.tables).sort(dim=-1).values
    assert bool((ordered.diff(dim=-1) > 0).all())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quant_linear_computes_with_the_decoded_weight(format: Format) -> None:
    weight = quantized(format, SHAPE)
    layer = QuantLinear(format, SHAPE[1], SHAPE[0])
    for name, tensor in format.to_stored(weight).items():
        getattr(layer, name).copy_(tensor)
    x = drawn(4, SHAPE[1], seed=6)
    torch.testing.assert_close(layer(x), x @ weight.dense().T)


def test_sign_layers_scale_a_sign_matrix() -> None:
    """`Y = ((X g) sign(W)^T) h`, and the sign of 0 is +1."""
    weight, x = quantized(Sign(), SHAPE), drawn(4, SHAPE[1], seed=6)
    signs, scales = 2 * weight.codes.float() - 1, {name: table.float() for name, table in weight.tables.items()}
    torch.testing.assert_close(x @ weight.dense().T, (x * scales[IN_SCALE]) @ signs.T * scales[OUT_SCALE][:, 0])
    positive = {name: table.abs() for name, table in weight.tables.items()}
    assert Sign().encode(torch.zeros(SHAPE), positive).min() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("after", [True, False])
def test_output_norm_is_that_of_the_paper(after: bool, biased: bool, dtype: torch.dtype) -> None:
    """`LN(((X g) sign(W)^T) h) + b` in float64, or `+ b` inside in checkpoints without `bias_after_norm`; the norm
    costs no bits and survives copying the layer."""
    format = from_spec(
        {"format": "sign", "bits": 1, "output_norm": True} | ({"bias_after_norm": True} if after else {})
    )
    assert isinstance(format, Sign)
    target, x = drawn(*SHAPE, seed=2), 3 * drawn(2, 4, SHAPE[1], seed=6).to(dtype)
    bias, tables = drawn(SHAPE[0], seed=5) if biased else None, tables_of(format, SHAPE, 0)
    tables = {name: table.abs() for name, table in tables.items()}
    layer = QuantLinear(format, SHAPE[1], SHAPE[0], bias)
    weight = QuantizedWeight(format, SHAPE, format.encode(target, tables), tables)
    for name, tensor in format.to_stored(weight).items():
        getattr(layer, name).copy_(tensor)
    g, h = tables[IN_SCALE].double(), tables[OUT_SCALE].double()[:, 0]
    y = ((x.double() * g) @ target.double().sign().T) * h
    added = torch.zeros(SHAPE[0]).double() if bias is None else bias.double()
    y = y if after else y + added
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = y + added if after else y
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for same in (layer, copy.deepcopy(layer), torch.load(stored, weights_only=False)):
        assert same(x).dtype == dtype
        torch.testing.assert_close(same(x).double(), y, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)
    assert format.bits_per_weight(SHAPE) == Sign().bits_per_weight(SHAPE)


def test_a_bias_after_the_norm_is_trainable_and_kept_when_a_forward_pass_fails() -> None:
    layer = torch.nn.Linear(SHAPE[1], SHAPE[0])
    Sign(output_norm=True, bias_after_norm=True).attach(layer)
    bias, x = layer.bias, drawn(3, SHAPE[1], seed=6)
    with pytest.raises(RuntimeError):
        layer(x[:, :-1])
    assert layer.bias is bias
    layer(x).sum().backward()
    assert layer.bias is bias
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full(SHAPE[:1], 3.0))


def test_specs_without_output_norm_have_none() -> None:
    assert from_spec({"format": "sign", "bits": 1}) == Sign()
    assert not Sign().has_output_norm
    assert "bias_after_norm" not in Sign().spec()
    normed = Sign(output_norm=True, bias_after_norm=True)
    assert from_spec(normed.spec()) == normed
    assert LowRank.around(normed, 2, 8).has_output_norm
    assert LowRank.around(normed, 2, 8).adds_bias_after_norm
    assert not LowRank.around(Sign(), 2, 8).has_output_norm


def test_bits_per_weight() -> None:
    assert Sign().bits_per_weight((1024, 512)) == pytest.approx(1 + 16 / 512 + 16 / 1024)
    assert DualBinary(group_size=64).bits_per_weight((1024, 512)) == 2.5


def test_check_rejects_invalid_weights() -> None:
    format = DualBinary(group_size=16)
    good = quantized(format, SHAPE)
    swapped = {ALPHA1: -good.tables[ALPHA2], ALPHA2: -good.tables[ALPHA1]}
    with pytest.raises(VerificationError, match="out of order"):
        QuantizedWeight(format, SHAPE, good.codes, swapped).check()
    with pytest.raises(VerificationError, match="does not fit 2 bits"):
        QuantizedWeight(format, SHAPE, good.codes + 4, good.tables).check()
    sign = quantized(Sign(), SHAPE)
    with pytest.raises(VerificationError, match="in_scale is"):
        QuantizedWeight(Sign(), SHAPE, sign.codes, {**sign.tables, IN_SCALE: sign.tables[IN_SCALE][:3]}).check()
    with pytest.raises(VerificationError, match="does not fit 1 bit"):
        QuantizedWeight(Sign(), SHAPE, sign.codes + 1, sign.tables).check()
