"""The Triton kernels against float64, on a GPU or, where there is none, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format
from qcli.inference.backends.triton import Triton
from tests.inference.weights import FORMATS, random_weight

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
BASES = [format for format in FORMATS if not isinstance(format, LowRank)]
RAGGED = [
    Affine(bits=3, group_size=128),
    Affine(bits=5, group_size=16),
    Affine(bits=4, group_size=8, zero_point="float"),
    Codebook(bits=2, group_size=64, rank=1, table_bits=8),
    DualBinary(group_size=16),
    Sign(),
]


def relative_error(
    format: Format, shape: tuple[int, int], rows: int, dtype: torch.dtype, *, bias: bool = False
) -> float:
    weight = random_weight(format, shape)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    added = torch.randn(shape[0], generator=torch.Generator().manual_seed(3)) if bias else None
    tensors = {name: tensor.to(DEVICE) for name, tensor in format.to_stored(weight).items()}
    backend = Triton()
    assert backend.unsupported_reason(format, shape, dtype) is None
    y = backend.linear(x.to(DEVICE), format, shape, tensors, None if added is None else added.to(DEVICE))
    assert y.dtype == dtype and y.shape == (rows, shape[0])
    expected = x.double() @ weight.dense().double().T + (0 if added is None else added.double())
    return float((y.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("format", BASES, ids=str)
def test_one_row_of_every_format(format: Format) -> None:
    assert relative_error(format, (20, 96), 1, torch.float32) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("format", BASES, ids=str)
def test_several_rows_of_every_format(format: Format) -> None:
    assert relative_error(format, (20, 128), 7, torch.float16, bias=True) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("format", BASES[::6], ids=str)
def test_few_rows(format: Format) -> None:
    assert relative_error(format, (20, 96), 3, torch.float16, bias=True) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("format", BASES[1::4], ids=str)
def test_many_rows_use_a_decoded_tile(format: Format) -> None:
    assert relative_error(format, (20, 96), 66, torch.float16) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("format", RAGGED, ids=str)
def test_ragged_shapes(format: Format, rows: int) -> None:
    assert relative_error(format, (21, 150), rows, torch.float16, bias=True) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_inputs_as_large_as_bfloat16_keeps(rows: int) -> None:
    """Massive activations: far above float16, next to small ones."""
    format, shape = Affine(bits=4, group_size=32), (16, 64)
    weight = random_weight(format, shape)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    x[:, 3], x[:, 40] = 3e6, 1e-8
    tensors = {name: tensor.to(DEVICE) for name, tensor in format.to_stored(weight).items()}
    y = Triton().linear(x.to(DEVICE), format, shape, tensors, None)
    expected = x.double() @ weight.dense().double().T
    assert float((y.cpu().double() - expected).norm() / expected.norm()) < TOLERANCES[torch.bfloat16]


def test_more_columns_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcli.inference.backends.triton._MAX_SPANS", 8)
    format = Affine(bits=2, group_size=64)
    assert relative_error(format, (12, 1600), 1, torch.float16, bias=True) < TOLERANCES[torch.float16]


def test_no_rows() -> None:
    format, shape = Sign(), (8, 64)
    tensors = {name: tensor.to(DEVICE) for name, tensor in format.to_stored(random_weight(format, shape)).items()}
    assert Triton().linear(torch.empty(2, 0, 64, device=DEVICE), format, shape, tensors, None).shape == (2, 0, 8)


def test_odd_groups_are_left_to_others() -> None:
    reason = Triton().unsupported_reason(Affine(bits=4, group_size=24), (8, 96), torch.float16)
    assert reason == "groups of 24 are neither 8, 16 nor a multiple of 32"
