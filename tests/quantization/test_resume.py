"""Quantizing, interrupted in every way: what survives, and that the bytes are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcli.export.pack import pack
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from qcli.utils import run_folder, shards
from qcli.utils.errors import ResourceError, StateError, UsageError
from tests.quantizing import run, weights, write_text
from tests.tiny import tiny_model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def test_same_recipe_same_bytes(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path)
    state = torch.random.get_rng_state()
    run(model, tmp_path / "a", text)
    run(model, tmp_path / "b", text)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is nobody's to touch"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq-like"])
def test_interrupted_anywhere_and_resumed_gives_the_same_bytes(
    method: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails once at every commit and once while assembling, resuming each time."""
    model = tiny_model("llama", tmp_path, num_hidden_layers=3)
    run(model, tmp_path / "straight", text, method__name=method)
    commit, join, fuse = run_folder.RunFolder.commit, shards.join, [1]

    def burn(*_: Any) -> None:
        fuse[0] -= 1
        if fuse[0] < 0:
            raise KeyboardInterrupt

    def dying_commit(self: run_folder.RunFolder, part: str, tensors: Any, report: Any = None) -> None:
        burn()
        commit(self, part, tensors, report)

    def dying_join(*arguments: Any) -> None:
        burn()
        join(*arguments)

    monkeypatch.setattr(run_folder.RunFolder, "commit", dying_commit)
    monkeypatch.setattr(shards, "join", dying_join)
    out, interruptions = tmp_path / "resumed", 0
    while not out.exists():
        fuse[0] = 1
        try:
            result = run(model, out, text, method__name=method)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 4
    assert result.resumed_blocks == 3
    assert not out.with_name("resumed.partial").exists()
    assert weights(out) == weights(tmp_path / "straight")


@pytest.mark.slow
def test_killed_process_resumes(tmp_path: Path, text: Path) -> None:
    """SIGKILL from outside, at whatever moment."""
    model, out = tiny_model("llama", tmp_path, num_hidden_layers=10), tmp_path / "out"
    data = ["--data", str(text), "--samples", "6", "--seq-len", "32", "--group-size", "32"]
    command = [sys.executable, "-c", "from qcli.cli.main import main; main()", "quantize", str(model), *data]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while (not journal.exists() or journal.read_text().count("\n") < 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = subprocess.run(
        [*command, "--out", str(out), "--resume", "required", "--json"], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["resumed_blocks"] >= 3
    subprocess.run([*command, "--out", str(tmp_path / "straight")], capture_output=True, check=True)
    assert weights(out) == weights(tmp_path / "straight")


def test_a_resumed_run_says_so_first_and_counts_what_is_left(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_model("llama", tmp_path, num_hidden_layers=3), tmp_path / "out"
    flags = {
        "calibration.data": str(text),
        "calibration.samples": 6,
        "calibration.seq_len": 32,
        "method.group_size": 32,
    }
    recipe = load_recipe(None, {"model": str(model), **flags})
    commit = run_folder.RunFolder.commit

    def dying(self: run_folder.RunFolder, part: str, *arguments: Any) -> None:
        commit(self, part, *arguments)
        if part.endswith("00001"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.RunFolder, "commit", dying)
        quantize(recipe, out)
    steps: list[tuple[str, int, int, str]] = []
    quantize(recipe, out, lambda stage, done, total, detail="": steps.append((stage, done, total, detail)))
    found = [step for step in steps if step[0] == "quantize"]
    assert found[0] == ("quantize", 2, 3, "resuming: 2 of 3 blocks done before")
    assert [detail for _, done, _, detail in found[2:] if done == 2] == [f"block {i} was done before" for i in range(2)]
    assert [done for _, done, _, _ in found].count(3) == 1, "its end is told once"


def test_resume_refuses_other_settings(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "join", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, out, text)
    with pytest.raises(StateError, match=r"recipe.method.bits was 4, is 3"):
        run(model, out, text, method__bits=3)
    run(model, out, text, method__bits=3, resume="never")
    assert out.exists()
    with pytest.raises(StateError, match="exists"):
        run(model, out, text)
    with pytest.raises(StateError, match="no interrupted run"):
        run(model, tmp_path / "new", text, resume="required")


def test_full_disk_loses_nothing(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(ResourceError, match="has 0.00 GB free"):
            run(model, out, text)
    calls = [0]
    sync = os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 9:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="No space left on device"):
            run(model, out, text)
    assert not out.exists()
    assert not list((tmp_path / "out.partial").glob(".*partial"))
    run(model, out, text)
    run(model, tmp_path / "straight", text)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "straight" / "model.safetensors").read_bytes()


def test_failed_start_does_not_block_the_corrected_command(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path)
    with pytest.raises(UsageError):
        run(model, tmp_path / "out", tmp_path / "nowhere.txt")
    run(model, tmp_path / "out", text)


def test_other_text_in_the_same_file_is_another_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "join", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", text)
    text.write_text(text.read_text()[::-1])
    with pytest.raises(StateError, match="data was"):
        run(model, tmp_path / "out", text)
    unfinished = tmp_path / "out.partial"
    run(model, tmp_path / "other", method__name="rtn")
    with pytest.raises(StateError, match="interrupted run"):
        pack(tmp_path / "other", tmp_path / "out", format="qcli", shard_size=10**9)
    assert (unfinished / "journal.jsonl").exists()


def test_nobody_else_writes_the_same_output(tmp_path: Path) -> None:
    with (
        run_folder.RunFolder(tmp_path / "out", {"a": 1}, "auto"),
        pytest.raises(StateError, match="another qcli is writing"),
    ):
        run_folder.RunFolder(tmp_path / "out", {"a": 1}, "auto")


def test_torn_journal_line_does_not_count(tmp_path: Path) -> None:
    with run_folder.RunFolder(tmp_path / "out", {}, "auto") as folder:
        folder.commit("00000", {"x": torch.ones(3)}, {"rows": 1})
        folder.commit("00001", {"x": torch.ones(3)})
    journal = folder.path / "journal.jsonl"
    journal.write_text(journal.read_text()[:-5])
    folder.file("00000").write_bytes(b"damaged")
    with run_folder.RunFolder(tmp_path / "out", {}, "auto") as folder:
        assert folder.done("00000") is None
        assert folder.done("00001") is None
        folder.commit("00001", {"x": torch.ones(3)})
        assert folder.done("00001") is not None
