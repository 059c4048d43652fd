"""Flags that a calibration folder leaves without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcli.data.stored_windows import stored_windows
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"ids": torch.zeros(16, 32, dtype=torch.int64)}, tmp_path / "tokens.safetensors")
    return tmp_path


def test_windows_come_from_the_header(folder: Path) -> None:
    assert stored_windows(folder) == (16, 32)
    (folder / "tokens.safetensors").write_bytes(b"torn")
    assert stored_windows(folder) is None


@pytest.mark.parametrize(
    ("flags", "sets", "flag"),
    [
        ({"calibration.samples": 64}, [], "--samples"),
        ({"calibration.seq_len": 64}, [], "--seq-len"),
        ({}, ["calibration.samples=64"], "--set calibration.samples=64"),
        ({"distill.samples": 8}, [], "--samples"),
    ],
)
def test_a_flag_without_effect_is_refused(flags: dict[str, object], sets: list[str], flag: str, folder: Path) -> None:
    with pytest.raises(UsageError) as raised:
        load_recipe(None, {"model": "m", "calibration.data": str(folder)} | flags, sets)
    assert raised.value.message == f"{flag}: {folder} has 16 samples of 32 tokens, used as they are"


def test_flags_that_agree_and_defaults_pass(folder: Path) -> None:
    given = {"model": "m", "calibration.data": str(folder)}
    assert load_recipe(None, given).calibration.samples == 128
    assert load_recipe(None, given | {"calibration.samples": 16, "calibration.seq_len": 32}).calibration.samples == 16
