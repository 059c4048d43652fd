"""What a block takes of a GPU's memory while it is quantized, counted on tensors without values: it does not grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import device_memory
from qcli.algorithms.solvers import tiles
from qcli.core import by_code
from qcli.quantization.plan import make_plan
from qcli.recipe.load import load_recipe

CASES: dict[str, tuple[str, dict[str, Any], int]] = {  # the phase that matters, fields of the recipe, bytes at its peak
    "refined": ("refine", {"method.name": "rtn", "refine.steps": 2}, 121_718_060),
    "teq": ("transform", {"method.name": "teq", "method.steps": 2}, 91_163_928),
    "onebit": ("solve", {"method.name": "onebit"}, 110_234_888),
    "gptq-like": ("solve", {"method.name": "gptq-like"}, 106_160_388),
    "lcq": ("refine", {"method.name": "lcq", "method.bits": 2, "method.steps": 2}, 130_255_864),
}
SLOW = ("gptq-like", "lcq")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_no_peak_grows(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than 3 %. Tiles and joint weights are as small in proportion as those of a 70B model."""
    monkeypatch.setitem(device_memory.SIZES, "small", (512, 2048, 8))
    monkeypatch.setattr(device_memory, "VOCABULARY", 4000)
    monkeypatch.setattr(device_memory, "LENGTH", 64)
    for module, name, size in ((tiles, "_GPU", 1 << 18), (tiles, "_TOGETHER", 1 << 19), (by_code, "_AT_ONCE", 1 << 18)):
        monkeypatch.setattr(module, name, size)
    phase, fields, recorded = CASES[case]
    model, text = device_memory.write_headers(tmp_path / "small", "small"), tmp_path / "text.txt"
    text.write_text("text")
    given = {"model": str(model), "device": "cpu", "calibration.data": str(text), "calibration.held_out": 1}
    given |= {"calibration.samples": device_memory.SAMPLES, "calibration.seq_len": device_memory.LENGTH}
    found = device_memory.phases(make_plan(load_recipe(None, {**given, **fields})), fast=True)
    assert found[phase].peak <= 1.03 * recorded, f"{phase} took {found[phase].peak} bytes: {found[phase].largest[:8]}"
