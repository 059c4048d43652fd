"""fp8 and nvfp4 against torch's own E4M3 and a formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.methods.fp8 import ToFP8
from qcli.algorithms.methods.nvfp4 import ToNVFP4
from qcli.algorithms.refine import Refine
from qcli.core.formats.fp8 import FP8
from qcli.core.formats.nvfp4 import LEVELS, NVFP4, with_divisor
from qcli.core.weight import QuantizedWeight, from_spec
from qcli.utils.errors import VerificationError
from tests.core.formats.checks import drawn, round_trip

METHODS: list[ToFP8 | ToNVFP4] = [ToFP8(), ToNVFP4()]


def quantized(method: ToFP8 | ToNVFP4, weight: Tensor) -> QuantizedWeight:
    return method.quantize(LinearGroup({"w": weight}))["w"].weight


def levels(weight: QuantizedWeight) -> Tensor:
    """Every value that each weight could have, `[out, in, 2**bits]`."""
    values = []
    for code in range(1 << weight.format.bits):
        codes = torch.full_like(weight.codes, code)
        values.append(weight.format.decode(codes, weight.tables))
    return torch.stack(values, -1).nan_to_num(torch.inf)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("size", [1e-6, 0.02, 1.0, 1e4])
def test_codes_are_the_nearest_and_come_back_bit_for_bit(method: ToFP8 | ToNVFP4, size: float) -> None:
    target = size * drawn(5, 32)
    target[3] = 0.0
    weight = quantized(method, target)
    weight.check()
    round_trip(weight)
    error = (weight.dense() - target).abs()
    assert torch.equal(error, (levels(weight) - target[..., None]).abs().amin(-1))
    assert error.square().sum() < (0.001 if weight.format.bits == 8 else 0.02) * target.square().sum()
    assert not weight.dense()[3].any()
    assert from_spec(weight.format.spec()) == weight.format
    nearest = (levels(weight) - weight.dense()[..., None]).abs()
    gaps = torch.where(nearest > 0, nearest, torch.inf).amin(-1)
    torch.testing.assert_close(weight.format.step_sizes(weight.codes, weight.tables), gaps)


def test_fp8_by_hand() -> None:
    weight = quantized(ToFP8(), torch.tensor([[448.0, 1.0, -0.3, 0.0], [0.5, -2.0, 0.25, 1.0]]))
    assert weight.tables["weight_scale"].flatten().tolist() == pytest.approx([1.0, 2 / 448], rel=2**-8)
    assert weight.codes[0].tolist() == [0x7E, 0x38, 0xAA, 0]
    assert weight.dense()[0].tolist() == [448.0, 1.0, -0.3125, 0.0]
    assert weight.format.bits_per_weight((8, 64)) == 8.25


def test_nvfp4_by_hand() -> None:
    """Two blocks whose largest magnitudes are 6 and 1.5 times what one scale can be."""
    row = [*LEVELS, *(-level for level in LEVELS)]
    weight = quantized(ToNVFP4(), torch.tensor([[*row, *(level / 4 for level in row)]]))
    assert weight.tables["divisor"].tolist() == [256.0], "the largest power of two that keeps 1 below 448"
    assert weight.tables["block_scale"].view(torch.float8_e4m3fn).float().tolist() == [[256.0, 64.0]]
    assert weight.codes[0].tolist() == [*range(8), 0, *range(9, 16)] * 2
    assert torch.equal(weight.dense(), torch.tensor([[*row, *(level / 4 for level in row)]]))
    assert weight.format.bits_per_weight((64, 64)) == 4.5 + 32 / 64**2
    assert torch.equal(weight.dense().bfloat16().float(), weight.dense())


def test_a_divisor_is_changed_only_without_loss() -> None:
    weight = quantized(ToNVFP4(), drawn(4, 64))
    same = with_divisor(weight, weight.tables["divisor"] / 4)
    assert same is not None and torch.equal(same.dense(), weight.dense())
    assert not torch.equal(same.tables["block_scale"], weight.tables["block_scale"])
    assert with_divisor(weight, weight.tables["divisor"] * 64) is None, "scales above 448"
    assert with_divisor(weight, weight.tables["divisor"] / 2**16) is None, "scales below the normal ones"


def test_damage_is_noticed() -> None:
    for method, name, value in ((METHODS[0], "a code is NaN", 0xFF), (METHODS[1], "a code does not fit", 16)):
        weight = quantized(method, drawn(2, 32))
        weight.codes[0, 0] = value
        with pytest.raises(VerificationError, match=name):
            weight.check()
    weight = quantized(METHODS[1], drawn(2, 32))
    weight.tables["divisor"].mul_(3)
    with pytest.raises(VerificationError, match="not a power of two"):
        weight.check()
    weight.tables["divisor"].div_(3)
    weight.tables["block_scale"][0, 0] = 0
    with pytest.raises(VerificationError, match="not positive"):
        weight.check()
    with pytest.raises(VerificationError, match="weight_scale"):
        QuantizedWeight(FP8(), (2, 4), torch.zeros(2, 4, dtype=torch.uint8), {"weight_scale": torch.ones(2, 1)}).check()


def test_blocks_divide_rows() -> None:
    assert ToNVFP4().unsupported_reason((4, 40)) == "blocks of 16 do not divide its 40 inputs"
    assert ToNVFP4().unsupported_reason((4, 48)) is None
    assert NVFP4().column_step == 16


def test_tables_alone_train_only_where_they_are_floats() -> None:
    tables = Refine(train=("tables",))
    assert tables.unsupported_reason(FP8()) is None and Refine().unsupported_reason(NVFP4()) is None
    assert tables.unsupported_reason(NVFP4()) == "the tables of nvfp4 cannot be trained: set train to [tables, weights]"
