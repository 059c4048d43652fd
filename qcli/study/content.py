"""Addresses of runs by their recipes and by the content of the files that these name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from qcli.data.datasets import require_text
from qcli.recipe.recipe import Recipe
from qcli.study.grid import Run
from qcli.utils.files import content_hash


def by_content(runs: Iterable[Run]) -> list[Run]:
    """The runs with addresses that change when a file or folder changes that their recipes name.

    What is no path here (a hub id, a data set's name) is known by its name alone.
    """
    hashes: dict[str, str | None] = {}

    def content(name: str) -> str | None:
        if name not in hashes:
            hashes[name] = content_hash(Path(name))
        return hashes[name]

    found = []
    for run in runs:
        read = {name: content(name) for name in sorted(set(_names(run.recipe)))}
        key = json.dumps([run.address, read])
        found.append(replace(run, address=hashlib.sha256(key.encode()).hexdigest()[:16]))
    return found


def require_texts(runs: Iterable[Run]) -> None:
    """Raise UsageError unless there are all texts that the runs' recipes name."""
    for name in dict.fromkeys(name for run in runs for name in _texts(run.recipe)):
        require_text(name)


def _names(recipe: Recipe) -> Iterable[str]:
    yield recipe.model
    yield from _texts(recipe)
    if recipe.eval is not None:
        yield from (path for path in (recipe.eval.baseline, recipe.eval.include_path) if path is not None)


def _texts(recipe: Recipe) -> Iterable[str]:
    yield recipe.calibration.data
    if recipe.distill is not None:
        yield recipe.distill_text.data
    if recipe.eval is not None:
        yield from recipe.eval.perplexity
