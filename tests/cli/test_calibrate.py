"""`qcli calibrate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcli.utils import environment
from tests.cli.conftest import Invoke


def test_its_folder_is_calibration_data(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    flags = ("calibrate", model, "--data", text, "--samples", 4, "--seq-len", 32, "--out", folder)
    code, out, err = invoke(*flags, "--hessians", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert len(result["layers"]) == 14
    assert all(layer["sensitivity"]["2"] > layer["sensitivity"]["4"] > 0 for layer in result["layers"].values())
    assert (folder / "hessians-00001.safetensors").exists()

    code, stdout, err = invoke(*flags)
    assert (code, stdout) == (3, "")
    assert err.startswith(f"error: {folder} exists")

    reuse = ("--data", folder, "--samples", 4, "--seq-len", 32, "--group-size", 32)
    code, _, err = invoke("quantize", model, *reuse, "--out", tmp_path / "out")
    assert code == 0, err


def test_most_sensitive_layers_are_shown(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    code, out, err = invoke(
        "calibrate", model, "--data", text, "--samples", 4, "--seq-len", 32, "--out", tmp_path / "calibration"
    )
    assert code == 0, err
    assert len([line for line in out.splitlines() if line.strip().startswith("model.layers.")]) == 10
    assert f"written      {tmp_path / 'calibration'}" in out


def test_without_out_the_folder_has_the_models_name(
    invoke: Invoke, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = invoke("calibrate", model, "--data", text, "--samples", 2, "--seq-len", 16)
    assert code == 0 and err.startswith("output: llama-0-calibration\n")
    assert Path("llama-0-calibration", "calibration.json").exists()


def test_the_sensitivity_of_layers_is_drawn(
    invoke: Invoke, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--data", text, "--samples", 2, "--seq-len", 32)
    figure = tmp_path / "layers.svg"
    code, _, err = invoke("calibrate", model, *small, "--out", tmp_path / "calibration", "--plot", figure)
    assert code == 0 and f"drawn: {figure}" in err
    drawn = figure.read_text()
    assert all(f"<!-- {words} -->" in drawn for words in ("2 bits", "4 bits", "self_attn.q_proj", "mlp.down_proj"))
    assert f"{model.name}: rounding to nearest, groups of 64" in drawn
    monkeypatch.setattr(environment, "can_plot", lambda: False)
    for name, code in (("layers.svg", 3), ("layers.gif", 2), ("other.png", 6)):
        outcome = invoke("calibrate", model, *small, "--out", tmp_path / "second", "--plot", tmp_path / name)
        assert (outcome.code, outcome.out) == (code, "") and not (tmp_path / "second").exists()
    assert outcome.err == "error: --plot: matplotlib is not installed\nhint: pip install matplotlib\n"
