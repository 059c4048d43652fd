"""What is reported of layers whose inputs or scales leave a method nothing exact to work with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.algorithms.layer_group import DEAD_INPUTS, HESSIAN, LinearGroup
from qcli.algorithms.low_rank import LowRankCompensation
from qcli.algorithms.method import Method
from qcli.algorithms.methods.dbllm import DBLLM
from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.lcq import LCQ
from qcli.algorithms.methods.onebit import OneBit
from qcli.algorithms.methods.rtn import RTN
from qcli.core.formats.row_scaled import RowScaled
from qcli.quantization.layer_report import layer_report
from qcli.quantization.solve import solve
from qcli.utils.errors import UsageError
from tests.algorithms.tensors import normal

METHODS: list[Method] = [
    RTN(bits=4, group_size=32),
    RTN(bits=4, group_size=32, grid="hessian"),
    GPTQLike(bits=4, group_size=32),
    LCQ(bits=3, group_size=32, table_bits=16),
    LCQ(bits=3, group_size=32, table_bits=8),
    DBLLM(group_size=32),
    OneBit(),
    OneBit(paper=True),
]


def group_of(weight: Tensor, inputs: Tensor) -> LinearGroup:
    hessian = inputs.T @ inputs / len(inputs)
    return LinearGroup({"w": weight}, hessian, hessian)


def reported(method: Method, weight: Tensor) -> list[str]:
    group = group_of(weight, normal(256, weight.shape[1], seed=1))
    return layer_report("w", method, solve(method, None, group)["w"], weight, group).fallbacks


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_scales_too_small_for_float16_are_reported(method: Method) -> None:
    """Of 8 rows 4 are tiny, besides one of zeros, whose scales do not matter; 8-bit tables and OneBit's factors share
    scales between rows, so all rows are tiny there."""
    weight, shared = normal(8, 64), isinstance(method, OneBit) or (isinstance(method, LCQ) and method.table_bits == 8)
    weight[: 8 if shared else 4] *= 1e-12 if isinstance(method, OneBit) else 1e-6
    weight[7] = 0
    (note,) = [note for note in reported(method, weight) if "refit" not in note]
    count = 7 + 64 if isinstance(method, OneBit) else 14 if shared else 8
    assert note == f"{count} scales are too small for float16's full precision; row_exponents: true keeps it"
    assert reported(method, normal(8, 64)) == []


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_scales_beyond_float16_are_refused(method: Method) -> None:
    with pytest.raises(UsageError, match=r"^w: weights of up to .* beyond float16's range, 6e-08 to 65504") as refused:
        reported(method, normal(8, 64) * 1e12)
    assert "dense: true" in str(refused.value.hint)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("compensated", [False, True])
def test_exponents_of_rows_make_the_size_of_weights_irrelevant(method: Method, compensated: bool) -> None:
    """Rows of 1e-30 to 1e30 are quantized as rows of one size, bit for bit."""
    method = method.model_copy(update={"row_exponents": True})
    weight, sizes = normal(8, 64), torch.tensor([-100, -60, -40, -20, 0, 20, 60, 100], dtype=torch.int8)
    weight[4] = 0
    losses = []
    for target in (weight, RowScaled.shifted(weight, sizes)):
        group = LinearGroup({"w": target}, hessian := normal_hessian(64), hessian)
        solutions = solve(method, LowRankCompensation(rank=2) if compensated else None, group)
        report = layer_report("w", method, solutions["w"], target, group)
        quantized = solutions["w"].weight
        quantized.check()
        assert bool(quantized.dense().isfinite().all())
        assert [note for note in report.fallbacks if "refit" not in note] == []  # of the row of zeros
        losses.append(quantized.dense())
    assert torch.equal(RowScaled.shifted(losses[0], sizes), losses[1])


def normal_hessian(width: int) -> Tensor:
    inputs = normal(256, width, seed=1)
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("compensated", [False, True])
def test_dead_inputs_leave_the_error_of_the_weight(method: Method, compensated: bool) -> None:
    """As good as with uncorrelated inputs of one size, and reported by every method that reads inputs."""
    weight = normal(32, 64)
    errors, notes = [], []
    for group in (group_of(weight, torch.eye(64) * 8), group_of(weight, torch.zeros(1, 64))):
        solutions = method.quantize(group)
        if compensated:
            solutions = LowRankCompensation(rank=2, weighted=True).compensate(method, group, solutions)
        solutions["w"].weight.check()
        errors.append(float((solutions["w"].weight.dense() - weight).square().mean()))
        notes.append(solutions["w"].fallbacks)
    assert errors[1] <= 1.01 * errors[0]
    reads_inputs = HESSIAN in method.needs
    assert notes == [[], [DEAD_INPUTS] if reads_inputs else []]
