"""Quantization shared by two processes of `torchrun`: what one process gives, but for the order of sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from qcli.algorithms.layer_group import LinearGroup
from qcli.export.verify import verify
from qcli.models.manifest import Manifest
from qcli.models.open import open_source
from qcli.quantization.job import require_samples
from qcli.quantization.plan import make_plan
from qcli.quantization.quantize import quantize
from qcli.quantization.ranks import own_part
from qcli.recipe.load import load_recipe
from qcli.utils import payload
from qcli.utils.distributed import Processes, fails_first
from qcli.utils.errors import QcliWarning, StateError, UsageError
from tests.quantizing import weights, write_text
from tests.tiny import tiny_model

CPU = torch.device("cpu")
JOBS: dict[str, dict[str, Any]] = {
    "rtn": {"method.name": "rtn"},
    "methods": {
        "method.name": "gptq-like",
        "overrides": [
            {"match": "*.0.*k_proj", "dense": True},
            {"match": "*.v_proj", "method": {"name": "rtn", "grid": "hessian"}},
            {"match": "*.0.*up_proj", "method": {"name": "onebit", "bits": 1}},
            {"match": "*.down_proj", "method": {"name": "dbllm", "bits": 2}},
        ],
    },
    "linear": {
        "method.name": "rtn",
        "method.bits": 3,
        "method.row_exponents": True,
        "low_rank.rank": 4,
        "refine.scope": "linear",
        "refine.steps": 5,
    },
    "block": {
        "transforms": [{"name": "teq", "loss": "kl", "steps": 4}, {"name": "teq", "steps": 4}],
        "method.name": "rtn",
        "method.bits": 3,
        "refine.steps": 5,
        "refine.batch_tokens": 96,
    },
}


@pytest.fixture
def recipes(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Fields by name; the one held-out sample is a share of its own."""
    model, text = tiny_model("llama", tmp_path, num_hidden_layers=2), write_text(tmp_path)
    common = {
        "model": str(model),
        "dtype": "float32",
        "method.group_size": 32,
        "calibration.data": str(text),
        "calibration.samples": 12,
        "calibration.seq_len": 32,
        "calibration.held_out": 1,
    }
    return {name: common | given for name, given in JOBS.items()}


def in_two(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "tests.quantization.ranks"]
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_two_processes_interrupted_and_resumed_give_what_one_gives(
    recipes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    given = recipes["methods"]
    sets = [f"--set={name}={json.dumps(value)}" for name, value in given.items() if name != "model"]
    failed = in_two(tmp_path, "fail", "quantize", given["model"], *sets, "--out", tmp_path / "methods")
    assert failed.returncode != 0
    assert failed.stdout == ""
    lines = [line for line in failed.stderr.splitlines() if line.startswith(("error:", "hint:", "interrupted"))]
    assert lines == ["error: the second process has a problem", "hint: of its own"]
    assert "exitcode  : 2" in failed.stderr
    with pytest.raises(StateError, match="processes was 2, is 1"):
        quantize(load_recipe(None, given), tmp_path / "methods")

    jobs = {name: recipe | {"resume": "required"} if name == "methods" else recipe for name, recipe in recipes.items()}
    evaluated = {"eval.perplexity": [given["calibration.data"]], "eval.window": 32, "eval.max_windows": 2}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs | {"run": given | evaluated}))
    done = in_two(tmp_path)
    assert done.returncode == 0, done.stderr
    notes = [json.loads((tmp_path / f"notes-{rank}.json").read_text()) for rank in range(2)]
    assert [note["block"] for note in notes[0]["methods"]] == [1], "the first was finished"
    resumed, straight = (weights(tmp_path / folder) for folder in ("methods", "run/quantized"))
    assert len(resumed) > 3
    assert all(resumed[name] == straight[name] for name in resumed if name.endswith((".safetensors", "config.json")))
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["perplexity"]
    for name, recipe in recipes.items():
        quantize(load_recipe(None, recipe), tmp_path / f"{name}-alone")
        assert differing_weights(tmp_path / f"{name}-alone", tmp_path / name) < 1e-2
        alone, shared = (Manifest.read(tmp_path / folder) for folder in (f"{name}-alone", name))
        assert (alone.processes, shared.processes) == (1, 2)
        for one, two in zip(alone.layers, shared.layers, strict=True):
            assert two.error == pytest.approx(one.error, rel=5e-2)
        assert alone.training.keys() == shared.training.keys()
        for what, outcome in shared.training.items():
            assert outcome.after == pytest.approx(alone.training[what].after, rel=1e-2)
        verify(tmp_path / name)
        if name != "rtn":  # one rank has quantized each block, the main one has written all
            assert [note["holds"] for note in notes[0][name]] == [note["holds"] for note in notes[1][name]]
    assert weights(tmp_path / "rtn") == weights(tmp_path / "rtn-alone")
    assert any(outcome.best_step for outcome in shared.training.values())

    assert sum((Counter(note["calls"]) for note in notes[0]["rtn"]), Counter()).total() <= 4
    group = {"all_gather": 1, "broadcast": 2}  # sizes, then the solutions of each process
    statistics = 2 * 4  # of the four groups: hessian, and cross or output_gap
    for note in notes[0]["run"][1:]:
        assert note["calls"]["all_reduce"] == statistics + 4  # and the number of tokens
        assert note["calls"]["broadcast"] == note["calls"]["all_gather"] * group["broadcast"]


