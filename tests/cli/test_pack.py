"""`qcli pack`, `verify` and `inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qcli.evaluation.results import read_evaluation
from qcli.inference.backend import choose
from qcli.inference.backends import cpu
from qcli.utils.errors import UsageError
from qcli.utils.registry import names
from tests.cli.conftest import Invoke
from tests.manifests import edit_manifest
from tests.tiny import with_merge


@pytest.fixture
def checkpoint(invoke: Invoke, model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "quantized"
    flags = (
        "--method",
        "rtn",
        "--bits",
        3,
        "--group-size",
        32,
        "--set",
        "overrides=[{match: '*.k_proj', dense: true}]",
    )
    assert invoke("quantize", model, *flags, "--out", out).code == 0
    return out


def test_packed_checkpoint_verifies(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    code, out, err = invoke("pack", checkpoint, "--out", packed, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["max_logit_difference"] == 0
    assert result["bytes"] == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    code, out, err = invoke("verify", packed)
    assert code == 0, err
    assert str(packed) in out
    code, _, err = invoke("pack", checkpoint, "--out", packed)
    assert code == 3
    spaced = tmp_path / "with blank"
    shown = invoke("pack", checkpoint, "--out", spaced).out
    assert f"hf upload 'YOUR-NAME/with blank' '{spaced}'" in " ".join(shown.split())


def test_card_takes_only_an_evaluation_of_this_checkpoint(
    invoke: Invoke, model: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    flags = ("--baseline", model, "--data", text, "--window", 64, "--max-windows", 2, "--json")
    file = tmp_path / "eval.json"
    file.write_text(invoke("eval", model, checkpoint, *flags).out)
    code, _, err = invoke("pack", checkpoint, "--out", tmp_path / "packed", "--evaluation", file)
    assert code == 0, err
    kl = json.loads(file.read_text())["models"][1]["kl"]
    assert f"| KL to the base model | {kl:.4g} a token, " in (tmp_path / "packed" / "README.md").read_text()
    file.write_text(invoke("eval", model, *flags).out)
    for content, message in (
        (None, f"{file} is an evaluation of {model}"),
        ("[]", "is not the output of `qcli eval --json`"),
        (invoke("inspect", checkpoint, "--json").out, "is not the output of `qcli eval --json`"),
    ):
        file.write_text(content or file.read_text())
        code, out, err = invoke("pack", checkpoint, "--out", tmp_path / "other", "--evaluation", file)
        assert (code, out) == (2, "")
        assert message in err
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kl", "small"),
        ("top1_agreement", None),
        ("perplexity", 3),
        ("perplexity", {"text": {"value": 2.0, "windows": 1}}),
        ("baseline", {"perplexity": {}}),
        ("tasks", {"piqa": {"metric": "acc", "score": [], "baseline": None, "samples": 1}}),
        ("fitted_to", [1]),
        ("model", "\0"),
    ],
)
def test_an_evaluation_with_a_wrong_value_is_refused(tmp_path: Path, key: str, value: object) -> None:
    file, model = tmp_path / "eval.json", tmp_path / "model"
    measured = {"value": 2.0, "windows": 1, "window": 8}
    losses = {"kl": 0.5, "worst_window_kl": 0.5, "top1_agreement": 0.5, "fitted_to": []}
    evaluation = {
        "model": str(model),
        "perplexity": {"text": measured},
        "baseline": {"model": "m", "perplexity": {"text": None}},
        "tasks": {},
        **losses,
    }
    file.write_text(json.dumps(evaluation))
    assert read_evaluation(file, model) == evaluation
    file.write_text(json.dumps({**evaluation, key: value}))
    with pytest.raises(UsageError, match="is not the output of `qcli eval --json`"):
        read_evaluation(file, model)


def test_changed_bytes_are_detected(invoke: Invoke, checkpoint: Path) -> None:
    assert json.loads(invoke("verify", checkpoint, "--json").out)["layers"] == 12
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = invoke("verify", checkpoint, "--json")
    assert (code, out) == (4, "")
    assert "model.safetensors" in err.splitlines()[-1]


def test_inspect_shows_layers_and_origin(invoke: Invoke, model: Path, checkpoint: Path) -> None:
    code, out, _ = invoke("inspect", checkpoint, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["model"] == model.name
    assert {layer["bits"] for layer in report["layers"] if layer["method"]} == {3}
    code, out, _ = invoke("inspect", checkpoint)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines() if "recipe override" in line] == [["self_attn.k_proj", "2"]]


def test_inspect_tells_what_computes_the_layers_here_and_why_nothing_faster(
    invoke: Invoke, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose.cache_clear()
    monkeypatch.setattr(cpu, "kernels", lambda: "there is no C++ compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = json.loads(invoke("inspect", checkpoint, "--json").out)
    assert report["runs_on"] == {"device": "cpu", "dtype": "float32"}
    missed = [entry for entry in report["missed_backends"] if entry["name"] == "cpu"]
    assert missed == [{"name": "cpu", "reason": "there is no C++ compiler", "layers": 12}]
    assert {layer.get("backend") for layer in report["layers"] if layer["method"]} == {"reference"}
    assert "not cpu, in 12 layers: there is no C++ compiler" in invoke("inspect", checkpoint).out
    choose.cache_clear()
    monkeypatch.setattr(cpu, "kernels", lambda: None)
    report = json.loads(invoke("inspect", checkpoint, "--json").out)
    assert {layer["backend"] for layer in report["layers"] if layer["method"]} == {"cpu"}
    assert not report["missed_backends"]
    choose.cache_clear()


# `stored_as` and bits per weight of a 4-bit layer with 64 inputs: codes, scales, and what the layout adds.
STORED = {
    "qcli": (None, 4 + 16 / 32),
    "compressed-tensors": (None, 4 + 16 / 32 + 128 / 64**2),  # weight_shape
    "awq": (None, 4 + (16 + 4) / 32),
    "gptq": (None, 4 + (16 + 4) / 32 + 32 / 64),  # zero points, and g_idx for each input
    "gguf": ("Q4_0", 4 + 16 / 32),
    "dense": ("F32", 32),
}


@pytest.fixture
def symmetric(invoke: Invoke, model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "symmetric"
    flags = ("--method", "rtn", "--bits", 4, "--group-size", 32, "--symmetric", "--out", out)
    assert invoke("quantize", with_merge(model), *flags).code == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("format", names("qcli.export.targets"))
def test_every_target_is_inspected_and_verified(
    invoke: Invoke, model: Path, symmetric: Path, tmp_path: Path, format: str
) -> None:
    packed = tmp_path / "packed"
    code, _, err = invoke("pack", symmetric, "--out", packed, "--format", format)
    assert code == 0, err
    report = json.loads(invoke("inspect", packed, "--json").out)
    assert (report["packed_as"], report["model"], len(report["layers"])) == (format, model.name, 14)
    stored_as, bits = STORED[format]
    layer = next(layer for layer in report["layers"] if layer["name"] == "model.layers.1.self_attn.o_proj")
    assert layer.get("stored_as") == stored_as
    assert layer["bits_per_weight"] == pytest.approx(bits)
    assert (layer["method"], layer["bits"], layer["group_size"]) == ("rtn", 4, 32)
    assert 0 < layer["error"] < 1
    shown = {line.split("  ")[0].strip(): line for line in invoke("inspect", packed).out.splitlines()}
    assert shown["packed as"].split()[-1] == format
    assert shown["made from"].split("  ")[-1].strip() == f"{model.name} (llama)"
    code, out, err = invoke("verify", packed, "--json")
    assert code == 0, err
    checked = json.loads(out)
    assert (checked["layers"], checked["unlisted"]) == (14, [])
    assert checked["bits_per_weight"] == report["bits_per_weight"]
    (weights,) = (file for file in packed.iterdir() if file.suffix in (".safetensors", ".gguf"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, out, err = invoke("verify", packed, "--json")
    assert (code, out) == (4, "")
    assert weights.name in err


@pytest.mark.parametrize("format", ["gguf", "dense"])
def test_bits_are_those_of_the_quantized_layers(invoke: Invoke, model: Path, tmp_path: Path, format: str) -> None:
    """Also in layouts where nothing in the weights tells quantized layers from dense ones."""
    native, packed = tmp_path / "native", tmp_path / "packed"
    flags = (
        "--method",
        "rtn",
        "--group-size",
        32,
        "--symmetric",
        "--set",
        "overrides=[{match: '*.q_proj', dense: true}]",
    )
    assert invoke("quantize", with_merge(model), *flags, "--out", native).code == 0
    packing = json.loads(invoke("pack", native, "--out", packed, "--format", format, "--json").out)
    bits = {"gguf": 4.5, "dense": 32.0}[format]
    inspected, verified = (json.loads(invoke(command, packed, "--json").out) for command in ("inspect", "verify"))
    assert {report["bits_per_weight"] for report in (packing, inspected, verified)} == {bits}
    assert packing["model_bits_per_weight"] == inspected["model_bits_per_weight"] > 4.5
    assert sum(layer["method"] is None for layer in inspected["layers"]) == 2


def test_manifest_of_other_layers_is_detected(invoke: Invoke, symmetric: Path, tmp_path: Path) -> None:
    for format in ("gguf", "gptq"):
        packed = tmp_path / format
        assert invoke("pack", symmetric, "--out", packed, "--format", format).code == 0
        edit_manifest(packed, lambda text: text.replace("model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"))
        for command in ("inspect", "verify"):
            code, out, err = invoke(command, packed)
            assert (code, out) == (4, "")
            assert "layers.2.mlp.up_proj" in err or "layers.1.mlp.up_proj" in err


def test_inspect_reports_requantized_layers(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    """They have no error: it was measured before."""
    native, packed = tmp_path / "native", tmp_path / "packed"
    sets = ("--set", "overrides=[{match: '*.down_proj', method: {group_size: 32}}]")
    flags = ("--method", "rtn", "--group-size", 16, "--symmetric", *sets, "--out", native)
    assert invoke("quantize", with_merge(model), *flags).code == 0
    assert invoke("pack", native, "--out", packed, "--format", "gguf", "--requantize", "Q8_0").code == 0
    report = json.loads(invoke("inspect", packed, "--json").out)
    layers = {layer["name"].removeprefix("model.layers.0."): layer for layer in report["layers"]}
    rounded, exact = layers["mlp.up_proj"], layers["mlp.down_proj"]
    assert (rounded["stored_as"], rounded["bits_per_weight"], "error" in rounded) == ("Q8_0", 8.5, False)
    assert (exact["stored_as"], exact["bits_per_weight"], "error" in exact) == ("Q4_0", 4.5, True)
    assert report["notes"] == {"exact": "2 layers Q4_0", "rounded": "12 layers to Q8_0"}
    assert "12 layers to Q8_0" in invoke("inspect", packed).out


def test_inspect_shows_the_other_sections_of_the_recipe(
    invoke: Invoke, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--method", "rtn", "--group-size", 32, "--data", text, "--samples", 6, "--seq-len", 32)
    sets = ("low_rank.rank=2", "refine.steps=1", "activations.bits=6", "transforms=[{name: teq, steps: 1}]")
    assert invoke("quantize", model, *flags, *(f"--set={text}" for text in sets), "--out", out).code == 0
    lines = {line.split("  ")[0].strip(): line for line in invoke("inspect", out).out.splitlines()}
    layer = next(line for name, line in lines.items() if name.startswith("self_attn.q_proj"))
    assert layer.split()[:8] == ["self_attn.q_proj", "2", "64,", "64", "rtn", "4", "32", "2"]
    assert "rank 2" in lines["low rank"]
    assert "steps 1" in lines["refined"]
    assert "bits 6" in lines["activations"]
    assert "name teq" in lines["transforms"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "gguff"), "--format: unknown format 'gguff'"),
        (("--shard-size", "5 gigs"), "--shard-size: must be written as '500MB' or '5GB', not '5 gigs'"),
    ],
)
def test_wrong_flags_are_named(invoke: Invoke, tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    code, out, err = invoke("pack", tmp_path, "--out", tmp_path / "packed", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


def test_folders_that_qcli_did_not_write_are_not_verified(invoke: Invoke, model: Path) -> None:
    code, out, err = invoke("verify", model)
    assert code in (2, 4)
    assert out == ""
    assert err.splitlines()[-1].startswith(("error: ", "hint: "))


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_what_vllm_refuses_exits_with_6_before_any_work(
    invoke: Invoke, model: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    native, packed = tmp_path / "native", tmp_path / "packed"
    assert invoke("quantize", model, "--method", "rtn", "--bits", 3, "--group-size", 32, "--out", native).code == 0
    arguments = ("pack", native, "--format", "compressed-tensors", "--out", packed)
    code, out, err = invoke(*arguments, *flags)
    assert (code, out) == (6, "")
    assert err.startswith("error: vLLM does not load this as compressed-tensors: ")
    assert "--symmetric or --bits 4" in err.splitlines()[-1] and "--allow-refused" in err.splitlines()[-1]
    code, out, err = invoke(*arguments, "--allow-refused", "--json", *flags)
    assert code == 0, err
    assert json.loads(out)["notes"]["vLLM"].startswith("does not load it: model.layers.0.self_attn.q_proj has 3 bits")
    assert packed.exists() == (not flags)


def test_a_dry_run_of_pack_writes_nothing(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = invoke("pack", checkpoint, "--format", "gguf", "--dry-run")
    assert (code, out) == (6, ""), "the tokenizer has no merges"
    code, out, err = invoke("pack", checkpoint, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out) == {"run": str(checkpoint), "format": "qcli", "layers": 12, "rounded": 0, "notes": {}}
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_without_out_the_folder_has_checkpoint_and_format_in_its_name(
    invoke: Invoke, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = invoke("pack", checkpoint)
    assert code == 0 and err.startswith(f"output: {checkpoint.name}-qcli\n")
    assert Path(f"{checkpoint.name}-qcli", "config.json").exists()
