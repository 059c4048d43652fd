"""`qcli eval`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qcli.utils.errors import UsageError
from tests.cli.conftest import Invoke


def test_json_holds_the_protocol_and_the_losses(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert invoke("quantize", model, "--method", "rtn", "--bits", 8, "--out", small).code == 0
    flags = ("--data", text, "--window", 64, "--max-windows", 4)
    code, out, _ = invoke("eval", small, "--baseline", model, *flags, "--json")
    assert code == 0
    result = json.loads(out)
    score = result["perplexity"][str(text)]
    assert {key: score[key] for key in ("window", "stride", "bos", "windows", "tokens")} == {
        "window": 64,
        "stride": 64,
        "bos": False,
        "windows": 4,
        "tokens": 4 * 63,
    }
    assert 0 <= result["kl"] < 1e-3 and result["kl_word"] == "near-lossless"
    assert re.search(
        r"^KL to baseline +\S+ \(near-lossless\)$", invoke("eval", small, "--baseline", model, *flags).out, re.M
    )
    assert result["top1_agreement"] > 0.9
    assert 8 < result["bits_per_weight"] < 9 < result["model_bits_per_weight"]
    assert result["bytes"] == sum(file.stat().st_size for file in small.glob("*.safetensors"))


def test_a_dry_run_checks_and_runs_no_model(
    invoke: Invoke, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a model is run")

    monkeypatch.setattr("qcli.models.stream.ModelStream.__init__", fail)
    flags = ("--window", 64, "--max-windows", 2, "--dry-run")
    code, out, err = invoke("eval", model, "--baseline", model, "--data", text, "--data", "self", *flags, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert [(row["model"], row["baseline"]) for row in plan["models"]] == [(str(model), False), (str(model), True)]
    assert plan["texts"] == [
        {"text": str(text), "windows": 2, "window": 64},
        {"text": "self", "windows": None, "window": None},
    ]
    assert plan["memory"]["peak"] > 0
    shown = invoke("eval", model, "--data", text, *flags).out
    assert "2 windows of 64 tokens" in shown and re.search(r"^peak memory +about ", shown, re.MULTILINE)
    code, out, err = invoke("eval", model, "--data", "nowhere.txt", "--dry-run")
    assert (code, out) == (2, "") and "nowhere.txt: no such file" in err


def test_begin_tokens_follow_the_tokenizer_and_the_flag(
    invoke: Invoke, model: Path, text: Path, tmp_path: Path
) -> None:
    flags = ("--data", text, "--window", 64, "--max-windows", 2)
    assert "begin token" not in invoke("eval", model, *flags).out
    shown = invoke("eval", model, *flags, "--bos", "true").out
    assert re.search(r"^begin token +before every window$", shown, re.MULTILINE)
    assert (
        "2 windows of 64 tokens, each behind a begin token, 126 scored"
        in invoke("eval", model, model, *flags, "--bos", "true").out
    )
    code, _, err = invoke("eval", model, *flags, "--bos", "yes")
    assert (code, err.splitlines()[0]) == (2, "error: --bos must be auto, true or false, not 'yes'")
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": None}))
    code, _, err = invoke("eval", model, *flags, "--bos", "true")
    assert code == 2 and "bos is true, but its tokenizer has no begin token" in err


def test_table_and_errors(invoke: Invoke, model: Path, text: Path) -> None:
    code, out, _ = invoke("eval", model, "--data", text, "--window", 64, "--max-windows", 2)
    assert code == 0
    assert "perplexity" in out
    assert "KL" not in out
    code, out, err = invoke("eval", model, "--data", "wikitext", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "wikitext2" in err


def test_the_table_tells_of_text_that_a_model_was_calibrated_on(
    invoke: Invoke, model: Path, text: Path, tmp_path: Path
) -> None:
    small, warning = tmp_path / "small", f"{text}: on other text it loses more"
    fit = ("--method", "gptq-like", "--bits", 4, "--group-size", 32, "--data", text, "--samples", 2, "--seq-len", 32)
    assert invoke("quantize", model, *fit, "--out", small).code == 0
    flags = ("--data", text, "--window", 64, "--max-windows", 2)
    assert re.search(rf"^fitted to +{re.escape(warning)}$", invoke("eval", small, *flags).out, re.MULTILINE)
    both = invoke("eval", model, small, *flags).out
    assert f"{small} was fitted to {warning}" in both and f"{model} was fitted" not in both


def test_several_models_are_compared_and_gates_name_what_fails(
    invoke: Invoke, model: Path, text: Path, tmp_path: Path
) -> None:
    eight, two = tmp_path / "eight", tmp_path / "two"
    for bits, folder in ((8, eight), (2, two)):
        small = ("--method", "rtn", "--bits", bits, "--group-size", 32)
        assert invoke("quantize", model, *small, "--out", folder).code == 0
    flags = ("--baseline", model, "--data", text, "--window", 64, "--max-windows", 2)
    code, out, err = invoke("eval", eight, two, *flags, "--max-kl", 0.001, "--json")
    assert code == 4
    models = json.loads(out)["models"]
    assert [entry["model"] for entry in models] == [str(eight), str(two)]
    assert models[0]["kl"] < 0.001 < models[1]["kl"]
    for entry, passed in zip(models, (True, False), strict=True):
        gate = {"name": "max_kl", "of": None, "limit": 0.001, "value": entry["kl"], "ok": passed}
        assert entry["gates"] == [gate]
    assert err.splitlines()[-2].startswith(f"error: {two}: gate max_kl 0.001: KL is ")
    worst = models[1]["perplexity"][str(text)]["worst_window"]
    code, out, err = invoke("eval", two, *flags, "--max-window-kl", models[1]["kl"])
    assert code == 4, "one of two windows is above their mean"
    assert f"window {worst} of {text}" in out
    assert f"gate max_window_kl {models[1]['kl']:g}: KL is " in err and f"in window {worst} of {text}" in err
    assert str(eight) not in "".join(line for line in err.splitlines() if line.startswith("error"))
    alone = invoke("eval", two, *flags, "--json")
    assert json.loads(alone.out)["kl"] == models[1]["kl"]
    code, out, _ = invoke("eval", eight, two, *flags, "--max-kl", 10, "--max-ppl-ratio", 10)
    assert code == 0
    assert out.count("\n") >= 5 and "bits/weight" in out
    assert out.count("passes all 2 gates") == 2
    code, out, _ = invoke("eval", eight, two, *flags, "--markdown")
    header, rule, *rows = out.replace("\\_", "_").strip().splitlines()
    assert header.startswith("| model | bits/weight | size | perplexity")
    assert rule == f"|{'|'.join(['---'] * 7)}|"
    assert rows.pop() == f"{text}: 2 windows of 64 tokens, 126 scored"
    scale = "KL: up to 0.02 near-lossless, up to 0.1 mild, up to 0.5 noticeable, above severe"
    assert [rows.pop() for _ in range(3)] == ["", scale, ""]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in (model, eight, two)]


def test_errors_by_layer_are_drawn(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    small, figure = tmp_path / "small", tmp_path / "layers.png"
    assert invoke("quantize", model, "--method", "rtn", "--bits", 4, "--out", small).code == 0
    flags = ("--baseline", model, "--data", text, "--window", 64, "--max-windows", 2, "--plot", figure)
    for wrong in ((small, *flags), (small, model, *flags, "--layers")):
        code, out, err = invoke("eval", *wrong)
        assert (code, out) == (2, "") and err.startswith("error: --plot draws the errors of one model's layers\n")
    code, _, err = invoke("eval", small, *flags, "--layers")
    assert code == 0 and f"drawn: {figure}" in err and figure.read_bytes()[:4] == b"\x89PNG"


def test_tasks_given_twice_are_all_run(invoke: Invoke, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(names: list[str], *_: object, **__: object) -> None:
        raise UsageError(f"tasks: {'|'.join(names)}")

    monkeypatch.setattr("qcli.evaluation.tasks.Tasks", record)
    outcome = invoke("eval", model, "--tasks", "a,b", "--tasks", "c", "--tasks", "a")
    assert (outcome.code, outcome.err) == (2, "error: tasks: a|b|c\n")


def test_gates_that_cannot_apply_are_refused(invoke: Invoke, model: Path, text: Path) -> None:
    for flags, problem in (
        (("--max-kl", 1), "--max-kl needs a baseline"),
        (("--limit", 5), "--limit needs --tasks"),
        (("--json", "--markdown"), "--json and --markdown: choose one"),
        (("--min-task", "x=1"), "--min-task names x, which is not among --tasks"),
        (("--min-task", "x"), "'x' is not TASK=NUMBER"),
        (("--baseline", model, "--tasks", "x", "--max-window-kl", 1), "--max-window-kl needs text"),
        (("--baseline", model, "--max-task-drop", 1), "--max-task-drop needs --tasks"),
        (("--baseline", model, "--max-kl", -1), "--max-kl: must be at least 0"),
        (("--baseline", model, "--max-ppl-ratio", "nan"), "--max-ppl-ratio: "),
    ):
        code, out, err = invoke("eval", model, *flags)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and problem in err


@pytest.mark.slow
def test_names_of_tasks_may_have_blanks_around_them_but_none_is_empty(invoke: Invoke, model: Path) -> None:
    for names in ("arc_easy,,piqa", "arc_easy, ", ""):
        code, _, err = invoke("eval", model, "--tasks", names)
        assert code == 2
        assert "a task name is empty" in err
    code, _, err = invoke("eval", model, "--tasks", "arc_easy, piqaa")
    assert code == 2
    assert "task 'piqaa' does not exist" in err


@pytest.mark.slow
def test_a_gate_on_a_group_without_a_score_is_refused_before_work(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("group: bare\ntask: [piqa]\n")
    code, _, err = invoke("eval", model, "--include-path", tmp_path, "--tasks", "bare", "--min-task", "bare=0.1")
    assert code == 2
    assert "bare is a group of tasks without a score of its own" in err


_TASK = """
task: our_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
_KINDS = {
    "multiple_choice": 'doc_to_choice: ["1", "2", "3"]\nmetric_list: [{metric: acc}]',
    "generate_until": 'generation_kwargs: {until: ["x"], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]',
    "loglikelihood_rolling": "metric_list: [{metric: word_perplexity}]",
}


