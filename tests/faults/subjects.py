"""Commands with inputs to mutate, and what has to hold of the result.

Inputs are made once, by the commands themselves, and kept in a pantry; every trial works on fresh copies of them.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.faults.inject import Fault
from tests.faults.processes import Ended, ForkServer, fork_server
from tests.faults.scenarios import RECIPE, STUDY, described, stable
from tests.quantizing import write_text
from tests.tiny import tiny_model, with_merge

_HANG = 120.0  # seconds of a command that takes less than one, on a busy machine


@dataclass(frozen=True)
class Subject:
    """A command whose inputs are mutated.

    Attributes:
        arguments: of the command line; paths are relative to the folder of the work.
        needs: inputs, by their names in the pantry; `out`, `out.partial` and `cache` are inputs like others.
        files: patterns of those that are mutated.
        sealed: whether the files carry hashes, so that exit 0 promises the result of files that nobody has changed.
        again: what the hint of a refusal says to add; then the command gives that result, too.
    """

    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    files: tuple[str, ...]
    sealed: bool = False
    again: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return " ".join(self.arguments)


_OUT = ("-q", "--out", "out")
_TEXT = ("--data", "text.txt", "--samples", "6", "--seq-len", "16")
_RTN = ("--method", "rtn", "--group-size", "32", "--symmetric")
_STEPS = ("--steps", "2", "--set", "distill.judgements=1")
_WINDOWS = ("--window", "32", "--max-windows", "2", "-q", "--json")
_FIXED = ("--set", "calibration.samples=6", "--set", "calibration.seq_len=16", "--set", "eval.max_windows=2")
_FEW = (*_FIXED, "--set", "distill.steps=2")  # a mutated number must not mean more work
_FAMILIES = ("llama", "gemma2", "gpt2", "falcon", "phi3", "opt", "bloom", "smollm3")
_LAYOUTS = ("qcli", "gptq", "compressed-tensors", "dense", "gguf")
_OWN_TASK = ("--tasks", "times", "--include-path", "tasks", "-q", "--json")
_CACHED = ("eval", "student", "--baseline", "model", "--data", "text.txt", "--data", "self", *_WINDOWS)
_CACHED_TASKS = ("eval", "student", "--baseline", "model", *_OWN_TASK)
_QUANTIZE = ("quantize", "model", "--group-size", "32", *_TEXT, *_OUT)
_DISTILL = ("distill", "student", "--teacher", "model", *_STEPS, *_TEXT, *_OUT)
_RUN, _STUDY = ("run", "recipe.yaml", *_OUT), ("study", "run", "study.yaml", *_OUT)
_WEIGHTS = ("*.safetensors", "*.gguf")
_MANIFEST = "qcli.manifest.json"


def _recipes() -> list[Subject]:
    needs, run = ("model", "text.txt", "recipe.yaml"), ("run", "recipe.yaml", *_FEW)
    study = ("model", "text.txt", "study.yaml")
    return [
        Subject(("recipe", "validate", "recipe.yaml"), needs, ("recipe.yaml",)),
        Subject(("recipe", "show", "recipe.yaml", "--json"), needs, ("recipe.yaml",)),
        Subject(("quantize", "--recipe", "recipe.yaml", "--dry-run", "--json"), needs, ("recipe.yaml",)),
        Subject((*run, *_OUT), needs, ("recipe.yaml",)),
        Subject(("study", "run", "study.yaml", "--dry-run", "--json"), study, ("study.yaml",)),
        Subject(("study", "run", "study.yaml", *_FIXED, *_OUT), study, ("study.yaml",)),
    ]


def _models() -> list[Subject]:
    subjects = []
    for model in (*_FAMILIES, "sharded", "gguf"):
        path = "gguf/tiny.gguf" if model == "gguf" else model
        files, needs = (f"{model}/*",), (model, "text.txt", "student", "tasks")
        subjects += [
            Subject(("quantize", path, "--dry-run", "--json"), needs, files),
            Subject(("quantize", path, *_RTN, *_OUT), needs, files),
            Subject(("quantize", path, "--group-size", "32", *_TEXT, *_OUT), needs, files),
            Subject(
                ("quantize", path, *_RTN, "--data", "self", "--samples", "2", "--seq-len", "8", *_OUT), needs, files
            ),
            Subject(("eval", path, "--data", "text.txt", *_WINDOWS), needs, files),
            Subject(("eval", path, "--data", "self", *_WINDOWS), needs, files),
            Subject(("eval", path, *_OWN_TASK), needs, files),
            Subject(("eval", "student", "--baseline", path, "--data", "text.txt", *_WINDOWS), needs, files),
            Subject(("calibrate", path, *_TEXT, *_OUT), needs, files),
        ]
        if model in ("llama", "sharded", "gguf"):
            distill = ("distill", "student", "--teacher", path, *_STEPS, *_TEXT, *_OUT)
            subjects.append(Subject(distill, needs, files))
    return subjects


def _texts() -> list[Subject]:
    subjects = []
    for text in ("text.txt", "text.jsonl", "text.parquet"):
        subjects += [
            Subject(
                ("quantize", "llama", "--group-size", "32", "--data", text, *_TEXT[2:], *_OUT), ("llama", text), (text,)
            ),
            Subject(("eval", "llama", "--data", text, *_WINDOWS), ("llama", text), (text,)),
        ]
    tasks = ("eval", "llama", *_OWN_TASK)
    return [*subjects, *[Subject(tasks, ("llama", "tasks"), ("tasks/*",))] * 2]


def _checkpoints() -> list[Subject]:
    subjects = []
    for layout in _LAYOUTS:
        folder = "student" if layout == "qcli" else f"packed-{layout}"
        weights = tuple(f"{folder}/{pattern}" for pattern in (*_WEIGHTS, _MANIFEST))
        subjects += [
            Subject(("verify", folder, "-q", "--json"), (folder,), (f"{folder}/*",), sealed=True),
            Subject(("inspect", folder, "--json"), (folder,), (f"{folder}/{_MANIFEST}",), sealed=True),
            Subject(("inspect", folder, "--json"), (folder,), (f"{folder}/*",)),
            Subject(("eval", folder, "--data", "text.txt", *_WINDOWS), (folder, "text.txt"), (f"{folder}/*",)),
        ]
    needs, weights = ("student", "model", "text.txt"), ("student/*.safetensors", f"student/{_MANIFEST}")
    for target in _LAYOUTS:
        pack = ("pack", "student", "--format", target, *_OUT)
        subjects += [Subject(pack, needs, weights, sealed=True), Subject(pack, needs, ("student/*",))]
    subjects += [Subject(_DISTILL, needs, weights, sealed=True), Subject(_DISTILL, needs, ("student/*",))]
    evaluation = ("student", "evaluation.json")
    described = ("pack", "student", "--evaluation", "evaluation.json", *_OUT)
    return [*subjects, Subject(described, evaluation, ("evaluation.json",))]


def _runs() -> list[Subject]:
    never = ("--resume", "never")
    stages = ("stages.json", "eval.json", f"*/{_MANIFEST}", "*/*.safetensors")
    calibrated = ("quantize", "model", "--group-size", "32", "--data", "calibration", *_OUT)
    return [
        Subject(_QUANTIZE, ("model", "text.txt", "quantize.partial"), ("out.partial/*",), True, never),
        Subject(_DISTILL, ("model", "student", "text.txt", "distill.partial"), ("out.partial/*",), True, never),
        Subject(_RUN, ("model", "text.txt", "recipe.yaml", "run.out"), tuple(f"out/{each}" for each in stages), True),
        Subject(_STUDY, ("model", "text.txt", "study.yaml", "study.out"), ("out/results.jsonl",), True),
        Subject(("study", "report", "out", "-q", "--json"), ("study.out",), ("out/results.jsonl",), True),
        Subject(calibrated, ("model", "calibration"), ("calibration/*",), True),
    ]


def _caches() -> list[Subject]:
    return [
        Subject(_CACHED, ("student", "model", "text.txt", "eval.cache"), ("cache/*",), True),
        Subject(_CACHED_TASKS, ("student", "model", "tasks", "tasks.cache"), ("cache/*",), True),
        Subject(_STUDY, ("model", "text.txt", "study.yaml", "study.cache"), ("out/cache/*",), True),
    ]


SUBJECTS: dict[str, Callable[[], list[Subject]]] = {
    "recipes and studies": _recipes,
    "models": _models,
    "texts and tasks": _texts,
    "checkpoints": _checkpoints,
    "runs": _runs,
    "caches": _caches,
}


class Kitchen:
    """A pantry of inputs, and a folder where commands run on copies of them."""

    def __init__(self, folder: Path, server: ForkServer) -> None:
        self.pantry, self.work, self.server = folder / "pantry", folder / "work", server
        self.pantry.mkdir()
        self._expected: dict[Subject, Any] = {}

    def lay(self, subject: Subject) -> list[Path]:
        """Copy what a subject needs; the files that can be mutated."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name in subject.needs:
            kept, given = self.pantry / name, self.work / _GIVEN.get(name, name)
            if not kept.exists():
                self._make(name)
            if kept.is_dir():
                shutil.copytree(kept, given, symlinks=True)
            else:
                shutil.copy2(kept, given)
        found = {file for pattern in subject.files for file in self.work.glob(pattern) if file.is_file()}
        return sorted(found - {file for file in found if file.name in _NOT_MUTATED})

    def run(self, arguments: tuple[str, ...], **how: Any) -> Ended:
        """Run a command; how as for `ForkServer.run`."""
        environment = {"QCLI_CACHE": "cache"}
        return self.server.run(arguments, watched=self.work, environment=environment, limit=_HANG, **how)

    def result(self, ended: Ended) -> Any:
        """What a command has printed and written, comparable."""
        try:
            return stable(json.loads(ended.out)) if ended.out else None, described(self.work / "out")
        except FileNotFoundError:
            return stable(json.loads(ended.out)), None
        except (OSError, ValueError) as error:
            return None, str(error)

    def expected(self, subject: Subject) -> Any:
        """The result of files that nobody has changed."""
        if subject not in self._expected:
            self.lay(subject)
            ended = self.run(subject.arguments, counted=False)
            assert ended.code == 0, ended.err
            self._expected[subject] = self.result(ended)
        return self._expected[subject]

    def _make(self, name: str) -> None:
        """Add an input to the pantry."""
        work = self.work.rename(self.work.with_name(f"before-{name}"))
        kept = self.pantry / name
        self.work.mkdir()
        if name in _MADE:
            needs, arguments, result = _MADE[name]
            self.lay(Subject(arguments, needs, ()))
            if result == "out.partial":
                self._interrupted(Subject(arguments, needs, ()))
            else:
                ended = self.run(arguments, counted=False)
                assert ended.code == 0, ended.err
            if name == "study.cache":
                (self.work / "out" / "results.jsonl").unlink()
            (self.work / result).rename(kept)
            if name == "evaluation.json":
                kept.write_text(ended.out)
        else:
            _WRITTEN.get(name, _write_model)(kept)
        shutil.rmtree(self.work)
        work.rename(self.work)

    def _interrupted(self, subject: Subject) -> None:
        """Leave `out.partial` of a command that was killed late."""
        calls = self.run(subject.arguments).calls
        for call in range(calls, 0, -max(1, calls // 40)):
            self.lay(subject)
            self.run(subject.arguments, fault=Fault("SIGKILL", call))
            journal = self.work / "out.partial" / "journal.jsonl"
            if not (self.work / "out").exists() and journal.exists():
                return
        raise AssertionError(f"{subject} leaves nothing")


def _write_model(file: Path) -> None:
    family = {"model": "llama", "sharded": "llama"}.get(file.name, file.name)
    shutil.move(with_merge(tiny_model(family, file.parent)), file)
    if file.name == "sharded":
        _shard(file)


def _shard(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {f"model-0000{number + 1}-of-00002.safetensors": number for number in range(2)}
    weight_map: dict[str, str] = {}
    for part, number in parts.items():
        chosen = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % 2 == number}
        save_file(chosen, folder / part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, part)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_gguf(folder: Path) -> None:
    from tests.models.test_gguf import write_gguf

    folder.mkdir()
    file = write_gguf(folder)
    for other in folder.iterdir():
        if other != file:
            shutil.rmtree(other)


def _write_tasks(folder: Path) -> None:
    folder.mkdir()
    questions = [
        {"question": f"{n} times {n + 1} is", "choices": [f" {n}{more}" for more in "123"], "label": n % 3}
        for n in range(6)
    ]
    (folder / "times.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "times.yaml").write_text(_TASK)


def _write_jsonl(file: Path) -> None:
    words = (write_text(file.parent).read_text()).split(";")
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in words[:60]))


def _write_parquet(file: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    pq.write_table(pa.table({"text": write_text(file.parent).read_text().split(";")[:60]}), file)


_TASK = """
task: times
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/times.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: label
target_delimiter: ""
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3}
"""
_WRITTEN: dict[str, Callable[[Path], object]] = {
    "text.txt": lambda file: write_text(file.parent),
    "text.jsonl": _write_jsonl,
    "text.parquet": _write_parquet,
    "recipe.yaml": lambda file: file.write_text(RECIPE),
    "study.yaml": lambda file: file.write_text(STUDY),
    "tasks": _write_tasks,
    "gguf": _write_gguf,
}
_MADE: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {  # inputs, command, what is kept
    "student": (("model",), ("quantize", "model", *_RTN, *_OUT), "out"),
    **{
        f"packed-{layout}": (("student",), ("pack", "student", "--format", layout, *_OUT), "out") for layout in _LAYOUTS
    },
    "calibration": (("model", "text.txt"), ("calibrate", "model", *_TEXT, *_OUT), "out"),
    "evaluation.json": (("student", "text.txt"), ("eval", "student", "--data", "text.txt", *_WINDOWS), "text.txt"),
    "eval.cache": (("student", "model", "text.txt"), _CACHED, "cache"),
    "tasks.cache": (("student", "model", "tasks"), _CACHED_TASKS, "cache"),
    "quantize.partial": (("model", "text.txt"), _QUANTIZE, "out.partial"),
    "distill.partial": (("student", "model", "text.txt"), _DISTILL, "out.partial"),
    "run.out": (("model", "text.txt", "recipe.yaml"), _RUN, "out"),
    "study.out": (("model", "text.txt", "study.yaml"), _STUDY, "out"),
    "study.cache": (("model", "text.txt", "study.yaml"), _STUDY, "out"),
}
_GIVEN = {
    **dict.fromkeys(("quantize.partial", "distill.partial"), "out.partial"),
    **dict.fromkeys(("run.out", "study.out", "study.cache"), "out"),
    **dict.fromkeys(("eval.cache", "tasks.cache"), "cache"),
}
_NOT_MUTATED = {"lock", ".qcli-run", ".qcli-study", ".qcli-cache"}


@cache
def kitchen() -> Kitchen:
    """The one of this process."""
    folder = Path(tempfile.mkdtemp(prefix="qcli-kitchen-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Kitchen(folder, fork_server())
