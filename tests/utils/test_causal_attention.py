from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qcli.utils import causal_attention
from qcli.utils.causal_attention import CausalAttention
from qcli.utils.device import matmul_precision


def _attention(*inputs: Any, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*inputs, **options)


def _inputs(heads: int, key_heads: int, length: int, width: int = 16, value_width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, width), (key_heads, width), (key_heads, value_width))
    drawn = (torch.randn(2, count, length, size, generator=generator) for count, size in shapes)
    return [each.bfloat16().requires_grad_() for each in drawn]


def _exact(inputs: list[Tensor], gradient: Tensor, **options: Any) -> tuple[Tensor, ...]:
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    output = _attention(*doubles, is_causal=True, **options)
    return output.detach(), *torch.autograd.grad(output, doubles, gradient.double())


@pytest.fixture
def torch_computes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each attention whether torch computed it."""
    seen: list[bool] = []
    serve = causal_attention._serve

    def watched(*args: Any, **kwargs: Any) -> Tensor | None:
        served = serve(*args, **kwargs)
        seen.append(served is None)
        return served

    monkeypatch.setattr(causal_attention, "_serve", watched)
    return seen


@pytest.mark.parametrize(("heads", "key_heads", "length", "value_width"), [(6, 2, 300, 16), (3, 3, 256, 24)])
def test_values_and_gradients_are_those_of_attention(
    torch_computes: list[bool], heads: int, key_heads: int, length: int, value_width: int
) -> None:
    inputs = _inputs(heads, key_heads, length, value_width=value_width)
    gradient = torch.randn(2, heads, length, value_width, generator=torch.Generator().manual_seed(1))
    options = {"enable_gqa": heads != key_heads, "scale": 0.3}
    with matmul_precision(fast=True, device=torch.device("cpu")):
        output = _attention(*inputs, is_causal=True, **options)
    found = output, *torch.autograd.grad(output, inputs, gradient.bfloat16())
    assert torch_computes == [False]
    for own, exact in zip(found, _exact(inputs, gradient, **options), strict=True):
        assert own.dtype == torch.bfloat16
        assert float((own.detach().double() - exact).norm() / exact.norm()) < 0.01


def test_torch_computes_what_is_not_plainly_causal(torch_computes: list[bool]) -> None:
    query, key, value = _inputs(2, 2, 256)
    mask = torch.ones(256, 256, dtype=torch.bool).tril()
    short = [each[:, :, :128] for each in (query, key, value)]
    with CausalAttention(), torch.no_grad():
        masked = _attention(query, key, value, attn_mask=mask)
        _attention(query, key, value)
        _attention(*short, is_causal=True)
        _attention(query[:, :, 128:], key, value, is_causal=True)
        own = _attention(query, key, value, is_causal=True)
    assert torch_computes == [True, True, True, True, False]
    torch.testing.assert_close(own, masked, rtol=0.05, atol=0.02)


def test_full_precision_is_torchs(torch_computes: list[bool]) -> None:
    with matmul_precision(fast=False, device=torch.device("cpu")), torch.no_grad():
        _attention(*_inputs(2, 2, 256), is_causal=True)
    assert torch_computes == []
