"""Fake quantization against autograd through its definition, and the kernel against torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.core.fake_quantize import fake_quantize
from qcli.utils import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's interpreter runs kernels
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter cuts bfloat16 off in place of rounding")


@pytest.fixture(params=["torch", "kernel"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "kernel":
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setattr(triton_kernels, "DEVICES", {DEVICE} if request.param == "kernel" else set())


def inputs(shape: tuple[int, ...], *, zero_points: bool) -> tuple[Tensor, Tensor, Tensor | float]:
    """Latents on both sides of the grid, the scale and the zero point of each group."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(shape, generator=generator) * 12 - 2
    latents.view(-1)[:6] = torch.tensor([-1.0, 0.5, 1.5, 2.5, 8.0, 7.5])  # ties, and where gradients end
    groups = (*shape[:-1], 1)
    scale = torch.randn(groups, generator=generator) / 10
    zero_point = 8 * torch.rand(groups, generator=generator)
    return latents.to(DEVICE), scale.to(DEVICE), zero_point.to(DEVICE) if zero_points else 4.0


def definition(latents: Tensor, scale: Tensor, zero_point: Tensor | float) -> Tensor:
    """With torch's own gradients; the code reaches one step beyond the grid's ends straight through."""
    with torch.no_grad():
        codes = latents.round().clamp(0, 7)
        slope = ((latents > -1) & (latents < 8)).float()
    straight = codes + slope * (latents - latents.detach())
    return (codes - zero_point) * scale + (straight - codes) * scale.detach()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 32), (4, 24), (3, 1, 1100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)])
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], zero_points: bool) -> None:
    """Values to the last bit."""
    tensors = inputs(shape, zero_points=zero_points)
    leaves = [tensor.requires_grad_() for tensor in tensors if isinstance(tensor, Tensor)]
    weighting = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    value, expected = fake_quantize(*tensors, (0, 7), dtype), definition(*tensors)
    assert torch.equal(value, expected.to(dtype))
    found = torch.autograd.grad((value * weighting).sum(), leaves)
    for gradient, wanted in zip(found, torch.autograd.grad((expected * weighting).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_way")
def test_codes_stay() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (6, 2, 16), generator=generator, dtype=torch.uint8).to(DEVICE)
    _, scale, zero_point = inputs((6, 2, 16), zero_points=True)
    scale.requires_grad_()
    value = fake_quantize(codes, scale, zero_point, (1, 255), torch.float32)
    assert torch.equal(value, (codes.float() - zero_point) * scale)
    (gradient,) = torch.autograd.grad(value.sum(), scale)
    torch.testing.assert_close(gradient, (codes.float() - zero_point).sum(-1, keepdim=True))
