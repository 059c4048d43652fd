"""Run a study: quantize, train and score each of its recipes, and keep a row of each.

    DIR/study.json       version
    DIR/results.jsonl    a row for each run that has ended, well or not, appended and synced
    DIR/work/ADDRESS     a run in progress; resumes
    DIR/cache            what runs share: calibration tokens and what baselines give

Rows are found again by the address of their run, so a study that was interrupted or extended goes on where it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from qcli import shards
from qcli.errors import QcliError, StateError, UsageError
from qcli.progress import Progress, silent
from qcli.recipe import Eval
from qcli.study_grid import Run, Study

VERSION = 1
_STORY, _ROWS, _WORK, _CACHE, _LOCK = "study.json", "results.jsonl", "work", "cache", "lock"
Executor = Literal["local", "ray"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Studied:
    """What a call of `run_study` did.

    Attributes:
        done, failed, kept: runs that ended well now, that failed now, and whose row was there.
    """

    out: Path
    done: int
    failed: int
    kept: int
    seconds: float

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
        StateError: `out` is something else, of another version, or in use.
        UnsupportedError: Ray is not installed.
    """
    started = time.monotonic()
    with _opened(out):
        known = {row["address"]: row for row in read_rows(out)}
        todo = [
            run
            for run in study.runs
            if run.address not in known or (retry and known[run.address]["status"] == "failed")
        ]
        ended: list[Row] = []
        progress("runs", 0, len(todo))
        for row in _rows(todo, out, workers, executor, address, progress):
            _append(out / _ROWS, row)
            ended.append(row)
            told = ", ".join(f"{axis} {value}" for axis, value in row["point"].items())
            progress("runs", len(ended), len(todo), f"{told}: {row['status']}")
    failed = sum(row["status"] == "failed" for row in ended)
    return Studied(out, len(ended) - failed, failed, len(study.runs) - len(todo), time.monotonic() - started)


def read_rows(out: Path) -> list[Row]:
    """The newest row of each address, in the order in which they ended.

    Raises:
        StateError: `out` is no study, or one of another version.
    """
    _check_version(out)
    try:
        lines = (out / _ROWS).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may have been cut short
    return list({row["address"]: row for row in rows}.values())


def _rows(
    runs: Sequence[Run], out: Path, workers: int, executor: Executor, address: str | None, progress: Progress
) -> Iterator[Row]:
    jobs = [(run.recipe.to_yaml(), run.point, run.address, str(out)) for run in runs]
    if executor == "ray":
        from qcli.study_ray import rows_from_ray

        yield from rows_from_ray(jobs, workers, address)
    elif workers == 1:
        for job in jobs:
            yield make_row(*job, progress)
    else:
        threads = max(1, (os.cpu_count() or 1) // workers)
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_use_threads, initargs=(threads,)
        ) as pool:
            for future in as_completed([pool.submit(make_row, *job) for job in jobs]):
                yield future.result()


def make_row(recipe: str, point: dict[str, Any], address: str, out: str, progress: Progress = silent) -> Row:
    """Quantize and score one recipe; what goes wrong is in the row.

    Args:
        recipe: as YAML.
    """
    from qcli.checkpoint import versions

    begun = time.time()
    row: Row = {"address": address, "point": point, "recipe": recipe, "started": round(begun, 1)}
    try:
        found = _measured(recipe, Path(out), address, progress)
    except QcliError as error:
        found = {"status": "failed", "error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    except (RuntimeError, MemoryError, OSError) as error:
        found = {"status": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0], "exit_code": 1}
    shutil.rmtree(Path(out) / _WORK / address, ignore_errors=True)
    return row | found | {"versions": versions(), "total_seconds": round(time.time() - begun, 1)}


def _measured(text: str, out: Path, address: str, progress: Progress) -> Row:
    import tempfile

    from qcli.cache import Cache
    from qcli.checkpoint import read_manifest
    from qcli.distill import distill
    from qcli.evaluate import evaluate
    from qcli.quantize import quantize
    from qcli.recipe_loading import load_recipe
    from qcli.tasks import Tasks

    work, cache = out / _WORK / address, Cache(out / _CACHE)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        recipe, _ = load_recipe(Path(file.name), {})
    final = work / "quantized"
    if not final.exists():
        quantize(recipe.model_copy(update={"out": str(final)}), progress)
    story = read_manifest(final)
    seconds = {"quantize": story["seconds"]}
    if recipe.distill is not None:
        taught = work / "distilled"
        if not taught.exists():
            seconds["distill"] = distill(final, recipe.model_copy(update={"out": str(taught)}), progress).seconds
        final = taught
    asked = recipe.eval or Eval()
    begun = time.monotonic()
    found = evaluate(
        str(final),
        baseline=asked.baseline or recipe.model,
        data=asked.perplexity,
        window=asked.window,
        max_windows=asked.max_windows,
        tasks=Tasks(asked.tasks, asked.include_path, asked.limit, asked.fewshot) if asked.tasks else None,
        cache=cache,
        device=recipe.device,
        progress=progress,
    )
    seconds["eval"] = time.monotonic() - begun
    return {
        "status": "done",
        **found.to_json(),
        "fallbacks": {layer["name"]: layer["fallbacks"] for layer in story["layers"] if layer["fallbacks"]},
        "peak_memory": story["peak_memory"],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


@contextmanager
def _opened(out: Path) -> Iterator[None]:
    """The folder, for this process alone."""
    if out.exists() and not (out / _STORY).exists() and any(out.iterdir()):
        raise StateError(f"{out} exists and is no study", hint="choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateError(f"another qcli is at work in {out}", hint="wait for it") from None
        if not (out / _STORY).exists():
            shards.write_json(out / _STORY, {"version": VERSION})
        _check_version(out)
        _mend(out / _ROWS)
        yield


def _check_version(out: Path) -> None:
    try:
        version = json.loads((out / _STORY).read_text())["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise StateError(f"{out} is no study", hint="`qcli study STUDY.yaml --out DIR` makes one") from None
    except (ValueError, KeyError, TypeError):
        raise StateError(f"{out / _STORY} is damaged", hint="choose another --out") from None
    if version != VERSION:
        raise StateError(
            f"{out} is a study of version {version}, this qcli knows {VERSION}", hint="choose another --out"
        )


def _mend(file: Path) -> None:
    """Cut off a last line that was not written to its end."""
    if file.exists():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(file, whole)


def _append(file: Path, row: Row) -> None:
    """Synced: what is told as done stays done."""
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _use_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def require_size(study: Study, limit: int, agreed: bool) -> None:
    """Raise UsageError if there are more runs than anybody meant, unless they were agreed to."""
    if len(study.runs) > limit and not agreed:
        raise UsageError(f"{study.source} has {len(study.runs)} runs", hint=f"--yes runs more than {limit}")


_Job = tuple[str, dict[str, Any], str, str]
Executed = Callable[[Sequence[_Job], int, str | None], Iterator[Row]]
