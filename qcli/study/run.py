"""One run of a study: quantize, train and score its recipe."""

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

TRIES = 3  # of a run whose worker dies; each resumes after the last block that was finished


def make_row(run: Run, out: Path, progress: Progress = silent) -> Row:
    """Make a run in the study's folder `out`; what goes wrong is in the row.

    Raises:
        StateError: another process makes it.
        ResourceError: its folder cannot be made.
    """
    from qcli.models.manifest import versions

    begun = time.time()
    with _locked(out / RUNS / run.address) as lock:
        try:
            found = _measured(run, lock.folder, Cache(out / CACHE), progress)
        except QcliError as error:
            found = failure(error.message, error.exit_code) | {"hint": error.hint}
        except Exception as error:  # a study goes on, whatever a run meets
            found = failure(f"{type(error).__name__}: {error}".splitlines()[0])
        with contextlib.suppress(OSError):
            lock.remove()
    known = headed(run) | {"started": round(begun, 1)}
    return known | found | {"versions": versions(), "total_seconds": round(time.time() - begun, 1)}


def headed(run: Run) -> Row:
    """What is known of a row before its run."""
    return {"address": run.address, "point": run.point, "recipe": run.recipe.to_yaml()}


def failure(error: str, exit_code: int = 1) -> Row:
    """The rest of the row of a run that failed."""
    return {"status": "failed", "error": error, "exit_code": exit_code}


def _locked(folder: Path) -> FolderLock:
    """The folder, made if there is none, for this process alone: a worker of a study that was killed may be in it."""
    try:
        return FolderLock(folder, StateError(f"another qcli is at work in {folder}", hint="wait for it"))
    except OSError as error:
        raise disk_problem(folder, error) from None


def _measured(run: Run, work: Path, cache: Cache, progress: Progress) -> Row:
    from qcli.models.manifest import Manifest
    from qcli.pipeline import QUANTIZED, Pipeline

    pipeline = Pipeline(run.recipe, work, cache=cache, calibration_cache=cache, progress=progress)
    pipeline.quantize()
    manifest = Manifest.read(work / QUANTIZED)
    seconds = {"quantize": manifest.seconds}
    pipeline.distill()
    if (distilled := pipeline.result.distilled) is not None:
        seconds["distill"] = distilled.seconds
    begun = time.monotonic()
    evaluation = pipeline.evaluate()
    seconds["eval"] = time.monotonic() - begun
    return {
        "status": "done",
        **evaluation,
        "model": run.recipe.model,  # and not the folder of what was made of it, which is gone
        "fallbacks": {layer.name: layer.fallbacks for layer in manifest.layers if layer.fallbacks},
        "peak_memory": manifest.peak_memory,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
