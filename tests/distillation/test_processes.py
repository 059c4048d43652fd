"""Distillation shared by two processes of `torchrun`: sharded parameters, sharded states, one result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qcli.distillation.distill import distill
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.export.verify import verify
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UsageError
from tests.quantizing import run, write_text
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow

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
    alone = distill(student, load_recipe(None, fields), tmp_path / "alone").outcome
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
    result, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    shared = json.loads(result)["outcome"]
    begun = re.search(r"^train (\d+)/12", stderr, re.MULTILINE)
    assert begun is not None and int(begun[1]) > 0, "it started over"
    kls = [
        evaluate(str(folder), EvalOptions([str(text)], window=32), baseline=str(teacher)).kl
        for folder in (out, tmp_path / "alone")
    ]
    assert kls[0] == pytest.approx(kls[1], rel=1e-2)
    assert verify(out).layers == 14
    assert shared["best_step"] == alone.best_step
    for (step, loss, held_out), point in zip(alone.curve, shared["curve"], strict=True):
        assert point[0] == step
        assert point[1] == (None if loss is None else pytest.approx(loss, rel=2e-3))
        assert point[2] == pytest.approx(held_out, rel=2e-3)


def test_options_that_do_not_fit_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, teacher, student = write_text(tmp_path), tiny_model("llama", tmp_path), tmp_path / "student"
    run(teacher, student, text, method__name="rtn", method__bits=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fields = {**FIELDS, "model": str(teacher), "calibration.data": str(text)}
    for wrong, problem in (
        ({"distill.accumulate": 3}, "3 passes per step cannot be divided among 2 processes"),
        ({"distill.scope": "block"}, "block uses a single process"),
        ({"device": "cuda:0"}, "device 'cuda:0' cannot serve 2 processes"),
    ):
        with pytest.raises(UsageError, match=problem):
            distill(student, load_recipe(None, fields | wrong), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
