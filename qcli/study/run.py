"""One run of a study: its recipe through the pipeline, and the row of results."""

from __future__ import annotations

import time
from pathlib import Path

from qcli.study.grid import Run
from qcli.study.rows import CACHE, RUNS, Row
from qcli.utils.cache import Cache
from qcli.utils.errors import ResourceError, StateError, expected
from qcli.utils.owned_folder import FolderKind, OwnedFolder
from qcli.utils.progress import Progress, silent
from qcli.utils.trust import NOTHING, Trust

KIND = FolderKind("study-run", ("quantized*", "distilled*", "eval.json", "stages.json", ".*.partial"))
TRIES = 3  # of a run whose worker dies; each resumes after the last finished block


def make_row(run: Run, out: Path, progress: Progress = silent, trust: Trust = NOTHING) -> Row:
    """Execute a run in the study's folder `out`; if it fails, the row has the error.

    The folder of a run that ran out of memory or disk is kept, so that it can be resumed.

    Raises:
        StateError: another process is working on it, or its folder was not created by qcli.
        QcliError: its folder cannot be created; see `os_problem`.
    """
    from qcli.models.manifest import versions

    started, work = time.time(), out / RUNS / run.address
    with OwnedFolder(work, KIND, StateError(f"another qcli is using {work}", hint="wait for it")) as folder:
        try:
            results = _results(run, work, Cache(out / CACHE), progress, trust)
        except Exception as error:  # no failure of a run ends the study
            problem = expected(error)
            if problem is None:
                results = failure(f"{type(error).__name__}: {error}".splitlines()[0])
            else:
                results = failure(problem.message, problem.exit_code) | {"hint": problem.hint}
        if results.get("exit_code") != ResourceError.exit_code:
            folder.remove()
    head = row_head(run) | {"started": round(started, 1)}
    return head | results | {"versions": versions(), "total_seconds": round(time.time() - started, 1)}


def row_head(run: Run) -> Row:
    """The fields of a row that are known before its run."""
    return {"address": run.address, "point": run.point, "recipe": run.recipe.to_yaml()}


def failure(error: str, exit_code: int = 1) -> Row:
    """The further fields of the row of a failed run."""
    return {"status": "failed", "error": error, "exit_code": exit_code}


def _results(run: Run, folder: Path, cache: Cache, progress: Progress, trust: Trust) -> Row:
    from qcli.models.manifest import Manifest
    from qcli.pipeline.record import QUANTIZED
    from qcli.pipeline.stages import Pipeline

    pipeline = Pipeline(run.recipe, folder, cache=cache, calibration_cache=cache, progress=progress, trust=trust)
    pipeline.quantize()
    manifest = Manifest.read(folder / QUANTIZED)
    seconds = {"quantize": manifest.seconds}
    pipeline.distill()
    if (distilled := pipeline.result.distilled) is not None:
        seconds["distill"] = distilled.seconds
    started = time.monotonic()
    evaluation = pipeline.evaluate()
    seconds["eval"] = time.monotonic() - started
    return {
        "status": "done",
        **evaluation,
        "model": run.recipe.model,  # not the checkpoint, whose folder is removed
        "baseline": {**evaluation["baseline"], "model": _baseline(run)},  # in full: the report groups runs by it
        "fallbacks": {layer.name: layer.fallbacks for layer in manifest.layers if layer.fallbacks},
        "peak_memory": manifest.peak_memory,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _baseline(run: Run) -> str:
    options = run.recipe.eval
    return (options.baseline if options is not None else None) or run.recipe.source
