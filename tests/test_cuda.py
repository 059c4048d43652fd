"""Every command and method on a GPU: what it makes there is as good as what the CPU makes, and loads and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qcli.cli.main import app
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format
from qcli.inference.linear import QuantLinear
from qcli.utils.files import read_json
from tests.inference.weights import random_weight
from tests.quantizing import TOKENS, in_pieces, logits, run, streamed, weights, write_text
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


# ------------------------------------------------------------------------------------------------ packed models

GENERATE: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
CAPTURED: list[Format] = [
    Affine(bits=4, group_size=32),
    Codebook(bits=2, group_size=32, rank=2, table_bits=8),
    DualBinary(group_size=32),
    Sign(),
    LowRank.around(Affine(bits=3, group_size=32), 4, 8),
]


def placed(tmp_path: Path, **options: Any) -> Any:
    """A packed checkpoint of two blocks, loaded."""
    if not (tmp_path / "out").exists():
        run(tiny_model("llama", tmp_path), tmp_path / "out", method__name="rtn")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "out", **{"dtype": torch.float32, **options}).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS.to(model.device)).logits
    return found.cpu()


def places(first: Any, second: Any) -> dict[str, Any]:
    """A device map: the second block elsewhere."""
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), first)
    return {**outside, "model.layers.0": first, "model.layers.1": second}


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("format", CAPTURED, ids=str)
def test_a_cuda_graph_replays_a_layer(format: Format, rows: int) -> None:
    layer = QuantLinear(format, 128, 64)
    layer.load_state_dict(format.to_stored(random_weight(format, (64, 128))))
    layer.cuda()
    x, other = (torch.randn(rows, 128, device="cuda", dtype=torch.float16) for _ in range(2))
    layer(x)  # kernels are compiled before, as engines do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(other)
    graph.replay()
    torch.testing.assert_close(y, layer(other), rtol=1e-3, atol=1e-3)


def test_a_static_cache_generates_the_same_in_a_compiled_graph(tmp_path: Path) -> None:
    """transformers compiles the decode step on GPUs, in CUDA graphs."""
    model = placed(tmp_path, device_map="cuda")
    prompt = TOKENS[:1, :8].cuda()
    dynamic = model.generate(prompt, **GENERATE)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **GENERATE), dynamic)


def test_blocks_in_main_memory_visit_the_gpu(tmp_path: Path) -> None:
    model = placed(tmp_path, device_map=places(0, "cpu"), offload_buffers=True)
    assert model.model.layers[1].mlp.up_proj.weight_packed.is_meta
    torch.testing.assert_close(logits_of(model), logits_of(placed(tmp_path)), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_blocks_on_two_gpus(tmp_path: Path) -> None:
    model = placed(tmp_path, device_map=places(0, 1))
    assert model.model.layers[1].mlp.up_proj.weight_packed.device == torch.device("cuda", 1)
    torch.testing.assert_close(logits_of(model), logits_of(placed(tmp_path)), rtol=1e-3, atol=1e-3)


def test_autocast_on_a_gpu(tmp_path: Path) -> None:
    model = placed(tmp_path, device_map="cuda")
    expected = logits_of(model)
    with torch.autocast("cuda", torch.bfloat16):
        found = logits_of(model)
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
