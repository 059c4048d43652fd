"""Run a study: its recipes one after another, in several processes, or on a Ray cluster.

A run is identified by its address, a hash of its recipe and of the content of everything that it reads. A study that
was interrupted or extended therefore continues with the runs that have no row yet.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Eval
from qcli.study.content import address_by_content, require_texts
from qcli.study.grid import Run, Study
from qcli.study.rows import CACHE, Row, append, read_rows, study_folder
from qcli.study.run import make_row
from qcli.study.texts import with_texts
from qcli.utils.cache import Cache
from qcli.utils.errors import VerificationError
from qcli.utils.progress import Progress, silent
from qcli.utils.trust import NOTHING, Trust

Executor = Literal["local", "ray"]
RETRY = "--retry repeats them"


@dataclass(frozen=True)
class StudyResult:
    """What a call of `run_study` did.

    Attributes:
        done, failed: runs that succeeded and failed in this call.
        kept: runs that had a row before it.
        failed_before: failed ones among those.
        reasons: errors of failed runs, the most frequent first, each with the number of runs.
        exit_code: 0 if any run has succeeded, now or before; else the most frequent one of the failed runs.
    """

    out: Path
    done: int
    failed: int
    kept: int
    seconds: float
    failed_before: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"out": str(self.out)}

    def require_success(self, *, strict: bool = False) -> None:
        """Raise an error if every run of the study has failed, with the most frequent exit code.

        Args:
            strict: raise a VerificationError if any has.
        """
        failed = self.failed + self.failed_before
        if not self.exit_code and not (strict and failed):
            return
        count = f"all {failed}" if self.exit_code else f"{failed} of {self.done + self.failed + self.kept}"
        several = len(self.reasons) > 1
        error = VerificationError(
            *(f"{count} runs failed: {f'{n} with ' if several else ''}{reason}" for reason, n in self.reasons.items()),
            hint=RETRY,
        )
        error.exit_code = error.exit_code if strict else self.exit_code
        raise error


def run_study(
    study: Study,
    out: Path,
    *,
    workers: int = 1,
    executor: Executor = "local",
    address: str | None = None,
    retry: bool = False,
    progress: Progress = silent,
    trust: Trust = NOTHING,
) -> StudyResult:
    """Execute the runs that have no row yet.

    Args:
        workers: number of parallel runs, each in its own process; 1: one after another, in this process.
        executor: where runs execute; `address` is that of a Ray cluster, which sees `out` under the same path.
        retry: repeat failed runs.
        trust: code of models and tasks that may run.

    Raises:
        UsageError: a text that a recipe names is missing, one to evaluate on is too short, or a task does not exist
            or its data cannot be loaded; nothing was run.
        StateError: `out` is something else, of another version, damaged, or in use, or the folder of a run is in use.
        ResourceError: the folder of a run cannot be created.
        UnsupportedError: Ray is not installed.
    """
    started, out = time.monotonic(), out.absolute()
    require_texts(study.runs)
    with study_folder(out):
        known = {row["address"]: row for row in read_rows(out)}
        runs = with_texts(study.runs, lambda runs: address_by_content(runs, trust), known)
        missing = [
            run for run in runs if run.address not in known or (retry and known[run.address]["status"] == "failed")
        ]
        finished: list[Row] = []
        require_tasks(missing, trust, data=executor == "local")
        _require_evaluation_texts(missing, Cache(out / CACHE), executor, trust)
        progress("runs", 0, len(missing))
        for row in _rows(missing, out, workers, executor, address, progress, trust):
            append(out, row)
            finished.append(row)
            point = ", ".join(f"{axis} {value}" for axis, value in row["point"].items())
            progress("runs", len(finished), len(missing), f"{point}: {_status(row)}")
    rows = {**known, **{row["address"]: row for row in finished}}
    failures = [row for row in (rows[run.address] for run in runs) if row["status"] == "failed"]
    failed = sum(row["status"] == "failed" for row in finished)
    codes = Counter(row["exit_code"] for row in failures) if len(failures) == len(runs) else Counter()
    return StudyResult(
        out,
        done=len(finished) - failed,
        failed=failed,
        kept=len(runs) - len(missing),
        seconds=time.monotonic() - started,
        failed_before=len(failures) - failed,
        reasons=dict(Counter(map(_first_line, failures)).most_common()),
        exit_code=codes.most_common(1)[0][0] if codes else 0,
    )


def require_tasks(runs: Iterable[Run], trust: Trust = NOTHING, *, data: bool = False) -> None:
    """Raise UsageError unless all tasks that the recipes name exist and, with `data`, their data can be loaded."""
    distinct: dict[str, Recipe] = {}
    for run in runs:
        if (section := run.recipe.eval) is not None and section.tasks:
            distinct[str((section.tasks, section.include_path, section.gates))] = run.recipe
    for recipe in distinct.values():
        from qcli.evaluation.from_recipe import recipe_tasks  # torch, which a study without tasks does not need here

        tasks = recipe_tasks(recipe, trust)
        if data and tasks is not None:
            tasks.require_data()


def _require_evaluation_texts(runs: Iterable[Run], cache: Cache, executor: Executor, trust: Trust) -> None:
    """Tokenize every evaluation text once per model and length, so that one that is too short fails before any run."""
    distinct: dict[str, Recipe] = {}
    for run in runs:
        section = run.recipe.eval or Eval()
        windows = section.baseline, section.perplexity, section.window, section.max_windows
        distinct[str((run.recipe.model, run.recipe.device, windows))] = run.recipe
    for recipe in distinct.values():
        from qcli.evaluation.from_recipe import require_evaluation_texts  # torch, which is not needed if no run is left
        from qcli.models.open import open_source

        local = recipe if executor == "local" else recipe.model_copy(update={"device": "cpu"})  # GPUs are on the nodes
        require_evaluation_texts(local, open_source(recipe.source, trust), cache=cache, trust=trust)


def _status(row: Row) -> str:
    return f"failed: {_first_line(row)}" if row["status"] == "failed" else str(row["status"])


def _first_line(row: Row) -> str:
    return next(iter(str(row["error"]).splitlines()), "no reason given")


def _rows(
    runs: Sequence[Run],
    out: Path,
    workers: int,
    executor: Executor,
    address: str | None,
    progress: Progress,
    trust: Trust,
) -> Iterator[Row]:
    if executor == "ray":
        from qcli.study.ray import rows_from_ray

        yield from rows_from_ray(runs, out, workers, address, trust)
    elif workers == 1:
        for run in runs:
            yield make_row(run, out, progress, trust)
    else:
        from qcli.study.processes import rows_from_processes

        yield from rows_from_processes(runs, out, workers, trust)
