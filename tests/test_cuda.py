"""Every command and method on a GPU: what it makes there is as good as what the CPU makes, and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qcli.cli.main import app
from qcli.utils.files import read_json
from tests.quantizing import in_pieces, logits, run, streamed, weights, write_text
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run `make test` on a GPU machine"),
]
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method__name": "rtn"},
    "gptq-like": {"method__name": "gptq-like", "method__bits": 3},
    "teq": {"method__name": "teq", "method__steps": 10},
    "lcq": {"method__name": "lcq", "method__bits": 2, "method__steps": 5},
    "onebit": {"method__name": "onebit", "method__bits": 1, "grouped": False},
    "dbllm": {"method__name": "dbllm", "method__bits": 2},
    "refined": {"refine__steps": 10, "low_rank__rank": 4},
    "refined-linears": {"refine__scope": "linear", "refine__steps": 10},
    "activations": {"activations__bits": 8, "transforms": [{"name": "teq", "steps": 10}]},
    "auto": {"method__bits": "auto", "method__target_bpw": 4.0, "calibration__samples": 12},
    "self": {"calibration__data": "self"},
}


def error(folder: Path) -> float:
    """Mean relative error of a checkpoint's layers."""
    rows = read_json(folder / "qcli.manifest.json")["layers"]
    return float(sum(row["error"] for row in rows) / len(rows))


@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_quantizes_as_well_as_the_cpu(name: str, tmp_path: Path) -> None:
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    for device in ("cpu", "cuda"):
        run(model, tmp_path / device, text, device=device, dtype="float32", **RECIPES[name])
    assert error(tmp_path / "cuda") < 1.1 * error(tmp_path / "cpu") + 1e-4
    torch.testing.assert_close(logits(tmp_path / "cuda"), streamed(tmp_path / "cuda"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gptq-like", "refined", "teq"])
def test_a_run_on_a_gpu_resumes_to_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_model("llama", tmp_path, num_hidden_layers=3), write_text(tmp_path)

    def quantize(out: str) -> None:
        run(model, tmp_path / out, text, device="cuda", **RECIPES[name])

    quantize("straight")
    assert in_pieces(lambda: quantize("resumed"), tmp_path / "resumed", monkeypatch) >= 4
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    del straight["recipe.yaml"], resumed["recipe.yaml"]
    assert straight == resumed


def test_every_command_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    short = ["--data", str(text), "--samples", "8", "--seq-len", "32", "--device", "cuda", "-q"]
    train = ["--teacher", str(model), "--steps", "6", "--set", "distill.judgements=2", *short]
    for command in (
        ["calibrate", str(model), *short, "--out", "calibrated"],
        ["quantize", str(model), "--bits", "3", "--group-size", "32", *short, "--out", "q"],
        ["distill", "q", *train, "--out", "d"],
        ["distill", "q", *train, "--train", "tables,weights", "--loss", "onebit", "--out", "dw"],
        ["distill", "q", *train, "--scope", "block", "--out", "db"],
        ["eval", "d", "--baseline", str(model), "--data", str(text), "--window", "32", "--layers", *short[6:]],
        ["pack", "d", "--format", "dense", "--out", "p", "-q"],
        ["verify", "p", "-q"],
        ["inspect", "d"],
        ["doctor"],
    ):
        assert app(args=command, standalone_mode=False) in (None, 0), command
    torch.testing.assert_close(logits(tmp_path / "d"), logits(tmp_path / "p"), rtol=1e-4, atol=1e-4)
