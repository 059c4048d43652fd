"""`qcli quantize`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qcli.cli._out import checkpoint_name, quantized_name
from qcli.data.default_text import default_text
from qcli.models.families import Family
from qcli.recipe.load import load_recipe
from qcli.recipe.plugins import METHODS
from qcli.utils import registry
from tests.cli.conftest import Invoke
from tests.tiny import tiny_model


def test_flags_alone_write_a_checkpoint(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--method", "rtn", "--bits", 3, "--group-size", 32, "--symmetric", "--no-deterministic", "--out", out)
    code, stdout, _ = invoke("quantize", model, *flags, "--json")
    assert code == 0
    result = json.loads(stdout)
    assert result["out"] == str(out)
    assert result["bits_per_weight"] == 3.5
    assert len(result["layers"]) == 14
    assert (out / "config.json").exists()
    assert "\ndeterministic: false\n" in (out / "recipe.yaml").read_text()

    code, stdout, err = invoke("quantize", model, *flags)
    assert (code, stdout) == (3, "")
    assert err == f"error: {out} exists\nhint: choose another --out, or replace it: --force\n"


def test_without_out_the_folder_is_named_after_model_method_and_bits(
    invoke: Invoke, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, err = invoke("quantize", model, "--method", "rtn", "--bits", 3, "--group-size", 32, "--json")
    assert code == 0 and err.startswith("output: llama-0-rtn-3bit\n")
    assert json.loads(stdout)["out"] == "llama-0-rtn-3bit"
    assert Path("llama-0-rtn-3bit", "config.json").exists()


@pytest.mark.parametrize(
    ("model", "method", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "name: gptq-like, bits: 3", "SmolLM2-135M-gptq-like-3bit"),
        ("org/model@v1.0", "name: onebit", "model-onebit-1bit"),
        ("org/name/model-Q8_0.gguf@main", "name: rtn", "model-Q8_0-rtn-4bit"),
        ("/some/where/Llama-2.gguf", "name: dbllm", "Llama-2-dbllm-2bit"),
        ("gpt2", "bits: auto, target_bpw: 3.5", "gpt2-gptq-like-3.5bpw"),
        ("gpt2", "name: full-precision", "gpt2-full-precision"),
    ],
)
def test_names_of_results(model: str, method: str, name: str) -> None:
    assert quantized_name(load_recipe(None, {"model": model}, [f"method={{{method}}}"])) == name


def test_what_is_made_of_a_stage_has_the_name_of_its_run(tmp_path: Path) -> None:
    stage = tmp_path / "gpt2-3bit" / "quantized"
    stage.mkdir(parents=True)
    assert checkpoint_name(stage) == "quantized"
    (stage.parent / "stages.json").touch()
    assert checkpoint_name(stage) == "gpt2-3bit"
    beside = stage.parent / "other"  # a folder beside the stages is none of them
    assert checkpoint_name(beside) == "other"


def test_force_replaces_a_result_of_qclis_and_nothing_else(
    invoke: Invoke, model: Path, text: Path, tmp_path: Path
) -> None:
    out, packed, calibration = tmp_path / "out", tmp_path / "packed", tmp_path / "calibration"
    quantize = ("quantize", model, "--method", "rtn", "--group-size", 32, "--bits")
    assert invoke(*quantize, 3, "--out", out).code == 0
    out.with_name("empty").mkdir()
    assert invoke("pack", out, "--out", packed.with_name("empty")).code == 0, "an empty folder is no result"
    text_flags = ("--data", text, "--samples", 2, "--seq-len", 16)
    assert invoke("calibrate", model, *text_flags, "--hessians", "--out", calibration).code == 0
    assert invoke("pack", out, "--out", packed).code == 0
    for command in (
        (*quantize, 4, "--out", out),
        ("pack", out, "--format", "dense", "--out", packed),
        ("calibrate", model, *text_flags, "--seed", 1, "--out", calibration),
    ):
        folder = command[-1]
        before = {file: file.read_bytes() for file in folder.iterdir()}
        assert invoke(*command).code == 3
        added = folder / "thesis"
        added.touch()
        code, _, err = invoke(*command, "--force")
        assert (code, err.splitlines()[0]) == (3, f"error: {folder} contains thesis, which qcli did not write")
        added.unlink()
        assert {file: file.read_bytes() for file in folder.iterdir()} == before
        code, _, err = invoke(*command, "--force")
        assert code == 0, err
        assert {file: file.read_bytes() for file in folder.iterdir()} != before
        assert not folder.with_name(f"{folder.name}.partial").exists()
    assert invoke("verify", out).code == 0 and invoke("verify", packed).code == 0

    for refused, why in (
        ((*quantize, 3, "--out", model), "has what this command reads"),
        ((*quantize, 3, "--out", tmp_path), "has what this command reads"),
        ((*quantize, 3, "--set", f"eval.baseline={packed}", "--out", packed), "has what this command reads"),
        ((*quantize, 3, "--out", calibration), "is not a checkpoint that qcli wrote"),
        (("pack", out, "--out", out), "has what this command reads"),
        (("calibrate", model, *text_flags, "--out", out), "is not a folder written by `qcli calibrate`"),
        (("calibrate", model, "--data", calibration, "--out", calibration), "has what this command reads"),
    ):
        code, _, err = invoke(*refused, "--force")
        assert code == 3 and why in err
    (out / "README.md").write_text("mine")
    code, _, err = invoke(*quantize, 3, "--out", out, "--force")
    assert code == 3 and "contains README.md, which somebody has edited" in err


def test_calibrated_run_reports_layers_in_a_table(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    data = ("--data", text, "--samples", 4, "--seq-len", 32)
    code, out, err = invoke("quantize", model, *data, "--bits", 3, "--group-size", 32, "--out", tmp_path / "out")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if "gptq-like" in line]
    assert next(row[:3] for row in rows) == ["self_attn.q_proj", "2", "gptq-like"]
    assert len(rows) == 7
    assert [line.partition(",")[0] for line in err.splitlines()].count("quantize 2/2") == 1


def test_dry_run_writes_nothing_and_refuses_a_model_that_does_not_load(
    invoke: Invoke, model: Path, tmp_path: Path
) -> None:
    flags = ("quantize", model, "--bits", 3, "--dry-run", "--json", "--out", tmp_path / "out")
    plan = json.loads(invoke(*flags).out)
    assert [layer["bits"] for layer in plan["layers"]] == [3] * 14
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 384}))
    code, out, err = invoke(*flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {model}: tensors of another shape than config.json implies: model.embed_tokens")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_calibrated_method_estimates_the_time_after_the_plan(invoke: Invoke, model: Path) -> None:
    code, out, err = invoke("quantize", model, "--dry-run")
    assert code == 0, err
    assert re.fullmatch(
        r"time {13}about [0-9.]+ s, an estimate from a short probe of this machine", out.splitlines()[-1]
    )
    assert json.loads(invoke("quantize", model, "--dry-run", "--json").out)["seconds_estimate"] > 0
    assert not re.search("^time", invoke("quantize", model, "--method", "rtn", "--dry-run").out, re.MULTILINE)
    data_free = json.loads(invoke("quantize", model, "--method", "rtn", "--dry-run", "--json").out)
    assert data_free["seconds_estimate"] is None


def test_dry_run_predicts_the_size_to_the_byte(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    flags = ("quantize", model, "--method", "rtn", "--group-size", 32, "--out", tmp_path / "out", "--json")
    planned = json.loads(invoke(*flags, "--dry-run").out)
    assert invoke(*flags).code == 0
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert planned["bytes"] == written


def test_groups_that_do_not_divide_are_listed(invoke: Invoke, model: Path) -> None:
    code, out, err = invoke("quantize", model, "--group-size", 48, "--dry-run")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 3, "a line for each width"
    assert lines[0].endswith("model.layers.*.mlp.gate_proj, model.layers.*.mlp.up_proj (12 layers)")
    assert (
        "--group-size: groups of 48 do not divide its 128 inputs: model.layers.*.mlp.down_proj (2 layers)" in lines[1]
    )
    assert lines[2].startswith("hint: --group-size 64 divides every row; --group-tail ragged ")
    assert invoke("quantize", model, "--group-size", 48, "--group-tail", "ragged", "--dry-run").code == 0


def test_recipe_and_flags_together(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: not-there\nmethod: {name: rtn, bits: 2, group_size: 64}\n")
    plan = json.loads(
        invoke(
            "quantize",
            model,
            "--recipe",
            recipe,
            "--bits",
            5,
            "--set",
            "method.group_size=32",
            "--dry-run",
            "--json",
        ).out
    )
    assert plan["model"] == str(model)
    assert {(layer["bits"], layer["group_size"]) for layer in plan["layers"]} == {(5, 32)}


def test_errors_name_flag_or_model(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    code, out, err = invoke("quantize", "m", "--method", "rnt", "--bits", 12)
    assert (code, out) == (2, "")
    assert err == "error: --method: unknown method 'rnt'; did you mean 'rtn'?\n"
    code, out, err = invoke("quantize", model, "--group-size", 32, "--data", "nowhere.txt", "--dry-run")
    assert (code, out, err.splitlines()[0]) == (2, "", "error: nowhere.txt: no such file")
    code, _, err = invoke("quantize", tmp_path / "nothing", "--dry-run")
    assert code == 2
    assert str(tmp_path / "nothing") in err.splitlines()[0]


def test_help_names_every_method(invoke: Invoke) -> None:
    shown = " ".join(invoke("quantize", "--help").out.split()).replace("- ", "-")  # lines may end within a name
    assert f"{', '.join(registry.names(METHODS))}. Default: gptq-like." in shown


@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_are_explained_and_what_would_make_them_fewer(invoke: Invoke, tmp_path: Path, tied: bool) -> None:
    model = tiny_model("llama", tmp_path, tie_word_embeddings=tied)
    quantize = ("quantize", model, "--method", "rtn", "--bits", 2, "--group-size", 32, "--json")
    code, stdout, err = invoke(*quantize, "--out", tmp_path / "out")
    assert code == 0, err
    result = json.loads(stdout)
    found, before = result["contents"], result["source_contents"]
    assert sum(found.values()) == result["bytes"] and sum(before.values()) == result["source_bytes"]
    assert found["embedding"] == before["embedding"] > 0 and found["linears"] < before["linears"] / 4
    assert json.loads(invoke("inspect", tmp_path / "out", "--json").out)["contents"] == found
    assert json.loads(invoke("inspect", model, "--json").out)["contents"] == before
    assert "of which " in invoke("inspect", tmp_path / "out").out

    sections = ["embeddings", *([] if tied else ["lm_head"])]
    assert (found["head"] == 0) == tied
    assert result["smaller"]["set"] == [f"{section}.bits=8" for section in sections]
    sets = [argument for setting in result["smaller"]["set"] for argument in ("--set", setting)]
    code, shown, err = invoke(*quantize[:-1], *sets, "--out", tmp_path / "smaller")
    assert code == 0, err
    written = json.loads(invoke("inspect", tmp_path / "smaller", "--json").out)["bytes"]
    assert abs(written - result["smaller"]["bytes"]) < 600, "headers alone differ"
    assert "of which " in shown and "smaller with" not in shown


def test_measured_allocations_are_shown(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    auto = ("--bits", "auto", "--target-bpw", 3.8, "--group-size", 32, "--method", "rtn")
    code, out, err = invoke("quantize", model, *auto, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert {layer["bits"] for layer in plan["layers"]} == {3}, "what they are measured against"
    assert (plan["choices"]["target_bpw"], plan["choices"]["bits"]) == (3.8, [2, 3, 4, 5])
    shown = invoke("quantize", model, *auto, "--set", "overrides=[{match: '*.o_proj', method: {bits: 8}}]", "--dry-run")
    rows = {line.split()[0]: line.split()[4:8] for line in shown.out.splitlines() if "_proj" in line}
    assert rows["self_attn.q_proj"][-1] == "4" and rows["self_attn.q_proj"][:2] == ["rtn", "2"], shown.out
    assert rows["self_attn.o_proj"][1] == "8"
    assert "bits per weight  at most 3.8, the target" in " ".join(shown.out.split()).replace(
        "bits per weight ", "bits per weight  "
    )
    data = ("--data", text, "--samples", 8, "--seq-len", 32)
    code, out, err = invoke("quantize", model, *auto, *data, "--out", tmp_path / "out")
    assert code == 0, err
    assert "target" in out and "shipped" in out and "on 4 held-out samples" in out
    assert invoke("quantize", model, *auto, "--fused", "--symmetric", *data, "--out", tmp_path / "fused").code == 0
    packed = ("--format", "compressed-tensors", "--out", tmp_path / "packed")
    assert invoke("pack", tmp_path / "fused", *packed).code == 0
    code, _, err = invoke("quantize", model, "--bits", "auto", "--target-bpw", 1, "--group-size", 32, "--dry-run")
    assert code == 2
    assert err.startswith("error: --target-bpw: must be within 2.56")
    code, _, err = invoke("quantize", model, "--bits", "auto", "--dry-run")
    assert code == 2 and "method.target_bpw: required" in err


def test_fallbacks_of_many_experts_take_one_line(invoke: Invoke, text: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path)
    options = ("--data", text, "--samples", 2, "--seq-len", 8, "--group-size", 32)
    code, shown, err = invoke("quantize", model, *options, "--out", tmp_path / "out")
    assert code == 0, err
    lines = [line for line in shown.splitlines() if "an expert that saw" in line]
    assert any("model.layers.*.mlp.experts.*.down_proj, " in line for line in lines)
    assert len(lines) < 24  # there are that many layers in experts


def test_the_plan_lists_what_stays_as_it_is(invoke: Invoke, tmp_path: Path) -> None:
    _, shown, _ = invoke("quantize", tiny_model("qwen3_moe", tmp_path), "--group-size", 32, "--dry-run")
    assert "model.layers.*.mlp.gate.weight" in shown
    rows = {line.split()[0]: line.split()[1] for line in shown.splitlines() if "_proj" in line}
    assert rows["self_attn.q_proj"] == "2"
    assert rows["mlp.experts.*.down_proj"] == "8"


def test_transforms_that_can_scale_nothing_are_refused(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("granite", tmp_path)
    monkeypatch.setattr(Family, "folds_of", lambda *_: ())
    code, _, err = invoke("quantize", model, "--method", "teq", "--group-size", 32, "--dry-run")
    assert code == 6
    assert "teq scales channels, and none of granite can be shown to allow it" in err


def test_the_text_that_stood_for_the_default_is_recorded(
    invoke: Invoke, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    default_text.cache_clear()
    flags = ("--bits", 3, "--group-size", 32, "--samples", 2, "--seq-len", 32)
    code, _, err = invoke("quantize", model, *flags, "--out", tmp_path / "out")
    assert code == 0, err
    assert [line for line in err.splitlines() if "builtin" in line] == [
        "warning: HF_HUB_OFFLINE is set: the text is 'builtin', which comes with qcli, not 'wikitext2'; --data TEXT "
        "names another"
    ]
    manifest = json.loads((tmp_path / "out" / "qcli.manifest.json").read_text())
    assert manifest["calibration_text_identity"] == manifest["recipe"]["calibration"]["data"] == "builtin"
    assert "data: builtin" in (tmp_path / "out" / "recipe.yaml").read_text()
    evaluated = invoke("eval", tmp_path / "out", "--window", 32, "--max-windows", 2, "--json")
    assert list(json.loads(evaluated.out)["perplexity"]) == ["builtin"]
    assert json.loads(evaluated.out)["fitted_to"] == []
    code, _, err = invoke("quantize", model, *flags, "--data", "wikitext2", "--out", tmp_path / "named")
    assert code == 2 and "'wikitext2' could not be loaded" in err, "a named text does not fall back"
    default_text.cache_clear()


def test_a_run_keeps_the_text_that_it_began_with(
    invoke: Invoke, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("quantize", model, "--bits", 3, "--group-size", 32, "--samples", 2, "--seq-len", 32, "--device", "cpu")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert invoke(*flags, "--data", "builtin", "--out", whole).code == 0

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcli.data.tokens.named", lambda data: "builtin")
    with monkeypatch.context() as stopped:
        stopped.setattr("qcli.quantization.sequential.Sequential.advance", interrupted)
        assert invoke(*flags, "--out", resumed).code == 130
    monkeypatch.setattr("qcli.data.tokens.named", lambda data: pytest.fail("chosen again"))
    code, _, err = invoke(*flags, "--out", resumed, "--resume", "required")
    assert code == 0, err
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_texts_of_several_kinds_calibrate_together(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Two and two is four."}]}
    (tmp_path / "chats.json").write_text(json.dumps([chat] * 9))
    mixture = f"[{text}, {{path: {tmp_path / 'chats.json'}, weight: 0.5}}]"
    flags = ("--bits", 3, "--group-size", 32, "--samples", 6, "--seq-len", 32)
    code, _, err = invoke("quantize", model, *flags, "--data", mixture, "--out", tmp_path / "out")
    assert code == 0, err
    recorded = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "path: text.txt" in recorded and "path: chats.json" in recorded and str(tmp_path) not in recorded
    identity = json.loads((tmp_path / "out" / "qcli.manifest.json").read_text())["calibration_text_identity"]
    assert [len(each) for each in identity.split(" + ")] == [64, 64]
    evaluated = invoke("eval", tmp_path / "out", "--data", text, "--window", 32, "--max-windows", 2, "--json")
    assert json.loads(evaluated.out)["fitted_to"] == [str(text)], "also one of several texts has been seen"


@pytest.mark.parametrize("flags", [("--method", "rtn"), ("--seed", 1, "--samples", 2, "--seq-len", 32)], ids=str)
def test_a_dry_run_refuses_the_output_that_the_run_refuses(
    flags: tuple[object, ...], invoke: Invoke, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = ("quantize", model, *flags, "--group-size", 32, "--data", text, "--device", "cpu", "--out", out)
    publish = "qcli.quantization.job.publish_checkpoint"
    with monkeypatch.context() as stopped:
        stopped.setattr(publish, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert invoke(*given).code == 130
    before = {file: file.read_bytes() for file in (tmp_path / "out.partial").iterdir() if file.is_file()}
    assert invoke(*given, "--dry-run").code == 0, "it would continue"
    code, printed, err = invoke(*given, "--bits", 3, "--dry-run")
    assert (code, printed) == (3, "") and "holds an interrupted run with other settings: recipe.method.bits" in err
    assert invoke(*given, "--bits", 3, "--dry-run", "--resume", "never").code == 0
    assert before == {file: file.read_bytes() for file in (tmp_path / "out.partial").iterdir() if file.is_file()}
    assert invoke(*given).code == 0
    code, printed, err = invoke(*given, "--dry-run")
    assert (code, printed) == (3, "") and "out exists" in err
    assert invoke(*given, "--dry-run", "--force").code == 0
    assert invoke(*given[:-1], tmp_path / "new", "--dry-run", "--resume", "required").code == 3
    assert not (tmp_path / "new.partial").exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=str)
def test_chats_take_a_model_with_a_template(more: tuple[str, ...], invoke: Invoke, model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    chat = {"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Two and two is four."}]}
    chats = tmp_path / "chats.jsonl"
    chats.write_text(f"{json.dumps(chat)}\n" * 9)
    flags = ("--group-size", 32, "--samples", 6, "--seq-len", 32, "--out", tmp_path / "out")
    code, printed, err = invoke("quantize", model, *flags, "--data", chats, *more)
    refusal = f"{chats}:1 is a chat, and {model} has no chat template"
    assert (code, printed) == (2, "") and refusal in err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {json.dumps(str(model))}\ncalibration: {{data: {json.dumps(str(chats))}}}\n")
    for method in ("{group_size: 32}", "{name: rtn, bits: auto, target_bpw: 4.7, group_size: 32}"):
        code, printed, err = invoke("run", recipe, "--set", f"method={method}", "--out", tmp_path / "out", *more)
        assert (code, printed) == (2, "") and refusal in err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "some-org/mistyped"),
        ("eval", "some-org/mistyped"),
        ("calibrate", "some-org/mistyped"),
        ("distill", "some-org/mistyped", "--teacher", "some-org/teacher"),
        ("pack", "some-org/mistyped", "--format", "dense"),
        ("run", "recipe.yaml"),
    ],
    ids=lambda command: command[0],
)
def test_a_mistyped_model_is_all_that_is_said(
    command: tuple[str, ...], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    default_text.cache_clear()
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("model: some-org/mistyped\n")
    code, printed, err = invoke(*command)
    assert (code, printed) == (2, "")
    assert err.startswith("error: some-org/mistyped is not a local folder, HF_HUB_OFFLINE is set") and "\nhint: " in err
    assert "output" not in err and "warning" not in err


def test_a_failed_start_leaves_no_folder(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    flags = ("--group-size", 32, "--samples", 2, "--seq-len", 200_000)
    assert invoke("quantize", model, *flags, "--data", text, "--out", tmp_path / "out").code == 2
    assert not (tmp_path / "out.partial").exists()
