"""`qcli study`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qcli.study import processes as module
from qcli.study.content import address_by_content
from qcli.study.grid import Run, load_study
from qcli.study.rows import VERSION, read_rows
from qcli.study.run import KIND, row_head
from qcli.utils.errors import ResourceError, StateError
from qcli.utils.journal import line
from qcli.utils.owned_folder import OwnedFolder
from qcli.utils.run_folder import RunFolder
from qcli.utils.trust import Trust
from tests.cli.conftest import Invoke

TOKENS, WINDOWS = "qcli.data.tokens._draw", "qcli.data.tokens._consecutive"
BASELINE = "qcli.evaluation.final_states._run_blocks"


@pytest.fixture
def study(tmp_path: Path, model: Path, text: Path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(
        f"""
base:
  model: {model}
  calibration: {{data: {text}, samples: 4, seq_len: 32}}
  eval: {{perplexity: [{text}], window: 32, max_windows: 2}}
grid:
  method: [{{name: rtn, bits: 3, group_size: 32}}, {{name: gptq-like, bits: 2, group_size: 32}}]
include:
  - {{method: {{name: onebit}}, calibration.data: {tmp_path / "short.txt"}}}
"""
    )
    (tmp_path / "short.txt").write_text("too short")
    return file


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_run_has_a_row_and_failures_are_retried(invoke: Invoke, study: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, err = invoke("study", study, "--out", out, "--json")
    assert code == 0, err
    assert {key: json.loads(stdout)[key] for key in ("done", "failed", "kept")} == {"done": 2, "failed": 1, "kept": 0}
    assert f"failed: {tmp_path / 'short.txt'}: too short for calibration" in err
    done = rows(out)
    assert [row["status"] for row in done] == ["done", "done", "failed"]
    assert "short.txt: too short for calibration" in str(done[2]["error"]) and done[2]["exit_code"] == 2
    assert all(row["kl"] > 0 and 2 < row["bits_per_weight"] < 5 for row in done[:2])  # type: ignore[operator]
    assert not any((out / "runs").iterdir())
    code, stdout, _ = invoke("study", study, "--out", out, "--json")
    assert {key: json.loads(stdout)[key] for key in ("done", "failed", "kept")} == {"done": 0, "failed": 0, "kept": 3}
    code, stdout, _ = invoke("study", study, "--out", out)
    assert code == 0 and re.search("failed before +1; --retry", stdout)
    assert f"  1 failed: {tmp_path / 'short.txt'}: too short for calibration" in stdout
    code, stdout, err = invoke("study", study, "--out", out, "--strict", "--json")
    error, hint = err.splitlines()[-2:]
    assert code == 4 and error.startswith(f"error: 1 of 3 runs failed: {tmp_path / 'short.txt'}: too short")
    assert hint == "hint: --retry repeats them"
    assert [*json.loads(stdout)["reasons"].values()] == [1]
    (out / "results.jsonl").write_text((out / "results.jsonl").read_text() + '{"address": "torn')
    study.write_text(study.read_text().replace(str(tmp_path / "short.txt"), str(text)))
    code, stdout, _ = invoke("study", study, "--out", out, "--json")
    assert json.loads(stdout)["done"] == 1, "a new run, not the failed one"
    assert [row["status"] for row in rows(out)] == ["done", "done", "failed", "done"]


def test_the_folder_of_a_study_is_not_its_file(invoke: Invoke, tmp_path: Path) -> None:
    rows = tmp_path / "my rows"
    rows.mkdir()
    (rows / "results.jsonl").touch()
    code, _, err = invoke("study", rows)
    error, hint = err.splitlines()
    assert (code, error) == (2, f"error: {rows} is the folder of a study's rows, not a study")
    advised = shlex.split(hint.split("`")[1])
    assert advised == ["qcli", "study", "report", str(rows)]
    assert invoke(*advised[1:]).err.startswith(f"error: {rows}"), "parsed: what is missing is a row"


def test_a_study_compares_inputs_with_weights(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        f"base: {{model: {model}, eval: {{perplexity: [{text}], window: 32, max_windows: 4}}}}\n"
        "names:\n  method: {W16: {name: full-precision}, W4: {name: rtn, bits: 4, group_size: 64}}\n"
        "  activations: {A8: {bits: 8}, A8-restricted: {symmetric: true, symmetric_range: restricted}}\n"
        "grid:\n  method: [W16, W4]\n  activations: [A8, A8-restricted]\n"
    )
    code, _, err = invoke("study", study, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    kl: dict[str, list[float]] = {}
    for row in rows(tmp_path / "out"):
        assert row["status"] == "done", row
        kl.setdefault(row["point"]["method"], []).append(row["kl"])  # type: ignore
    assert len(kl["W16"]) == 2 and max(kl["W16"]) < min(kl["W4"])
    assert invoke("study", "report", tmp_path / "out").code == 0


def test_a_missing_text_fails_before_any_run(invoke: Invoke, study: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").unlink()
    for flags in (("--dry-run",), ("--out", tmp_path / "out")):
        code, stdout, err = invoke("study", study, *flags)
        assert (code, stdout) == (2, "")
        assert f"error: {tmp_path / 'short.txt'}: no such file" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_impossible_evaluation_fails_before_any_run(invoke: Invoke, study: Path, tmp_path: Path) -> None:
    short = f"eval.perplexity=[{tmp_path / 'short.txt'}]"
    code, stdout, err = invoke("study", study, "--out", tmp_path / "out", "--set", short)
    assert (code, stdout) == (2, "") and f"error: {tmp_path / 'short.txt'}: too short" in err
    pytest.importorskip("lm_eval")
    for flags in (("--dry-run",), ("--out", tmp_path / "out")):
        code, stdout, err = invoke("study", study, *flags, "--set", "eval.tasks=[arc_esy]")
        assert (code, stdout) == (2, "") and "arc_esy" in err and "arc_easy" in err
    assert not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["text", "model"])
def test_runs_are_repeated_when_their_inputs_have_changed(
    invoke: Invoke, study: Path, model: Path, text: Path, tmp_path: Path, changed: str
) -> None:
    out = tmp_path / "out"
    assert invoke("study", study, "--out", out).code == 0
    if changed == "text":
        text.write_text(text.read_text().replace("times", "by"))
    else:
        weights = load_file(model / "model.safetensors")
        save_file({name: 1.5 * weight for name, weight in weights.items()}, model / "model.safetensors")
    code, stdout, err = invoke("study", study, "--out", out, "--json")
    assert (code, json.loads(stdout)["kept"]) == (0, 0), err
    before, after = rows(out)[:3], read_rows(out)
    assert [row["recipe"] for row in after] == [row["recipe"] for row in before]
    assert all(new["kl"] != old["kl"] for new, old in zip(after[:2], before[:2], strict=True))


@pytest.mark.slow
def test_rows_come_from_several_processes_alike(invoke: Invoke, study: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert invoke("study", study, "--out", alone).code == 0
    assert invoke("study", study, "--out", shared, "--workers", 2).code == 0
    kls = [{row["address"]: row.get("kl") for row in rows(out)} for out in (alone, shared)]
    assert kls[0] == kls[1] and len(kls[0]) == 3


@pytest.mark.slow
def test_calibration_tokens_and_baselines_are_made_once(
    invoke: Invoke, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    for place in (TOKENS, WINDOWS, BASELINE):
        module_name, _, name = place.rpartition(".")
        real = getattr(import_module(module_name), name)

        def counted(*args: Any, _real: Any = real, _place: str = place, **kwargs: Any) -> Any:
            made.append(_place)
            return _real(*args, **kwargs)

        monkeypatch.setattr(place, counted)
    study.write_text(study.read_text().replace("method: [{name: rtn, bits: 3", "method: [{name: gptq-like, bits: 3"))
    assert invoke("study", study, "--out", tmp_path / "out").code == 0
    assert made.count(TOKENS) == 2, "one for the text that is too short"
    assert made.count(WINDOWS) <= 2, "read by the model's tokenizer, and by the copies that the checkpoints have"
    assert made.count(BASELINE) == 3, "two models and one baseline"
    kept = {row["address"]: row.get("kl") for row in rows(tmp_path / "out")}
    monkeypatch.setattr("qcli.utils.cache.Cache.tensors", lambda self, key, make, fits: make())
    assert invoke("study", study, "--out", tmp_path / "fresh").code == 0
    assert {row["address"]: row.get("kl") for row in rows(tmp_path / "fresh")} == kept


def test_any_error_of_a_run_is_a_row(
    invoke: Invoke, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr("qcli.quantization.quantize.quantize", broken)
    code, stdout, err = invoke("study", study, "--out", tmp_path / "out", "--json")
    assert (code, json.loads(stdout)["failed"]) == (1, 3)
    assert "error: all 3 runs failed: KeyError: 'no such thing'\n" in err and "hint: --retry" in err
    code, stdout, err = invoke("study", study, "--out", tmp_path / "out")
    assert code == 1 and "all 3 runs failed" in err, "earlier failures count"
    assert invoke("study", study, "--out", tmp_path / "out", "--strict").code == 4
    assert {row["error"] for row in rows(tmp_path / "out")} == {"KeyError: 'no such thing'"}
    monkeypatch.undo()
    code, stdout, _ = invoke("study", study, "--out", tmp_path / "out", "--json", "--retry")
    assert {key: json.loads(stdout)[key] for key in ("done", "failed", "kept")} == {"done": 2, "failed": 1, "kept": 0}


@pytest.mark.slow
def test_runs_whose_process_is_killed_are_retried_and_then_fail(
    invoke: Invoke, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "make_row", _dies)
    code, stdout, err = invoke("study", study, "--out", tmp_path / "out", "--workers", 2, "-q", "--json")
    assert code == 0, err
    assert {key: json.loads(stdout)[key] for key in ("done", "failed")} == {"done": 2, "failed": 1}
    (failed,) = [row for row in rows(tmp_path / "out") if row["status"] == "failed"]
    assert (failed["error"], failed["exit_code"]) == ("its process was killed 3 times, perhaps for its memory", 5)
    assert "onebit" in str(failed["recipe"])
    assert [(tmp_path / "out" / name).read_text() for name in ("rtn", "gptq-like", "onebit")] == ["x", "xx", "xxx"]


def _dies(run: Run, out: Path, trust: Trust) -> dict[str, Any]:
    """Whenever it is tried where the method is onebit; at the first try where it is gptq-like."""
    name = run.recipe.method.name
    with (out / name).open("a") as tries:
        tries.write("x")
    if name == "onebit" or (out / name).read_text() == "x" * (name == "gptq-like"):
        os.kill(os.getpid(), signal.SIGKILL)
    return row_head(run) | {"status": "done"}


ORPHANS = """
import time
from pathlib import Path
from qcli.study import processes as study_processes

