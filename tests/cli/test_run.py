"""`qcli run`."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qcli.utils import sealed
from tests.cli.conftest import Invoke


@pytest.fixture
def recipe(model: Path, text: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {json.dumps(str(model))}\n"
        "method: {name: rtn, bits: 3, group_size: 32}\n"
        "pack: {format: qcli}\n"
        f"eval: {{perplexity: [{json.dumps(str(text))}], window: 64, max_windows: 2}}\n"
    )
    return file


@pytest.mark.slow
def test_eval_json_is_the_same_wherever_model_texts_and_output_are(
    invoke: Invoke, model: Path, text: Path, tmp_path: Path
) -> None:
    written = []
    for place in ("one", "another place"):
        folder = tmp_path / place
        texts = [folder / "texts" / text.name, folder / text.name]  # of the same name
        shutil.copytree(model, folder / "model")
        texts[0].parent.mkdir()
        for number, copy in enumerate(texts):
            copy.write_text(f"{number} {text.read_text()}")
        recipe, out = folder / "recipe.yaml", folder / f"out of {place}"
        recipe.write_text(
            f"model: {json.dumps(str(folder / 'model'))}\n"
            "method: {name: rtn, bits: 3, group_size: 32}\n"
            f"eval: {{perplexity: {json.dumps(list(map(str, texts)))}, window: 64, max_windows: 2}}\n"
        )
        code, _, err = invoke("run", recipe, "--out", out, "-q")
        assert code == 0, err
        written.append((out / "eval.json").read_bytes())
    assert written[0] == written[1]
    evaluation = json.loads(written[0])
    assert (evaluation["model"], evaluation["baseline"]["model"]) == ("quantized", "model")
    assert len(evaluation["perplexity"]) == 2
    assert evaluation["perplexity"].keys() == evaluation["baseline"]["perplexity"].keys()
    assert not any(str(tmp_path) in name for name in evaluation["perplexity"])
    packing = ("pack", out / "quantized", "--format", "qcli", "--out", tmp_path / "packed", "-q")
    code, _, err = invoke(*packing, "--evaluation", out / "eval.json")
    assert code == 0, err


def test_stages_run_once(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, err = invoke("run", recipe, "--out", out, "--json")
    assert code == 0, err
    first = json.loads(stdout)
    assert first["skipped"] == []
    assert (out / "quantized" / "config.json").exists()
    assert (out / "packed" / "config.json").exists()
    assert json.loads((out / "eval.json").read_text()) == first["eval"]
    assert first["eval"]["kl"] > 0
    assert f"| KL to the base model | {first['eval']['kl']:.4g} a token, " in (out / "packed" / "README.md").read_text()

    code, stdout, err = invoke("run", recipe, "--out", out, "--json")
    assert code == 0
    again = json.loads(stdout)
    assert again["skipped"] == ["quantized", "eval.json", "packed"]
    assert again["eval"] == first["eval"]
    assert err.splitlines() == [f"{out / name}: done already, skipped" for name in again["skipped"]]


def test_damaged_records_and_figures_are_not_believed(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("run", recipe, "--out", out).code == 0
    for name, problem in (("eval.json", "was damaged or edited"), ("stages.json", "is damaged")):
        file, content = out / name, (out / name).read_bytes()
        for damaged in (
            content.replace(b"0.", b"1.", 1).replace(b'"bits": 3', b'"bits": 2'),
            content[:-20],
            b"[]",
            b"",
        ):
            file.write_bytes(damaged)
            code, stdout, err = invoke("run", recipe, "--out", out)
            assert (code, stdout) == (3, "") and f"error: {file} {problem}" in err
        file.write_bytes(content)
    assert invoke("run", recipe, "--out", out).code == 0


def test_stages_without_their_manifest_are_not_believed(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("run", recipe, "--out", out).code == 0
    manifest = out / "packed" / "qcli.manifest.json"
    manifest.unlink()
    code, stdout, err = invoke("run", recipe, "--out", out)
    assert (code, stdout) == (4, "") and f"error: {manifest.parent} is not a checkpoint that qcli wrote" in err


def test_stages_do_not_go_on_from_changed_weights(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("run", recipe, "--out", out).code == 0
    (out / "eval.json").unlink()
    file = out / "quantized" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, _, err = invoke("run", recipe, "--out", out)
    assert code == 4 and f"error: {file} has changed: its hash differs" in err
    assert not (out / "eval.json").exists()


@pytest.mark.parametrize("name", ["stages.json", "eval.json"])
def test_files_of_the_users_are_not_replaced(invoke: Invoke, recipe: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}')
    for force in ((), ("--force",)):
        code, _, err = invoke("run", recipe, "--out", out, *force)
        assert code == 3 and f"error: {out / name} " in err
    assert (out / name).read_text() == '{"mine": 1}'


def test_a_folder_that_cannot_be_is_refused_before_any_work(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for out, code, problem in (("link", 3, "link is a dangling symbolic link"), ("file", 2, "file is not a folder")):
        ended = invoke("run", recipe, "--out", tmp_path / out)
        assert ended.code == code and problem in ended.err


def test_missing_stage_alone_is_repeated(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("run", recipe, "--out", out).code == 0
    (out / "eval.json").unlink()
    code, stdout, _ = invoke("run", recipe, "--out", out, "--json")
    assert code == 0
    assert json.loads(stdout)["skipped"] == ["quantized", "packed"]
    assert (out / "eval.json").exists()


@pytest.mark.slow
def test_distilling_is_a_stage(invoke: Invoke, recipe: Path, text: Path, tmp_path: Path) -> None:
    """What is packed and evaluated is the distilled model."""
    out = tmp_path / "out"
    steps = "distill={steps: 12, tables_lr: 0.01, judgements: 3}"
    data = "calibration={data: " + json.dumps(str(text)) + ", samples: 12, seq_len: 32}"
    code, stdout, err = invoke("run", recipe, "--out", out, "--set", steps, "--set", data, "--json")
    assert code == 0, err
    first = json.loads(stdout)
    assert first["distilled"]["outcome"]["after"] < first["distilled"]["outcome"]["before"]
    for name in ("distilled", "packed"):
        assert json.loads((out / name / "qcli.manifest.json").read_text())["distilled"][0]["outcome"]["steps"] == 12
    assert invoke("run", recipe, "--out", tmp_path / "plain", "--set", data).code == 0
    assert first["eval"]["kl"] < json.loads((tmp_path / "plain" / "eval.json").read_text())["kl"]
    code, stdout, _ = invoke("run", recipe, "--out", out, "--set", steps, "--set", data, "--json")
    assert json.loads(stdout)["skipped"] == ["quantized", "distilled", "eval.json", "packed"]


@pytest.mark.slow
def test_distill_tunes_a_checkpoint(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    pupil, out = tmp_path / "pupil", tmp_path / "out"
    assert invoke("quantize", model, "--method", "rtn", "--bits", 3, "--group-size", 32, "--out", pupil).code == 0
    flags = ("--data", text, "--samples", 12, "--seq-len", 32, "--steps", 6, "--train", "tables,weights")
    code, stdout, err = invoke("distill", pupil, "--teacher", model, *flags, "--loss", "dad", "--out", out, "--json")
    assert code == 0, err
    assert json.loads(stdout)["outcome"]["steps"] == 6
    assert invoke("verify", out).code == 0
    code, stdout, err = invoke("distill", pupil, "--teacher", model, *flags, "--loss", "dat", "--out", tmp_path / "no")
    assert (code, stdout) == (2, "")
    assert err.startswith("error: --loss: must be")
    code, stdout, err = invoke("distill", pupil, "--teacher", model, *flags, "--dry-run", "--json")
    assert (code, json.loads(stdout)["layers"]) == (0, 14), err
    code, _, err = invoke("distill", model, "--teacher", model, *flags, "--out", tmp_path / "no")
    assert code == 2
    assert "is not a checkpoint that qcli wrote" in err


@pytest.mark.parametrize(
    ("change", "result", "difference"),
    [
        ("method.bits=4", "quantized", "recipe.method.bits was 3, is 4"),
        ("pack.shard_size=1GB", "packed", "pack.shard_size was '5GB', is '1GB'"),
        ("eval.window=32", "eval.json", "eval.window was 64, is 32"),
    ],
)
def test_other_settings_conflict_with_what_is_there(
    invoke: Invoke, recipe: Path, tmp_path: Path, change: str, result: str, difference: str
) -> None:
    out = tmp_path / "out"
    assert invoke("run", recipe, "--out", out).code == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, stdout, err = invoke("run", recipe, "--out", out, "--set", change)
    assert (code, stdout) == (3, "")
    assert f"error: {out / result} was made with other settings: {difference}" in err
    stale = {"quantized": ("quantized", "eval.json", "packed"), "eval.json": ("eval.json", "packed")}
    removed = ", ".join(str(out / name) for name in stale.get(result, (result,)))
    them = "them" if "," in removed else "it"
    assert err.splitlines()[-1] == f"hint: choose another --out, remove {removed}, or replace {them}: --force"
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before

    (out / "packed" / "thesis").touch()
    code, _, err = invoke("run", recipe, "--out", out, "--set", change, "--force")
    assert (code, err.splitlines()[0]) == (3, f"error: {out}/packed contains thesis, which qcli did not write")
    (out / "packed" / "thesis").unlink()
    code, _, err = invoke("run", recipe, "--out", out, "--set", change, "--dry-run")
    assert code == 3 and f"error: {out / result} was made with other settings: {difference}" in err
    plan = json.loads(invoke("run", recipe, "--out", out, "--set", change, "--force", "--dry-run", "--json").out)
    assert {name for name, what in plan["stages"].items() if what == "to be replaced"} == {
        *stale.get(result, (result,))
    }
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before, "all is checked first"

    code, stdout, err = invoke("run", recipe, "--out", out, "--set", change, "--force", "--json")
    assert code == 0, err
    replaced = stale.get(result, (result,))
    assert json.loads(stdout)["skipped"] == [
        name for name in ("quantized", "eval.json", "packed") if name not in replaced
    ]
    assert invoke("run", recipe, "--out", out, "--set", change).code == 0
    assert invoke("verify", out / "quantized").code == 0


def test_replacing_goes_on_where_it_was_interrupted(
    invoke: Invoke, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be replaced is not taken for what replaces it."""
    out, change = tmp_path / "out", ("--set", "method.bits=4", "--set", "eval.max_windows=1")
    assert invoke("run", recipe, "--out", out).code == 0
    old = {name: (out / name).read_bytes() for name in ("eval.json", "quantized/model.safetensors")}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place, remains in (
        ("qcli.quantization.quantize.quantize", set(old)),
        ("qcli.pipeline.record.write_bytes", {"eval.json"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            assert invoke("run", recipe, "--out", out, *change, "--force").code == 130
        assert {name for name in old if (out / name).read_bytes() == old[name]} == remains
        code, _, err = invoke("run", recipe, "--out", out, *change)
        assert code == 3 and "a run that was interrupted was replacing it" in err
    code, stdout, err = invoke("run", recipe, "--out", out, *change, "--force", "--json")
    assert code == 0, err
    result = json.loads(stdout)
    assert result["skipped"] == ["quantized"] and result["eval"]["bits_per_weight"] > 4
    assert not any((out / name).read_bytes() == old[name] for name in old)
    assert invoke("run", recipe, "--out", out, *change).code == 0


@pytest.mark.parametrize("finished", [False, True])
def test_force_starts_an_unfinished_stage_over(
    invoke: Invoke, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    out, flags = tmp_path / "out", ("--set", "eval=null", "--set", "pack=null")
    run = ("run", recipe, "--out", out, *flags)
    if finished:
        assert invoke(*run, "--set", "method.bits=2").code == 0
    before = {file: file.read_bytes() for file in (out / "quantized").glob("*")}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qcli.utils.run_folder.RunFolder.result", stop)
        assert invoke(*run, "--force").code == 130
    assert (out / "quantized.partial" / "journal.jsonl").exists()
    assert {file: file.read_bytes() for file in (out / "quantized").glob("*")} == before
    if not finished:
        code, _, err = invoke(*run, "--set", "method.bits=4")
        assert code == 3 and "recipe.method.bits was 3, is 4" in err
        assert err.splitlines()[-1] == "hint: repeat its settings to continue it, or start over: --force"
    code, stdout, err = invoke(*run, "--set", "method.bits=4", "--force", "--json")
    assert code == 0 and "recipe.method.bits was 3, is 4: starting over" in err, err
    assert json.loads(stdout)["quantized"]["resumed_blocks"] == 0
    assert not (out / "quantized.partial").exists()
    assert json.loads((out / "quantized" / "qcli.manifest.json").read_text())["recipe"]["method"]["bits"] == 4


@pytest.mark.parametrize(
    ("read", "place"),
    [
        ("eval.baseline={}", "quantized"),
        ("eval.perplexity=[{}]", "quantized/README.md"),
        ("distill={{data: {}, samples: 40, seq_len: 32}}", "packed/README.md"),
    ],
)
def test_nothing_is_replaced_that_a_later_stage_reads(
    invoke: Invoke, recipe: Path, tmp_path: Path, read: str, place: str
) -> None:
    out = tmp_path / "out"
    assert invoke("run", recipe, "--out", out).code == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    change = ("--set", "method.bits=4", "--set", read.format(out / place), "--force")
    for dry in ((), ("--dry-run",)):
        code, stdout, err = invoke("run", recipe, "--out", out, *change, *dry)
        assert (code, stdout) == (3, "")
        assert f"error: {out / Path(place).parts[0]} has what this command reads: {out / place}" in err
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_figures_that_replacing_does_not_change_are_believed(
    invoke: Invoke, recipe: Path, text: Path, tmp_path: Path
) -> None:
    """The text has fewer windows than either limit."""
    text.write_text(text.read_text()[:300])
    run = ("run", recipe, "--out", tmp_path / "out", "--set")
    assert invoke(*run, "eval.max_windows=50").code == 0
    before = (tmp_path / "out" / "eval.json").read_bytes()
    assert invoke(*run, "eval.max_windows=60", "--force").code == 0
    assert (tmp_path / "out" / "eval.json").read_bytes() == before
    assert invoke(*run, "eval.max_windows=60").code == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("eval.perplexity=[nowhere.txt]", "nowhere.txt: no such file"),
        ("eval.window=250", "short.txt: too short for evaluation: 30 tokens, but one window needs 250"),
        ("eval.baseline=nobody", "nobody"),
        ("distill={data: nowhere.txt, samples: 40, seq_len: 64}", "nowhere.txt: no such file"),
        ("distill={data: short.txt, samples: 40, seq_len: 64}", "short.txt: too short for calibration: 30 tokens"),
        ("pack.format=gptq", "q_proj is 3 bits asymmetric, gptq stores 4 and 8 bits symmetric"),
        ("distill={teacher_top_k: 400}", "distill.teacher_top_k: 400 is not below the vocabulary of 320"),
        ("eval.gates.max_kl=.inf", "must be a finite number, not inf"),
        ("pack.requantize=Q8_0", "pack.requantize=Q8_0: format qcli cannot requantize layers"),
    ],
)
def test_what_later_stages_refuse_is_reported_before_the_first(
    invoke: Invoke, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("s" * 30)
    texts = ("--set", "eval.perplexity=[short.txt]") if "window" in change else ()
    code, stdout, err = invoke("run", recipe, "--out", "out", *texts, "--set", change)
    assert (code, stdout) == (6 if "gptq" in change else 2, "")
    assert err.startswith("error: ") and problem in err
    assert not Path("out").exists()


def test_a_dry_run_checks_what_the_run_would(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    """Three asymmetric bits, which vLLM does not load."""
    flags = ("--out", tmp_path / "out", "--set", "pack.format=compressed-tensors")
    for dry in ((), ("--dry-run",)):
        code, out, err = invoke("run", recipe, *flags, *dry)
        assert (code, out) == (6, "") and err.startswith("error: vLLM does not load this")
    code, out, err = invoke("run", recipe, *flags, "--set", "pack.allow_refused=true", "--dry-run", "--json")
    assert code == 0, err
    assert len(json.loads(out)["layers"]) == 14
    assert json.loads(out)["stages"] == dict.fromkeys(("quantized", "eval.json", "packed"), "to be made")
    assert not (tmp_path / "out").exists()
    code, _, err = invoke("run", recipe, *flags, "--set", "pack.allow_refused=true")
    assert code == 0, err
    card = (tmp_path / "out" / "packed" / "README.md").read_text()
    assert "Does not load in vLLM" in card and "vllm serve" not in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "fused", "refusal"),
    [
        ("gptq", True, "3 bits symmetric, gptq stores 4 and 8 bits"),
        ("compressed-tensors", False, "engines that load compressed-tensors fuse them into one layer"),
        ("compressed-tensors", True, None),
    ],
)
def test_bits_to_be_chosen_must_fit_the_layout_whichever_they_are(
    invoke: Invoke, recipe: Path, text: Path, tmp_path: Path, layout: str, fused: bool, refusal: str | None
) -> None:
    own = f"bits: auto, target_bpw: 4.7, fused: {json.dumps(fused)}"
    method = f"method={{name: rtn, {own}, group_size: 32, symmetric: true}}"
    data = "calibration={data: " + json.dumps(str(text)) + ", samples: 12, seq_len: 32}"
    flags = ("--out", tmp_path / "out", "--set", method, "--set", data, "--set", f"pack.format={layout}")
    code, stdout, err = invoke("run", recipe, *flags, "--json")
    assert code == (6 if refusal else 0), err
    if refusal:
        assert refusal in err and not (tmp_path / "out").exists()
        later = [*flags[:6], "--set", "pack=null"]
        assert invoke("run", recipe, *later).code == 0, "without that layout it may be made"
        err = invoke("run", recipe, *flags).err
        assert "quantized: done already, skipped" in err, "what is there is left to pack"
    else:
        layers = json.loads(stdout)["quantized"]["layers"]
        assert len({layer["spec"]["bits"] for layer in layers}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["model", "calibration", "text"])
def test_what_was_read_may_not_have_changed(
    invoke: Invoke, recipe: Path, model: Path, text: Path, tmp_path: Path, changed: str
) -> None:
    """Figures of another model or text pass no gate."""
    other = tmp_path / "calibration.txt"
    other.write_text(text.read_text())
    flags = ("--out", tmp_path / "out", "--set", "method.name=gptq-like")
    data = ("--set", "calibration={data: " + json.dumps(str(other)) + ", samples: 4, seq_len: 32}")
    assert invoke("run", recipe, *flags, *data).code == 0
    if changed == "model":
        weights = load_file(model / "model.safetensors")
        save_file({name: 2 * tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    else:
        file = other if changed == "calibration" else text
        file.write_text(file.read_text()[::-1])
    code, stdout, err = invoke("run", recipe, *flags, *data)
    assert (code, stdout) == (3, "")
    assert f"{'eval.json' if changed == 'text' else 'quantized'} was made with other settings" in err


def test_without_out_the_folder_is_named_after_model_method_and_bits(
    invoke: Invoke, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = invoke("run", recipe, "--set", "eval=null", "--set", "pack=null")
    assert code == 0 and err.startswith("output: llama-0-rtn-3bit-run\n")
    assert Path("llama-0-rtn-3bit-run", "quantized", "config.json").exists()


def test_a_failed_gate_fails_the_run_and_can_be_moved(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = invoke("run", recipe, "--out", out, "--set", "eval.gates={max_kl: 1e-9}")
    assert code == 4
    assert "gate max_kl 1e-09: KL is" in err
    assert not (out / "packed").exists()
    code, stdout, err = invoke("run", recipe, "--out", out, "--set", "eval.gates={max_kl: 10}", "--json")
    assert code == 0, err
    [gate] = json.loads(stdout)["gates"]
    assert (gate["name"], gate["limit"], gate["ok"]) == ("max_kl", 10, True) and 0 < gate["value"] < 10
    assert (out / "packed").exists()
    code, _, err = invoke("run", recipe, "--out", out, "--set", "eval.gates={min_task: {piqa: 0.6}}")
    assert code == 2
    assert "gates.min_task names piqa, tasks does not" in err


def test_no_default_text_is_chosen_where_none_is_read(
    invoke: Invoke, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcli.pipeline.stages.default_text", lambda _: pytest.fail("asked"))
    assert invoke("run", recipe, "--out", tmp_path / "out").code == 0
    assert sealed.load_json(tmp_path / "out" / "stages.json")[2] is None


def test_a_recipe_of_a_text_on_the_hub_runs_without_one(
    invoke: Invoke, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, **_: object) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    flags = ("--set", "method.name=gptq-like", "--set", "pack=null", "--device", "cpu", "--out", tmp_path / "out")
    named = "calibration={data: wikitext2, samples: 2, seq_len: 32}", "eval.perplexity=[wikitext2]"
    given = [word for text in named for word in ("--set", text)]
    code, _, err = invoke("run", recipe, *flags, *given)
    assert code == 2 and "'wikitext2' could not be loaded" in err
    hint = err.partition("hint: ")[2].partition(";")[2].partition(";")[0]
    advice = shlex.split(hint[hint.index("--set") :])
    assert advice == ["--set", "calibration.data=builtin", "--set", "eval.perplexity=[builtin]"]
    code, _, err = invoke("run", recipe, *flags, *given, *advice)
    assert code == 0, err
    assert [*json.loads((tmp_path / "out" / "eval.json").read_text())["perplexity"]] == ["builtin"]
