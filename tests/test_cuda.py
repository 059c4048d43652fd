"""Every command and method on a GPU: what it makes there is as good as what the CPU makes, and loads and runs.

Without a GPU a few cases of each test run on the CPU, under torch's settings of a deterministic run on a GPU: so the
tests themselves are known to work before they meet one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
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
from qcli.recipe.plugins import METHODS
from qcli.utils import registry
from qcli.utils.files import read_json
from tests.determinism import as_on_a_gpu
from tests.evaluation.questions import write_task
from tests.inference.weights import random_weight
from tests.quantizing import TOKENS, in_pieces, keep_on_host, logits, run, streamed, weights, write_text
from tests.tiny import tiny_model, with_merge

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device: run `make test` on a GPU machine")
pytestmark = [pytest.mark.cuda, pytest.mark.slow]

RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method__name": "rtn"},
    "full precision": {"method__name": "full-precision", "activations__bits": 8, "grouped": False},
    "fp8": {"method__name": "fp8", "grouped": False},
    "nvfp4": {"method__name": "nvfp4", "refine__steps": 10, "grouped": False},
    "gptq-like": {"method__name": "gptq-like", "method__bits": 3},
    "gptq-like, float zero points": {"method__bits": 2, "method__zero_point": "float"},
    "teq": {"method__name": "teq", "method__steps": 10},
    "lcq": {"method__name": "lcq", "method__bits": 2, "method__steps": 5},
    "lcq, 4 bits": {"method__name": "lcq", "method__bits": 4, "method__steps": 5, "method__rank": 2},
    "onebit": {"method__name": "onebit", "method__bits": 1, "grouped": False},
    "onebit, as published": {"method__name": "onebit", "method__paper": True, "method__svid": "nmf", "grouped": False},
    "dbllm": {"method__name": "dbllm", "method__bits": 2},
    "refined": {"refine__steps": 10, "low_rank__rank": 4},
    "refined tables": {"method__bits": 2, "refine__steps": 10, "refine__train": ["tables"]},
    "refined linears": {"refine__scope": "linear", "refine__steps": 10},
    "refined codebooks": {"method__name": "lcq", "method__bits": 3, "refine__steps": 10},
    "refined planes": {"method__name": "dbllm", "refine__steps": 10},
    "refined signs": {"method__name": "onebit", "refine__steps": 10, "grouped": False},
    "low rank": {"method__name": "rtn", "method__bits": 2, "low_rank__rank": 4, "low_rank__rounds": 2},
    "activations": {"activations__bits": 8, "transforms": [{"name": "teq", "steps": 10}]},
    "transform, KL": {"transforms": [{"name": "teq", "steps": 10, "loss": "kl"}]},
    "transform, text": {"transforms": [{"name": "teq", "steps": 10, "loss": "cross-entropy"}]},
    "auto": {"method__bits": "auto", "method__target_bpw": 4.0, "calibration__samples": 12},
    "self": {"calibration__data": "self"},
    "bounded": {"max_memory": "8GB"},
}


def cases(names: Iterable[str], on_cpu: Collection[str] = ()) -> list[Any]:
    """All of them on a GPU; without one those of `on_cpu`."""
    return [pytest.param(name, marks=() if name in on_cpu else needs_gpu) for name in names]


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with nullcontext() if GPU else as_on_a_gpu():
        yield


def error(folder: Path) -> float:
    """Mean relative error of a checkpoint's layers."""
    rows = read_json(folder / "qcli.manifest.json")["layers"]
    return float(sum(row["error"] for row in rows) / len(rows))


def test_every_method_has_a_recipe() -> None:
    assert {flags.get("method__name", "gptq-like") for flags in RECIPES.values()} == set(registry.names(METHODS))


