"""One run of a study: its recipe through the pipeline, and the row of results."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from qcli.study.grid import Run
from qcli.study.rows import CACHE, RUNS, Row
from qcli.utils.cache import Cache
from qcli.utils.errors import QcliError, StateError
from qcli.utils.files import disk_problem
from qcli.utils.lock import FolderLock
from qcli.utils.progress import Progress, silent
from qcli.utils.trust import NOTHING, Trust

TRIES = 3  # of a run whose worker dies; each resumes after the last finished block


def make_row(run: Run, out: Path, progress: Progress = silent, trust: Trust = NOTHING) -> Row:
    """Execute a run in the study's folder `out`; if it fails, the row has the error.

    Raises:
        StateError: another process is working on it.
        ResourceError: its folder cannot be created.
    """
    from qcli.models.manifest import versions

    started = time.time()
    with _locked(out / RUNS / run.address) as lock:
        try:
            results = _results(run, lock.folder, Cache(out / CACHE), progress, trust)
        except QcliError as error:
            results = failure(error.message, error.exit_code) | {"hint": error.hint}
        except Exception as error:  # no failure of a run ends the study
            results = failure(f"{type(error).__name__}: {error}".splitlines()[0])
        with contextlib.suppress(OSError):
            lock.remove()
    head = row_head(run) | {"started": round(started, 1)}
    return head | results | {"versions": versions(), "total_seconds": round(time.time() - started, 1)}


def row_head(run: Run) -> Row:
    """The fields of a row that are known before its run."""
    return {"address": run.address, "point": run.point, "recipe": run.recipe.to_yaml()}


def failure(error: str, exit_code: int = 1) -> Row:
    """The further fields of the row of a failed run."""
    return {"status": "failed", "error": error, "exit_code": exit_code}


def _locked(folder: Path) -> FolderLock:
    """Create and lock a run's folder, which a worker of a killed study may still be using."""
    try:
        return FolderLock(folder, StateError(f"another qcli is using {folder}", hint="wait for it"))
    except OSError as error:
        raise disk_problem(folder, error) from None


def _results(run: Run, folder: Path, cache: Cache, progress: Progress, trust: Trust) -> Row:
    from qcli.models.manifest import Manifest
    from qcli.pipeline import QUANTIZED, Pipeline

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
        "fallbacks": {layer.name: layer.fallbacks for layer in manifest.layers if layer.fallbacks},
        "peak_memory": manifest.peak_memory,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
