"""Weights in full precision as a format: nothing is rounded, and everything that runs formats runs them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.methods.full_precision import Unrounded
from qcli.core.formats.full_precision import FloatDType, FullPrecision
from qcli.core.weight import from_spec
from qcli.inference.linear import QuantLinear
from qcli.utils.errors import VerificationError
from tests.core.formats.checks import drawn, round_trip

DTYPES: tuple[FloatDType, ...] = ("F32", "F16", "BF16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_the_dtype_come_back_bit_for_bit(dtype: FloatDType) -> None:
    format = FullPrecision.of(dtype)
    stored = drawn(6, 10).to(format.stored((6, 10))["weight_full"].torch_dtype)
    weight = format.hold(stored.float())
    weight.check()
    assert torch.equal(round_trip(weight).tables["weight_full"], stored)
    assert torch.equal(weight.dense(), stored.float())
    assert format.bits_per_weight((6, 10)) == format.bits == (32 if dtype == "F32" else 16)
    assert from_spec(format.spec()) == format


@pytest.mark.parametrize("grad", [False, True])
def test_quant_linear_computes_with_the_weight(grad: bool) -> None:
    weight, x, bias = drawn(6, 10), drawn(3, 10, seed=1).requires_grad_(grad), drawn(6, seed=2)
    format = FullPrecision.of("F32")
    linear = QuantLinear(format, 10, 6, bias)
    linear.load_state_dict({**format.to_stored(format.hold(weight)), "bias": bias})
    linear.weight.zero_()  # a decoded weight is no view of the stored one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = linear(x)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    if grad:
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 10))


@pytest.mark.parametrize(("stored", "kept"), [("F32", "F32"), ("BF16", "BF16"), ("F16", "F16"), ("F64", "F32")])
def test_the_method_keeps_the_dtype_of_the_model(stored: str, kept: str) -> None:
    assert Unrounded().for_weights_of(stored).format == FullPrecision.of(kept)  # type: ignore[arg-type]
    assert Unrounded(dtype="float16").for_weights_of(stored).format == FullPrecision.of("F16")
    weight = drawn(4, 8).bfloat16().float()
    solution = Unrounded(dtype="bfloat16").quantize(LinearGroup({"w": weight}))["w"]
    assert torch.equal(solution.weight.dense(), weight)
    assert not solution.fallbacks


def test_invalid_weights_and_specs_are_refused() -> None:
    with pytest.raises(VerificationError, match="NaN or infinity"):
        FullPrecision.of("F16").hold(torch.full((2, 2), 1e6)).check()
    with pytest.raises(VerificationError, match="bits is 32, BF16 has 16"):
        from_spec({"format": "full-precision", "bits": 32, "dtype": "BF16"})