@pytest.mark.parametrize("name", cases(RECIPES, ["gptq-like"]))
def test_a_gpu_quantizes_as_well_as_the_cpu_and_twice_the_same(name: str, tmp_path: Path) -> None:
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    for out, device in {"cpu": "cpu", "gpu": DEVICE, "again": DEVICE}.items():
        run(model, tmp_path / out, text, device=device, dtype="float32", **RECIPES[name])
    assert weights(tmp_path / "gpu") == weights(tmp_path / "again")
    assert error(tmp_path / "gpu") < 1.1 * error(tmp_path / "cpu") + 1e-4
    torch.testing.assert_close(logits(tmp_path / "gpu"), streamed(tmp_path / "gpu"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", cases(["opt", "bloom", "falcon", "gemma2", "gpt2", "phi3"], ["opt"]))
def test_every_kind_of_position_and_mask(family: str, tmp_path: Path) -> None:
    model, text = tiny_model(family, tmp_path), write_text(tmp_path)
    for out, device in {"cpu": "cpu", "gpu": DEVICE}.items():
        run(model, tmp_path / out, text, device=device, dtype="float32", refine__steps=2)
    assert error(tmp_path / "gpu") < 1.1 * error(tmp_path / "cpu") + 1e-4


@needs_gpu
@pytest.mark.parametrize("name", ["gptq-like", "refined", "refined codebooks", "teq"])
def test_a_run_on_a_gpu_resumes_to_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_model("llama", tmp_path, num_hidden_layers=3), write_text(tmp_path)

    def quantize(out: str) -> None:
        run(model, tmp_path / out, text, device="cuda", **RECIPES[name])

    quantize("straight")
    assert in_pieces(lambda: quantize("resumed"), tmp_path / "resumed", monkeypatch) >= 4
    assert weights(tmp_path / "straight") == weights(tmp_path / "resumed")


@needs_gpu
@pytest.mark.parametrize("name", ["gptq-like", "lcq", "refined", "refined linears", "activations", "transform, KL"])
def test_activations_in_host_memory_give_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny_model("llama", tmp_path, num_hidden_layers=3), write_text(tmp_path)
    run(model, tmp_path / "device", text, device="cuda", **RECIPES[name])
    used = keep_on_host(monkeypatch)
    run(model, tmp_path / "host", text, device="cuda", **RECIPES[name])
    assert len(used) == 1
    assert weights(tmp_path / "device") == weights(tmp_path / "host")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["gptq-like", "refined"])
def test_two_gpus_quantize_together(name: str, tmp_path: Path) -> None:
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    run(model, tmp_path / "alone", text, device="cuda", dtype="float32", **RECIPES[name])
    recipe = tmp_path / "alone" / "recipe.yaml"
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "qcli", "quantize", str(model)]
    command += ["--recipe", str(recipe), "--data", str(text), "--out", str(tmp_path / "together"), "-q"]
    subprocess.run([sys.executable, *command], check=True)
    assert error(tmp_path / "together") < 1.1 * error(tmp_path / "alone") + 1e-4


# ---------------------------------------------------------------------------------------------------- commands

Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a model and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("commands")
    with_merge(tiny_model("llama", folder)).rename(folder / "model")
    run(folder / "model", folder / "q", write_text(folder), device=DEVICE, method__bits=3)
    return folder


