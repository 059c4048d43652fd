"""Kernels of small codebooks and signs against the formats' own fake quantization, to the last bit of its values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.core import look_up_in_tiles
from qcli.core.formats.codebook import Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format
from qcli.utils import triton_kernels
from tests.inference.weights import random_weight

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's interpreter runs kernels
FORMATS: list[Format] = [
    DualBinary(group_size=24),
    DualBinary(group_size=32, levels="symmetric"),
    Codebook(bits=1, group_size=32, rank=1, table_bits=16),
    Codebook(bits=2, group_size=32, rank=2, table_bits=8),
    Codebook(bits=4, group_size=-1, rank=1, table_bits=16, basis_rows=3),
    Sign(),
    Sign(output_norm=True, bias_after_norm=True),
]


def made(format: Format, dtype: torch.dtype) -> list[Tensor]:
    """The value and its gradients by latents and tables."""
    weight = random_weight(format, (21, 300)).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    target = weight.dense() + torch.randn(21, 300, generator=generator).to(DEVICE) / 3  # some latents move codes
    tables = {name: table.requires_grad_() for name, table in format.float_tables(weight.tables).items()}
    units = format.step_sizes(weight.codes, weight.tables)
    latents = (target / units).requires_grad_()
    value = format.fake_quantize(latents, units, tables, dtype)
    if dtype == torch.float32:
        codes = format.latent_codes(latents.detach(), units, tables)
        assert not torch.equal(codes, weight.codes)
        assert torch.equal(value, format.decode(codes, tables))
    gradient = torch.randn(21, 300, generator=generator).to(DEVICE, dtype)
    return [value, *torch.autograd.grad(value, [latents, *tables.values()], gradient)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_kernel_computes_what_the_format_does(
    format: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "DEVICES", set())
    expected = made(format, dtype)
    monkeypatch.setattr(triton_kernels, "DEVICES", {DEVICE})
    found = made(format, dtype)
    assert ("FakeSign" if isinstance(format, Sign) else "FakeLookUp") in _names(found[0])
    assert torch.equal(found[0], expected[0])
    for gradient, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", [Codebook(bits=5, group_size=32, rank=1, table_bits=16)], ids=str)
def test_large_codebooks_are_left_to_torch(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "DEVICES", {DEVICE})
    assert "FakeLookUp" not in _names(made(format, torch.float32)[0])


@pytest.mark.parametrize(
    "format",
    [each for each in FORMATS if isinstance(each, Codebook)] + [Codebook(bits=3, group_size=64, rank=1, table_bits=8)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_compute_what_encoding_and_decoding_do(
    format: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "DEVICES", set())
    monkeypatch.setattr(look_up_in_tiles, "_TILE", {"cpu": 1000, "cuda": 1000})
    found = made(format, dtype)
    monkeypatch.setattr(Codebook, "fake_quantize", Format.fake_quantize)
    expected = made(format, dtype)
    assert "LookUpInTiles" in _names(found[0])
    assert "LookUpInTiles" not in _names(expected[0])
    for own, wanted in zip(found, expected, strict=True):
        assert torch.equal(own, wanted)


def _names(value: Tensor) -> str:
    """Of the operations that a tensor was made by, last first."""
    names, nodes = list[str](), [value.grad_fn]
    while nodes:
        node = nodes.pop(0)
        if node is not None:
            names.append(node.name())
            nodes += [before for before, _ in node.next_functions]
    return " ".join(names)
