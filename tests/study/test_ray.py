"""A study on a local Ray instance: two workers, one of them killed in the middle of a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qcli.study.content import address_by_content
from qcli.study.grid import load_study
from qcli.study.ray import _cpus_per_run
from qcli.study.rows import read_rows
from qcli.study.study import run_study
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow

STUDY = """
base:
  model: {model}
  calibration: {{data: {text}, samples: 16, seq_len: 32}}
  eval: {{perplexity: [{text}], window: 32, max_windows: 2}}
  method: {{group_size: 32}}
grid: {{method.bits: [2, 3]}}
"""


class Killer(threading.Thread):
    """Kills one Ray worker of this process, the first that has started a run."""

    def __init__(self, runs: Path) -> None:
        super().__init__(daemon=True)
        self.runs, self.killed = runs, False

    def run(self) -> None:
        while not self.killed:
            time.sleep(0.02)
            if self.runs.exists() and any(self.runs.iterdir()):
                with suppress(OSError):  # processes and threads end while they are looked at
                    self.killed = any(map(_kill_worker, descendants(os.getpid())))


def descendants(parent: int) -> Iterator[int]:
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from descendants(child)


def _kill_worker(process: int) -> bool:
    """Kill a process if it is a Ray worker that executes a run; whether it was."""
    if not Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::make_row"):
        return False
    os.kill(process, signal.SIGKILL)
    return True


def test_runs_of_killed_workers_are_resumed_by_others(tmp_path: Path) -> None:
    model, text = tiny_model("llama", tmp_path), tmp_path / "text.txt"
    text.write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(400)))
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(STUDY.format(model=model, text=text))
    study = load_study(file)
    killer = Killer(out / "runs")
    killer.start()
    result = run_study(study, out, workers=2, executor="ray")
    assert killer.killed
    assert (result.done, result.failed) == (2, 0)
    assert {row["address"] for row in read_rows(out)} == {run.address for run in address_by_content(study.runs)}
    assert not any((out / "runs").iterdir())


def test_no_run_requests_more_cpus_than_a_node_has() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}]
    nodes += [{"Alive": True, "Resources": {}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    assert [_cpus_per_run(nodes, workers) for workers in (1, 2, 3, 100)] == [8, 6, 4, 1]
