"""Simulated activation quantization against a scalar reference."""

from __future__ import annotations

import copy
import io
from itertools import product
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qcli.core.activations import Activations

Granularity = Literal["token", "block"]
GRANULARITIES: tuple[Granularity, ...] = ("token", "block")
EVERY = [
    Activations(bits=bits, granularity=granularity, block_size=16, symmetric=symmetric)
    for bits, granularity, symmetric in product((4, 5, 8), GRANULARITIES, (True, False))
]
EVERY += [
    Activations(bits=bits, granularity=granularity, block_size=16, symmetric=True, symmetric_range="restricted")
    for bits, granularity in product((4, 8), GRANULARITIES)
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(values: list[float], activations: Activations) -> list[float]:
    """Reference: one range of one token, value by value."""
    low, high, codes = min(0.0, *values), max(0.0, *values), 2**activations.bits
    if activations.symmetric_range == "restricted":
        codes -= 1
        scale, first = max(high, -low) / (codes // 2), -(codes // 2)
    elif activations.symmetric:
        scale, first = (high if high > -low else low) / -(codes // 2), -(codes // 2)
    else:
        scale = (high - low) / (codes - 1)
        first = round(low / scale) if scale else 0
    return [min(max(round(value / scale), first), first + codes - 1) * scale if scale else 0.0 for value in values]


@pytest.mark.parametrize("activations", EVERY, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "positive", "negative"])
def test_values_agree_with_the_scalar_reference(activations: Activations, kind: str) -> None:
    """40 channels in blocks of 16: the last block is shorter."""
    x = drawn(2, 3, 40) * torch.tensor([0.1, 1.0, 30.0])[:, None]
    x = {"mixed": x, "positive": x.abs() + 1, "negative": -x.abs()}[kind]
    width = 16 if activations.granularity == "block" else 40
    expected = [
        [value for start in range(0, 40, width) for value in by_hand(token[start : start + width], activations)]
        for token in x.double().flatten(0, 1).tolist()
    ]
    rounded = activations.fake_quantize(x)
    torch.testing.assert_close(rounded, torch.tensor(expected).view(2, 3, 40), rtol=1e-5, atol=1e-6)
    assert rounded.shape == x.shape


@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_lose_little_and_four_bits_lose_more(symmetric: bool) -> None:
    x = drawn(50, 256)
    lost = {
        (bits, granularity): float(
            (Activations(bits=bits, granularity=granularity, block_size=32, symmetric=symmetric).fake_quantize(x) - x)
            .square()
            .mean()
        )
        for bits in (4, 6, 8)
        for granularity in GRANULARITIES
    }
    assert lost[8, "token"] < 1e-3 < 5e-3 < lost[4, "token"]
    assert lost[8, "token"] < lost[6, "token"] < lost[4, "token"]
    assert all(lost[bits, "block"] < lost[bits, "token"] for bits in (4, 6, 8))


@pytest.mark.parametrize("activations", EVERY, ids=str)
def test_zeros_ends_and_tiny_values_are_kept(activations: Activations) -> None:
    x = drawn(4, 40)
    x[:, ::3] = 0
    x[1] = 0
    rounded = activations.fake_quantize(x)
    assert bool((rounded[x == 0] == 0).all()), "the range always includes 0"
    longest = x.abs().argmax(-1)
    rows = torch.tensor([0, 2, 3])
    step = x.abs().amax(-1) / (2 ** (activations.bits - 1) - 1)
    assert bool(((rounded - x)[rows, longest[rows]].abs() <= step[rows]).all())
    assert bool(activations.fake_quantize(torch.full((1, 40), 1e-45)).isfinite().all())
    assert bool(activations.fake_quantize(torch.full((1, 40), torch.nan)).isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_rounded_in_float32(dtype: torch.dtype) -> None:
    x, activations = drawn(6, 40).to(dtype), Activations(bits=8)
    rounded = activations.fake_quantize(x)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, activations.fake_quantize(x.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(activations.fake_quantize(x.float()), activations.fake_quantize(x.float()).float())
        assert activations.fake_quantize(x.float()).dtype == torch.float32


def test_fake_quantization_is_idempotent() -> None:
    activations = Activations(bits=4, symmetric=True)
    once = activations.fake_quantize(drawn(6, 40))
    torch.testing.assert_close(activations.fake_quantize(once), once)


def test_gradients_pass_straight_through() -> None:
    x, seen = drawn(6, 40).requires_grad_(), drawn(6, 40, seed=1)
    activations = Activations(bits=4)
    rounded = activations.fake_quantize(x)
    torch.testing.assert_close(rounded, activations.fake_quantize(x.detach()))
    (rounded * seen).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, seen)


@pytest.mark.parametrize("linear", [nn.Linear(40, 8), Conv1D(8, 40)], ids=["Linear", "Conv1D"])
def test_hooks_survive_copying_and_pickling(linear: nn.Module) -> None:
    activations, x = Activations(bits=4), drawn(2, 3, 40)
    expected = linear(activations.fake_quantize(x))
    assert not torch.equal(linear(x), expected)
    module = copy.deepcopy(linear)
    handle = activations.simulate(module)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    for same in (module, copy.deepcopy(module), torch.load(stored, weights_only=False)):
        assert torch.equal(same(x), expected)
    handle.remove()
    assert torch.equal(module(x), linear(x))


def test_keyword_inputs_are_quantized() -> None:
    linear, activations, x = nn.Linear(40, 8), Activations(bits=4), drawn(3, 40)
    activations.simulate(linear)
    assert torch.equal(linear(input=x), linear(x))


def test_a_restricted_range_has_as_many_levels_below_0_as_above() -> None:
    activations = Activations(bits=4, symmetric=True, symmetric_range="restricted")
    x = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([-1.0, 1.0])])[None]
    levels = activations.fake_quantize(x).unique()
    torch.testing.assert_close(levels, torch.arange(-7, 8) / 7)
    assert torch.equal(activations.fake_quantize(-x), -activations.fake_quantize(x))


def test_a_spec_of_a_full_range_is_that_of_earlier_versions() -> None:
    assert "symmetric_range" not in Activations(symmetric=True).spec()
    restricted = Activations(symmetric=True, symmetric_range="restricted")
    assert Activations.model_validate(restricted.spec()) == restricted


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric_range": "restricted"},
        {"bits": 3},
        {"bits": 9},
        {"granularity": "tensor"},
        {"block_size": 0},
        {"b": 8},
    ],
)
def test_invalid_options_are_rejected(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Activations.model_validate(options)


def test_floats_are_the_nearest_at_the_scale_of_a_token() -> None:
    """448 and its multiples stay as they are; between 256 and 448 the values are 32 apart."""
    x = torch.tensor([[448.0, 300.0, -17.5, 0.01, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-0.5, 0.25, 0.1, 0.2, 0.3]])
    activations = Activations(type="float")
    rounded = activations.fake_quantize(x)
    assert rounded[0].tolist() == [448.0, 288.0, -18.0, 0.009765625, 0.0]
    assert not rounded[1].any()
    torch.testing.assert_close(rounded[2], x[2], rtol=2**-4, atol=0)
    x.requires_grad_()
    activations.fake_quantize(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]
    assert activations.spec()["type"] == "float" and "type" not in Activations().spec()
    for fields in ({"bits": 4}, {"granularity": "block"}, {"symmetric": True}):
        with pytest.raises(ValidationError, match="type float has 8 bits, granularity token"):
            Activations.model_validate({"type": "float", **fields})
