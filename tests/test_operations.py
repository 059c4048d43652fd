"""The counts of `benchmarks/results/operations.json` stay what they are, or fall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common import RESULTS
from benchmarks.operations import NAMES, Counting, measure, moved
from tests.determinism import as_on_a_gpu

RECORDED = json.loads((RESULTS / "operations.json").read_text())
FAST = (
    "error feedback: affine, with kernels",
    "block: gptq-like",
    "step: refinement, tables and weights",
    "distillation step: kl, tables",
)


@pytest.mark.skipif(
    torch.__version__.split(".")[:2] != RECORDED["machine"]["torch"].split(".")[:2],
    reason="recorded with another torch, whose operations differ: python -m benchmarks.operations",
)
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_no_count_rises(name: str, tmp_path: Path) -> None:
    """Above the recorded figures by more than 5 %, something got slower; far below, they are out of date. And
    every operation has a deterministic algorithm on a GPU."""
    if name.endswith("kernels"):
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
        if torch.cuda.is_available():
            pytest.skip("Triton's interpreter is for machines without a GPU")
    recorded = RECORDED["counts"][name]
    with as_on_a_gpu():
        counted = measure(name, tmp_path)
    for what in ("operations", "bytes", "synchronizations"):
        assert counted[what] <= 1.05 * recorded[what], f"{what} rose"
        assert counted[what] >= 0.8 * recorded[what], f"{what} fell: record them with python -m benchmarks.operations"


def test_every_count_is_recorded() -> None:
    assert [*RECORDED["counts"]] == [*NAMES]


def test_views_and_allocations_are_no_operations() -> None:
    x = torch.ones(4, 8)
    with Counting() as counting:
        view = torch.empty(8, 4).t()[:2].unsqueeze(0).detach()
        assert counting.now().operations == 0
        float((x[:2] + view.new_zeros(2, 8)).sum())
    assert counting.by_name == {"new_zeros": 1, "add": 1, "sum": 1, "_local_scalar_dense": 1}
    count = counting.now()
    assert count.synchronizations == 1
    assert count.bytes >= (64 + 64 + 64) + (64 + 4) + 4  # the sum of both, its sum, and the value


def test_expanded_tensors_count_once() -> None:
    assert moved(torch.ones(4, 1).expand(4, 100)) == 16
    assert moved("text") == 0