@pytest.fixture
def qcli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call a command with `--json`; what it prints."""
    monkeypatch.setenv("QCLI_CACHE", str(tmp_path / "cache"))

    def call(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()  # what the fixtures have printed
        assert app(args=[*map(str, arguments), "--json"], standalone_mode=False) in (None, 0), arguments
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return call


def short(made: Path) -> list[str]:
    return ["--data", str(made / "text.txt"), "--samples", "8", "--seq-len", "32", "--device", DEVICE]


@pytest.mark.parametrize("hessians", [pytest.param(True, marks=needs_gpu), False])
def test_calibrate(hessians: bool, qcli: Command, made: Path, tmp_path: Path) -> None:
    flags = ["--hessians"] if hessians else []
    for out in ("a", "b"):
        result = qcli("calibrate", made / "model", *short(made), *flags, "--out", tmp_path / out)
    assert len(result["layers"]) == 14
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


TRAINED = {"tables": ["--train", "tables"], "weights": ["--train", "tables,weights"], "blocks": ["--scope", "block"]}
DISTILLED = [f"{loss}, {what}" for loss in ("kl", "onebit", "dad") for what in TRAINED]


@pytest.mark.parametrize("name", cases([*DISTILLED, "kl, top"], ["dad, tables"]))
def test_distill(name: str, qcli: Command, made: Path, tmp_path: Path) -> None:
    loss, what = name.split(", ")
    flags = TRAINED.get(what, ["--set", "distill.teacher_top_k=20"])
    flags = ["--teacher", str(made / "model"), "--loss", loss, *flags, "--steps", "6", "--set", "distill.judgements=2"]
    for out in ("a", "b"):
        result = qcli("distill", made / "q", *flags, *short(made), "--out", tmp_path / out)
    assert result["outcome"]["after"] <= result["outcome"]["before"]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_eval(qcli: Command, made: Path) -> None:
    flags = ["--baseline", made / "model", "--data", made / "text.txt", "--window", 32, "--max-windows", 8, "--layers"]
    found = [qcli("eval", made / "q", *flags, "--device", device, "--no-cache") for device in ("cpu", DEVICE)]
    cpu, gpu = ((result["kl"], result["perplexity"][str(made / "text.txt")]["value"]) for result in found)
    assert gpu == pytest.approx(cpu, rel=1e-3)
    assert len(found[1]["blocks"]) == 2


@needs_gpu
def test_eval_of_tasks(qcli: Command, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")
    write_task(tmp_path / "tasks")
    flags = ["--tasks", "our_times", "--include-path", tmp_path / "tasks", "--no-cache", "--device"]
    cpu, gpu = (qcli("eval", made / "q", *flags, device)["tasks"] for device in ("cpu", "cuda"))
    assert gpu == cpu


@pytest.mark.parametrize("target", cases(registry.names("qcli.export.targets"), ["qcli"]))
def test_pack(target: str, qcli: Command, made: Path, tmp_path: Path) -> None:
    if target == "gguf":
        pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    flags = ["--method", "rtn", "--bits", 4, "--group-size", 32, "--symmetric", "--device", DEVICE]
    qcli("quantize", made / "model", *flags, "--out", tmp_path / "q")
    qcli("pack", tmp_path / "q", "--format", target, "--out", tmp_path / "p")
    qcli("verify", tmp_path / "p")
    assert qcli("inspect", tmp_path / "p")


def test_run(qcli: Command, made: Path, tmp_path: Path) -> None:
    text = json.dumps(str(made / "text.txt"))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {json.dumps(str(made / 'model'))}\n"
        f"calibration: {{data: {text}, samples: 8, seq_len: 32}}\n"
        "method: {bits: 3, group_size: 32}\n"
        "distill: {steps: 4, judgements: 2}\n"
        "pack: {format: qcli}\n"
        f"eval: {{perplexity: [{text}], window: 32, max_windows: 8}}\n"
    )
    result = qcli("run", tmp_path / "recipe.yaml", "--device", DEVICE, "--out", tmp_path / "out")
    assert result.keys() >= {"quantized", "distilled", "eval", "packed"}
    assert result["eval"]["kl"] > 0


def test_study(qcli: Command, made: Path, tmp_path: Path) -> None:
    text = json.dumps(str(made / "text.txt"))
    (tmp_path / "study.yaml").write_text(
        f"base: {{model: {json.dumps(str(made / 'model'))}, device: {DEVICE},\n"
        f"  calibration: {{data: {text}, samples: 4, seq_len: 32}},\n"
        f"  eval: {{perplexity: [{text}], window: 32, max_windows: 2}}}}\n"
        "grid: {method: [{name: rtn, bits: 3, group_size: 32}, {name: onebit}]}\n"
    )
    assert qcli("study", tmp_path / "study.yaml", "--out", tmp_path / "out")["done"] == 2


@pytest.mark.parametrize(
    "dtype", [pytest.param("bfloat16", marks=needs_gpu), pytest.param("float16", marks=needs_gpu), "float32"]
)
@pytest.mark.parametrize(
    "flags", [[], pytest.param(["--temperature", "1", "--top-p", "0.9"], marks=needs_gpu)], ids=str
)
def test_generate(dtype: str, flags: list[str], qcli: Command, made: Path) -> None:
    shared = ["--prompt", "2 times 3 is", "--max-new-tokens", 8, *flags, "--device", DEVICE, "--dtype", dtype]
    first, second = (qcli("generate", made / "q", *shared) for _ in range(2))
    assert first["tokens"] == second["tokens"]
    assert len(first["tokens"]) == 8 or first["stopped"] != "length"
    assert [*first["backends"]] == (["triton"] if GPU else [*first["backends"]])


@needs_gpu
@pytest.mark.parametrize(
    "flags", [["--baseline", "model", "--context", "16", "--new-tokens", "4"], ["--layers"]], ids=str
)
def test_bench(flags: list[str], qcli: Command, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert qcli("bench", "q", *flags, "--rounds", 2, "--device", "cuda")["device"] == "cuda"


def test_doctor(qcli: Command) -> None:
    report = qcli("doctor")
    assert any(device["device"].startswith(DEVICE) for device in report["devices"])
    triton = next(backend for backend in report["backends"] if backend["name"] == "triton")
    assert (triton["reason"] is None) == GPU


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


@needs_gpu
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


@needs_gpu
def test_a_static_cache_generates_the_same_in_a_compiled_graph(tmp_path: Path) -> None:
    """transformers compiles the decode step on GPUs, in CUDA graphs."""
    model = placed(tmp_path, device_map="cuda")
    prompt = TOKENS[:1, :8].cuda()
    dynamic = model.generate(prompt, **GENERATE)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **GENERATE), dynamic)


@needs_gpu
def test_blocks_in_main_memory_visit_the_gpu(tmp_path: Path) -> None:
    model = placed(tmp_path, device_map=places(0, "cpu"), offload_buffers=True)
    assert model.model.layers[1].mlp.up_proj.weight_packed.is_meta
    torch.testing.assert_close(logits_of(model), logits_of(placed(tmp_path)), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_blocks_on_two_gpus(tmp_path: Path) -> None:
    model = placed(tmp_path, device_map=places(0, 1))
    assert model.model.layers[1].mlp.up_proj.weight_packed.device == torch.device("cuda", 1)
    torch.testing.assert_close(logits_of(model), logits_of(placed(tmp_path)), rtol=1e-3, atol=1e-3)


@needs_gpu
def test_autocast_on_a_gpu(tmp_path: Path) -> None:
    model = placed(tmp_path, device_map="cuda")
    expected = logits_of(model)
    with torch.autocast("cuda", torch.bfloat16):
        found = logits_of(model)
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
