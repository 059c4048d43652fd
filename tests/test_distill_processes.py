"""Distillation shared by two processes of `torchrun`: sharded parameters, sharded states, one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qcli.distill import distill
from qcli.errors import UsageError
from qcli.recipe_loading import load_recipe
from tests.quantizing import run, write_text
from tests.tiny import tiny_model

FIELDS = {
    "calibration.samples": 28,
    "calibration.seq_len": 32,
    "dtype": "float32",
    "distill.steps": 12,
    "distill.train": ["tables", "weights"],
    "distill.loss": "onebit",
    "distill.accumulate": 2,
    "distill.judgements": 6,
    "distill.batch_tokens": 128,
    "distill.tables_lr": 0.01,
}


def in_two(student: Path, fields: dict[str, Any], *flags: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "qcli"]
    sets = [f"--set={name}={json.dumps(value)}" for name, value in fields.items()]
    return subprocess.Popen(
        [sys.executable, *launcher, "distill", str(student), *sets, "--json", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_two_processes_interrupted_and_resumed_give_what_one_gives(tmp_path: Path) -> None:
    text, teacher, student = write_text(tmp_path), tiny_model("llama", tmp_path), tmp_path / "student"
    run(teacher, student, text, method__name="gptq-like", method__bits=2, method__zero_point="float")
    fields = {**FIELDS, "model": str(teacher), "calibration.data": str(text)}
    alone = distill(student, load_recipe(None, fields | {"out": str(tmp_path / "alone")})[0]).outcome
    assert alone.after < 0.97 * alone.before

    out = tmp_path / "shared"
    process = in_two(student, fields | {"out": str(out)})
    journal, deadline = tmp_path / "shared.partial" / "journal.jsonl", time.monotonic() + 240
    while not (journal.exists() and "state-1" in journal.read_text()):
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()  # torchrun passes it on to both
    process.communicate()
    assert not out.exists()

    process = in_two(student, fields | {"out": str(out)}, "--resume=required")
    result, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    shared = json.loads(result)["outcome"]
    assert shared["best_step"] == alone.best_step
    for (step, loss, held_out), point in zip(alone.curve, shared["curve"], strict=True):
        assert point[0] == step
        assert point[1] == (None if loss is None else pytest.approx(loss, rel=2e-3))
        assert point[2] == pytest.approx(held_out, rel=2e-3)


def test_passes_that_cannot_be_shared_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from qcli import distill as verb
    from qcli.processes import Processes

    text, teacher, student = write_text(tmp_path), tiny_model("llama", tmp_path), tmp_path / "student"
    run(teacher, student, text, method__name="rtn", method__bits=2)
    monkeypatch.setattr(verb, "together", lambda device: nullcontext(Processes(0, 2)))
    monkeypatch.setattr(Processes, "agreed", lambda self, make: make())
    fields = {**FIELDS, "model": str(teacher), "calibration.data": str(text), "distill.accumulate": 3}
    with pytest.raises(UsageError, match="3 passes of a step cannot be shared by 2 processes"):
        distill(student, load_recipe(None, fields | {"out": str(tmp_path / "out")})[0])
