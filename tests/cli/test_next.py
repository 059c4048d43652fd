"""What may be done next: commands that work as they are shown."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke, Outcome
from tests.tiny import tiny_model

NEXT = "next: "


def proposed(outcome: Outcome) -> list[list[str]]:
    """The commands that an outcome proposes, as a shell splits them."""
    assert outcome.code == 0, outcome.err
    assert NEXT not in outcome.out
    lines = outcome.err.splitlines()
    found = [shlex.split(line.removeprefix(NEXT)) for line in lines if line.startswith(NEXT)]
    assert lines[len(lines) - len(found) :] == [line for line in lines if line.startswith(NEXT)], "they come last"
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that a shell has to have quoted, without a hub."""
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def test_what_quantize_pack_eval_and_calibrate_propose_works(
    invoke: Invoke, text: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", place)
    rtn = ("--method", "rtn", "--symmetric", "--group-size", 32)
    after = proposed(invoke("quantize", model, *rtn, "--out", place / "out"))
    assert [command[:3] for command in after] == [
        ["qcli", "eval", str(place / "out")],
        ["qcli", "generate", str(place / "out")],
        ["python", "-i", "-c"],
        ["qcli", "pack", str(place / "out")],
    ]
    evaluate, generate, load, pack = after
    assert "compressed-tensors" in pack
    after_eval = proposed(invoke(*evaluate[1:], "--data", text, "--max-windows", 1, "--window", 32))
    assert after_eval == [generate, pack]
    assert invoke(*generate[1:], "--max-new-tokens", 2).code == 0
    assert "--chat" in generate
    subprocess.run([sys.executable, *load[2:]], check=True, stdin=subprocess.DEVNULL, timeout=120)
    after_pack = proposed(invoke(*pack[1:], "--out", "packed"))
    assert ["vllm", "serve", "packed"] in after_pack
    assert invoke(*after_pack[-1][1:], "--max-new-tokens", 2).code == 0

    (calibrated,) = proposed(invoke("calibrate", model, "--data", text, "--samples", 2, "--seq-len", 16, "--out", "c"))
    assert calibrated == ["qcli", "quantize", str(model), "--data", "c"]
    assert invoke(*calibrated[1:]).code == 0
    narrow = tiny_model("llama", place, hidden_size=48, head_dim=8)
    text_flags = ("--data", text, "--samples", 2, "--seq-len", 16)
    (calibrated,) = proposed(invoke("calibrate", narrow, *text_flags, "--out", "narrow"))
    assert calibrated[3:5] == ["--group-tail", "ragged"]
    assert invoke(*calibrated[1:]).code == 0


def test_what_cannot_be_packed_is_not_proposed_to_be(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    after = proposed(
        invoke("quantize", model, "--method", "onebit", "--set", "method.paper=true", "--out", tmp_path / "o")
    )
    assert not [command for command in after if "pack" in command]


@pytest.mark.parametrize("silent", ["-q", "--json"])
def test_nobody_who_asked_for_silence_is_told(invoke: Invoke, model: Path, tmp_path: Path, silent: str) -> None:
    code, _, err = invoke("quantize", model, "--method", "rtn", "--out", tmp_path / "out", silent)
    assert code == 0 and NEXT not in err


def test_a_run_proposes_what_its_last_stage_does(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nmethod: {{name: rtn}}\n")
    after = proposed(invoke("run", recipe, "--out", tmp_path / "out"))
    assert after[0] == ["qcli", "eval", str(tmp_path / "out" / "quantized"), "--baseline", str(model)]
    after = proposed(invoke("run", recipe, "--out", tmp_path / "out", "--set", "pack.format=dense"))
    assert [command[:2] for command in after] == [["python", "-i"], ["qcli", "generate"]]


@pytest.mark.parametrize(("verbose", "told"), [(0, ""), (1, "no further suggestions: RuntimeError: out of ideas")])
def test_a_suggestion_that_fails_does_not_fail_the_run(
    invoke: Invoke, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbose: int, told: str
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of ideas")

    monkeypatch.setattr("qcli.export.packable.surely_packable", fails)
    outcome = invoke(
        "quantize", model, "--method", "rtn", "--group-size", 32, "--out", tmp_path / "o", *["-v"] * verbose
    )
    assert outcome.code == 0 and NEXT in outcome.err
    assert told in outcome.err and ("out of ideas" in outcome.err) == bool(told)