def differing_weights(alone: Path, shared: Path) -> float:
    """The share of the first block's weights that differ by more than rounding; in later ones differences may grow."""
    sources = [open_source(str(folder)) for folder in (alone, shared)]
    differing = total = 0
    for layer in sources[0].linears()[:7]:
        name = f"{layer.name}.weight"
        one, two = (source.read([name])[name].float() for source in sources)
        differing += int((~torch.isclose(one, two, rtol=1e-3, atol=1e-6)).sum())
        total += one.numel()
    return differing / total


def test_layers_are_shared_by_size_and_rows_evenly() -> None:
    sizes = {"k": 16, "q": 64, "v": 16, "gate": 80}
    group = LinearGroup({name: torch.zeros(size, 4) for name, size in sizes.items()})

    def shares(unit: Any, count: int = 3) -> list[dict[str, int]]:
        parts = [own_part(group, unit, Processes(CPU, rank, count)) for rank in range(count)]
        return [{name: len(weight) for name, weight in part.weights.items()} for part in parts]

    assert shares("layer") == [{"gate": 80}, {"q": 64}, {"k": 16, "v": 16}]
    assert shares("group") == [sizes, {}, {}]
    assert [sum(part.values()) for part in shares("row")] == [57, 58, 61]
    group.weights, group.output_gap = {"o": torch.arange(6.0)[:, None]}, torch.arange(6.0)[:, None]
    for rank in range(4):
        part = own_part(group, "row", Processes(CPU, rank, 4))
        assert part.output_gap is not None
        assert torch.equal(part.weights["o"], part.output_gap)


def test_what_processes_send_each_other_arrives_as_it_was() -> None:
    tensors = [
        torch.arange(5, dtype=torch.uint8),
        torch.randn(2, 3)[:, 1:],
        torch.tensor(True),
        torch.zeros(0, 4).half(),
    ]
    value = {"tensors": tensors, "again": tensors[1], "text": "é", "number": 0.1}
    arrived = payload.unpack(payload.pack(value, CPU))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(arrived["tensors"], tensors, strict=True))
    assert torch.equal(arrived["again"], tensors[1])
    assert (arrived["text"], arrived["number"]) == ("é", 0.1)
    assert payload.unpack(payload.pack(None, CPU)) is None


def test_the_first_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    ask: Callable[[], bool] = fails_first.__wrapped__  # as each process asks, once
    assert [ask(), ask()] == [True, False]
    monkeypatch.delenv("MASTER_PORT")
    assert not ask()
    monkeypatch.setenv("RANK", "0")
    assert ask()


def test_too_many_processes_are_refused_and_idle_ones_told_of(recipes: dict[str, dict[str, Any]]) -> None:
    plan, eight = make_plan(load_recipe(None, recipes["block"])), Processes(CPU, 0, 8)
    with pytest.raises(UsageError, match="7 calibration samples cannot be divided among 8 processes"):
        require_samples(plan, torch.zeros(8, 32), eight)
    with pytest.warns(QcliWarning, match="samples for 3 of 8 processes; refine.batch_tokens 256 is one for each"):
        require_samples(plan, torch.zeros(9, 32), eight)
    require_samples(plan, torch.zeros(9, 32), Processes(CPU, 0, 3))
