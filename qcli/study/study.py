"""Run a study: its recipes one after another, in processes, or on a Ray cluster.

Rows are found again by the address of their run, which is made of its recipe and of the content of what it reads, so a
study that was interrupted or extended goes on where it is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qcli.recipe.sections import Eval
from qcli.study.content import by_content, require_texts
from qcli.study.grid import Run, Study, too_many
from qcli.study.rows import CACHE, Row, append, opened, read_rows
from qcli.study.run import make_row
from qcli.utils.cache import Cache
from qcli.utils.errors import QcliError
from qcli.utils.progress import Progress, silent

Executor = Literal["local", "ray"]
RETRY = "--retry tries them again"


@dataclass(frozen=True)
class Studied:
    """What a call of `run_study` did.

    Attributes:
        done, failed, kept: runs that ended well now, that failed now, and whose row was there.
        failed_before: of those kept, the runs that had failed.
        reason: why the first of all runs that failed did.
        exit_code: 0 if a run has ended well, now or before; else that of most failures.
    """

    out: Path
    done: int
    failed: int
    kept: int
    seconds: float
    failed_before: int = 0
    reason: str | None = None
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"out": str(self.out)}


def run_study(
    study: Study,
    out: Path,
    *,
    workers: int = 1,
    executor: Executor = "local",
    address: str | None = None,
    retry: bool = False,
    progress: Progress = silent,
) -> Studied:
    """Make the rows that are missing.

    Args:
        workers: runs at a time, each in a process of its own; 1: one after another, in this one.
        executor: where they run; `address` is that of a Ray cluster, which sees `out` under the same path.
        retry: runs that failed before are tried again.

    Raises:
        UsageError: a text that a recipe names is not there, one to evaluate on is too short, or there is no such task
            or its data cannot be loaded; nothing was run.
        StateError: `out` is something else, of another version, damaged, or it or the folder of a run is in use.
        ResourceError: the folder of a run cannot be made.
        UnsupportedError: Ray is not installed.
    """
    started, out = time.monotonic(), out.absolute()
    require_texts(study.runs)
    with opened(out):
        known = {row["address"]: row for row in read_rows(out)}
        runs = by_content(study.runs)
        todo = [run for run in runs if run.address not in known or (retry and known[run.address]["status"] == "failed")]
        ended: list[Row] = []
        require_tasks(todo, data=executor == "local")
        _require_evaluation_texts(todo, Cache(out / CACHE), executor)
        progress("runs", 0, len(todo))
        for row in _rows(todo, out, workers, executor, address, progress):
            append(out, row)
            ended.append(row)
            told = ", ".join(f"{axis} {value}" for axis, value in row["point"].items())
            progress("runs", len(ended), len(todo), f"{told}: {_ended(row)}")
    rows = {**known, **{row["address"]: row for row in ended}}
    failures = [row for row in (rows[run.address] for run in runs) if row["status"] == "failed"]
    failed = sum(row["status"] == "failed" for row in ended)
    codes = Counter(row["exit_code"] for row in failures) if len(failures) == len(runs) else Counter()
    return Studied(
        out,
        done=len(ended) - failed,
        failed=failed,
        kept=len(runs) - len(todo),
        seconds=time.monotonic() - started,
        failed_before=len(failures) - failed,
        reason=_first_line(failures[0]) if failures else None,
        exit_code=codes.most_common(1)[0][0] if codes else 0,
    )


def require_tasks(runs: Iterable[Run], *, data: bool = False) -> None:
    """Raise UsageError unless there are all tasks that the recipes name, and if it matters here the `data` of them."""
    from qcli.evaluation.from_recipe import recipe_tasks  # torch

    asked = {str((each.tasks, each.include_path, each.gates)): run.recipe for run in runs if (each := run.recipe.eval)}
    for recipe in asked.values():
        tasks = recipe_tasks(recipe)
        if data and tasks is not None:
            tasks.require_data()


def _require_evaluation_texts(runs: Iterable[Run], cache: Cache, executor: Executor) -> None:
    """Read every text once for each model and length, so that a short one costs no run."""
    from qcli.evaluation.from_recipe import require_evaluation_texts
    from qcli.models.open import open_source

    asked = {}
    for run in runs:
        wanted = run.recipe.eval or Eval()
        read = wanted.baseline, wanted.perplexity, wanted.window, wanted.max_windows
        asked[str((run.recipe.model, run.recipe.device, read))] = run.recipe
    for recipe in asked.values():
        here = recipe if executor == "local" else recipe.model_copy(update={"device": "cpu"})  # nodes have the GPUs
        require_evaluation_texts(here, open_source(recipe.model), cache=cache)


def require_one_done(studied: Studied) -> None:
    """Raise the error of most failures if no run of the study has ended well, now or before."""
    if studied.exit_code:
        error = QcliError(f"all {studied.failed + studied.failed_before} runs failed: {studied.reason}", hint=RETRY)
        error.exit_code = studied.exit_code
        raise error


def require_size(study: Study, limit: int, agreed: bool) -> None:
    """Raise UsageError if there are more runs than anybody meant, unless they were agreed to."""
    if len(study.runs) > limit and not agreed:
        raise too_many(f"{study.source} has {len(study.runs)} runs", limit)


def _ended(row: Row) -> str:
    return f"failed: {_first_line(row)}" if row["status"] == "failed" else str(row["status"])


def _first_line(row: Row) -> str:
    return next(iter(str(row["error"]).splitlines()), "no reason given")


def _rows(
    runs: Sequence[Run], out: Path, workers: int, executor: Executor, address: str | None, progress: Progress
) -> Iterator[Row]:
    if executor == "ray":
        from qcli.study.ray import rows_from_ray

        yield from rows_from_ray(runs, out, workers, address)
    elif workers == 1:
        for run in runs:
            yield make_row(run, out, progress)
    else:
        from qcli.study.processes import rows_from_processes

        yield from rows_from_processes(runs, out, workers)
