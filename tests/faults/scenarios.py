"""Commands on tiny inputs, and what their finished results look like."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.faults.processes import Ended, ForkServer, fork_server
from tests.quantizing import write_text
from tests.tiny import tiny_model

_VOLATILE = {"seconds", "peak_memory", "sha256", "started", "total_seconds", "checksum", "resumed_blocks"}


@dataclass(frozen=True)
class Scenario:
    """A command, and the folder of its result.

    Attributes:
        name: of the command.
        arguments: of the command line; paths are relative to the bench's folder.
        again: what is added when it is run again after a failure.
        resumes: whether the command continues where it was interrupted.
        in_place: whether the result's folder is taken up again, so that it exists before the command has ended.
    """

    name: str
    arguments: tuple[str, ...]
    again: tuple[str, ...] = ()
    resumes: bool = True
    in_place: bool = False


_TEXT = ("--data", "text.txt", "--samples", "6", "--seq-len", "16", "-q", "--out", "out")
_GROUPS = ("--group-size", "32")
_STEPS = ("--steps", "4", "--set", "distill.judgements=2")
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("quantize", ("quantize", "model", *_GROUPS, *_TEXT)),
        Scenario("quantize rtn", ("quantize", "model", "--method", "rtn", *_GROUPS, "-q", "--out", "out")),
        Scenario("quantize auto", ("quantize", "model", *_GROUPS, "--bits", "auto", "--target-bpw", "4", *_TEXT)),
        Scenario("distill", ("distill", "student", "--teacher", "model", *_STEPS, *_TEXT)),
        Scenario("distill block", ("distill", "student", "--teacher", "model", "--scope", "block", *_STEPS, *_TEXT)),
        Scenario("pack", ("pack", "student", "--format", "dense", "-q", "--out", "out"), resumes=False),
        Scenario("calibrate", ("calibrate", "model", *_TEXT, "--hessians"), resumes=False),
        Scenario("run", ("run", "recipe.yaml", "-q", "--out", "out"), in_place=True),
        Scenario("study", ("study", "study.yaml", "-q", "--out", "out"), again=("--retry",), in_place=True),
    )
}
RECIPE = """
model: model
calibration: {data: text.txt, samples: 6, seq_len: 16}
method: {name: gptq-like, bits: 4, group_size: 32}
distill: {data: text.txt, samples: 6, seq_len: 16, steps: 2, judgements: 1}
eval: {perplexity: [text.txt], window: 32, max_windows: 2}
pack: {format: qcli}
"""
STUDY = """
base:
  model: model
  calibration: {data: text.txt, samples: 6, seq_len: 16}
  eval: {perplexity: [text.txt], window: 32, max_windows: 2}
grid:
  method: [{name: rtn, bits: 3, group_size: 32}, {name: gptq-like, bits: 2, group_size: 32}]
"""


class Bench:
    """A folder with inputs, where commands run one after another, each on a clean table.

    Attributes:
        folder: has `model`, `student`, `text.txt`, `recipe.yaml`, `study.yaml`; results are `out`, the cache `cache`.
    """

    def __init__(self, folder: Path, server: ForkServer) -> None:
        self.folder, self.server = folder.resolve(), server
        shutil.move(tiny_model("llama", self.folder), self.folder / "model")
        write_text(self.folder)
        (self.folder / "recipe.yaml").write_text(RECIPE)
        (self.folder / "study.yaml").write_text(STUDY)
        self._inputs: dict[str, str] = {}
        self._expected: dict[str, Any] = {}
        made = self.run(["quantize", "model", "--method", "rtn", "--group-size", "32", "-q", "--out", "student"])
        assert made.code == 0, made.err
        self._inputs = self._hashes()

    def run(self, arguments: list[str], **how: Any) -> Ended:
        """Run a command; faults as for `ForkServer.run`."""
        environment = {"QCLI_CACHE": str(self.folder / "cache")}
        return self.server.run(arguments, watched=self.folder, environment=environment, **how)

    def clear(self) -> None:
        """Remove what commands have left."""
        for name in ("out", "out.partial", "cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def expected(self, scenario: Scenario) -> tuple[Any, Ended]:
        """The result of a scenario that nothing disturbs, and how it ended."""
        if scenario.name not in self._expected:
            self.clear()
            ended = self.run([*scenario.arguments])
            assert ended.code == 0, ended.err
            self._expected[scenario.name] = self.result(), ended
        expected: tuple[Any, Ended] = self._expected[scenario.name]
        return expected

    def result(self) -> Any:
        """What `out` holds, without times: comparable."""
        return described(self.folder / "out")

    def untouched(self) -> bool:
        """Whether all inputs are as they were."""
        return self._hashes() == self._inputs

    def leftovers(self) -> list[str]:
        """What lies in the folder besides inputs, result and cache."""
        known = {*(name.partition("/")[0] for name in self._inputs), "out", "cache"}
        return sorted(entry.name for entry in self.folder.iterdir() if entry.name not in known)

    def _hashes(self) -> dict[str, str]:
        return {
            str(file.relative_to(self.folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(self.folder.rglob("*"))
            if file.is_file() and file.relative_to(self.folder).parts[0] not in ("out", "out.partial", "cache")
        }


@cache
def bench() -> Bench:
    """The bench of this process."""
    folder = Path(tempfile.mkdtemp(prefix="qcli-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Bench(folder, fork_server())


def described(path: Path) -> Any:
    """Names and hashes of all files; JSON as data without what differs between runs; rows of studies in any order."""
    if path.is_dir():
        skipped = ("lock", "cache", "runs")
        return {entry.name: described(entry) for entry in sorted(path.iterdir()) if entry.name not in skipped}
    if path.suffix == ".jsonl":
        rows = [stable(json.loads(line)) for line in path.read_text().splitlines()]
        return sorted((row for row in rows if row.get("status") != "failed"), key=str)
    if path.suffix == ".json":
        return stable(json.loads(path.read_text()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stable(value: Any) -> Any:
    """Plain data of a result without times and what depends on them."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if key not in _VOLATILE}
        return {key: _weights(inner) if key == "files" else stable(inner) for key, inner in kept.items()}
    return [stable(each) for each in value] if isinstance(value, list) else value


def _weights(files: Any) -> Any:
    """A manifest's `files` without those that hold times; of another result, their number."""
    if not isinstance(files, dict):
        return files
    return {name: entry for name, entry in files.items() if not name.endswith((".json", ".md"))}