def make_row(run, out, trust):
    print("begun", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    study_processes.make_row = make_row
    next(study_processes.rows_from_processes([None, None], Path(), 1))
"""


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "begun\n"
    parent.kill()
    assert parent.communicate(timeout=60)[0] == "", "nobody holds the pipe any more"


def test_a_run_that_another_process_executes_ends_the_study(invoke: Invoke, study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = out / "runs" / address_by_content(load_study(study).runs)[1].address
    with OwnedFolder(folder, KIND, StateError("busy")):
        (out / "study.json").write_text('{"version": 2}')
        code, _, err = invoke("study", study, "--out", out)
        assert code == 3 and f"error: another qcli is using {folder}" in err
        assert folder.exists() and len(rows(out)) == 1, "the first run has its row"
    code, stdout, _ = invoke("study", study, "--out", out, "--json")
    assert (code, json.loads(stdout)["done"], len(rows(out))) == (0, 1, 3)


def test_damaged_rows_are_named(invoke: Invoke, study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    row = {"address": "a", "status": "done", "point": {}, "recipe": "", "kl": 0.25}
    old = f'{json.dumps(row)}\n{{"addr\n{{"half'
    new = (line(row) + line(row)).decode().replace("0.25", "0.24", 1)
    for version, lines, problem in ((1, old, "2: damaged: not JSON"), (2, new, "1: damaged: its checksum")):
        (out / "study.json").write_text(json.dumps({"version": version}))
        (out / "results.jsonl").write_text(lines)
        for command in (("study", study, "--out", out), ("study", "report", out)):
            code, _, err = invoke(*command)
            assert code == 3 and f"error: {out}/results.jsonl:{problem}" in err
    for content in ("[]", "{}", "[" * 10**5, '{"version": "2"}', "\xff"):
        (out / "study.json").write_text(content, encoding="latin-1")
        assert invoke("study", study, "--out", out).code == 3


def test_studies_of_the_version_before_go_on(invoke: Invoke, study: Path, tmp_path: Path) -> None:
    """Their rows had no checksums."""
    out = tmp_path / "out"
    assert invoke("study", study, "--out", out).code == 0
    before = rows(out)[1:]
    for row in before:
        assert len(str(row.pop("checksum"))) == 64
    shutil.rmtree(out)
    out.mkdir()
    (out / "study.json").write_text('{"version": 1}')
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    assert read_rows(out) == before
    code, stdout, err = invoke("study", study, "--out", out, "--json")
    assert (code, json.loads(stdout)["kept"]) == (0, 2), err
    assert [{**row, "checksum": None} for row in rows(out)[:2]] == [{**row, "checksum": None} for row in before]
    assert json.loads((out / "study.json").read_text()) == {"version": VERSION}


@pytest.mark.slow
def test_a_run_on_a_full_disk_resumes(
    invoke: Invoke, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, commit = tmp_path / "out", RunFolder.commit

    def full(self: RunFolder, part: str, *rest: Any) -> None:
        if part == "00001":
            raise ResourceError("the disk is full")
        commit(self, part, *rest)

    monkeypatch.setattr(RunFolder, "commit", full)
    assert invoke("study", study, "--out", out).code == 5, "each run met it"
    monkeypatch.undo()
    folders = sorted((out / "runs").iterdir())
    assert len(folders) == 2 and all((folder / "quantized.partial" / "journal.jsonl").exists() for folder in folders)
    resumed: list[bool] = []
    done = RunFolder.done

    def watched(self: RunFolder, part: str) -> Path | None:
        file = done(self, part)
        resumed.append(part == "00000" and file is not None and self.path.name == "quantized.partial")
        return file

    monkeypatch.setattr(RunFolder, "done", watched)
    code, stdout, _ = invoke("study", study, "--out", out, "--json", "--retry")
    assert (code, json.loads(stdout)["done"]) == (0, 2)
    assert any(resumed) and not list((out / "runs").iterdir())


def test_dry_run_shows_what_runs_would_cost(invoke: Invoke, study: Path, tmp_path: Path) -> None:
    code, stdout, err = invoke("study", study, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(stdout)
    assert [run["bits_per_weight"] for run in plan["runs"]] == pytest.approx([3.59, 2.56, 1.5], abs=0.2)
    assert "3 runs, 3 missing; " in invoke("study", study, "--dry-run", "--out", tmp_path / "none").out
    smaller = tmp_path / "smaller.yaml"
    smaller.write_text(study.read_text().partition("include:")[0])
    assert invoke("study", smaller, "--out", tmp_path / "out").code == 0
    table = invoke("study", study, "--dry-run", "--out", tmp_path / "out").out
    assert "3 runs, 1 missing; " in table and table.count("done") == 2
    assert invoke("study", study, "--out", tmp_path / "out").code == 0
    look = ("study", study, "--out", tmp_path / "out", "--dry-run")
    assert "3 runs, 0 missing; " in invoke(*look).out and "3 runs, 1 missing; " in invoke(*look, "--retry").out
    (tmp_path / "empty").mkdir()
    assert "3 runs, 3 missing; " in invoke("study", study, "--out", tmp_path / "empty", "--dry-run").out


def test_what_is_not_a_study_is_refused(
    invoke: Invoke, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("study", study).code == 2
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    code, _, err = invoke("study", study, "--out", full)
    assert (code, err.splitlines()[0]) == (3, f"error: {full} exists and is not a study")
    old = tmp_path / "old"
    old.mkdir()
    (old / "study.json").write_text('{"version": 0}')
    code, _, err = invoke("study", study, "--out", old)
    assert code == 3 and "is a study of version 0" in err
    monkeypatch.setattr("qcli.study.ray.find_spec", lambda name: None)
    code, _, err = invoke("study", study, "--out", tmp_path / "ray", "--executor", "ray")
    assert code == 6 and "pip install ray" in err
    monkeypatch.setattr("qcli.cli.study.LIMIT", 2)
    code, _, err = invoke("study", study, "--out", tmp_path / "many")
    assert code == 2 and "has 3 runs" in err and "--yes" in err