@pytest.mark.slow
def test_a_quiet_run_of_tasks_prints_the_result_alone(model: Path, tmp_path: Path) -> None:
    tasks, file = tmp_path / "tasks", tmp_path / "questions.jsonl"
    tasks.mkdir()
    file.write_text("".join(json.dumps({"question": f"{n} is", "answer": str(n)}) + "\n" for n in (1, 2, 3)))
    for kind, more in _KINDS.items():
        (tasks / f"{kind}.yaml").write_text(_TASK.format(kind=kind, file=file, more=more))
    names = ",".join(f"our_{kind}" for kind in _KINDS)
    command = ["eval", str(model), "--include-path", str(tasks), "--tasks", names, "--json", "--quiet"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "qcli", *command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tasks"].keys() == set(names.split(","))


def test_a_text_may_be_a_mapping(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,body\n" + "one,two times two is four and so on and on\n" * 9)
    flags = ("eval", model, "--window", 32, "--max-windows", 2, "--json", "--data")
    code, _, err = invoke(*flags, tmp_path / "a.csv")
    assert code == 2 and "it is unclear which column is the text; its columns: title, body" in err
    result = invoke(*flags, f"{{path: {tmp_path / 'a.csv'}, column: body}}")
    assert list(json.loads(result.out)["perplexity"]) == [f"{tmp_path / 'a.csv'}, column body"], result.err
    code, _, err = invoke(*flags, "{path: a.csv, colum: body}")
    assert (code, err.splitlines()[0]) == (2, "error: --data: colum: unknown key; did you mean 'column'?")
