"""What the runs of a study read: whether it is there, and its content as part of their addresses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace

from qcli.data.datasets import require_text
from qcli.data.image_rows import data_content
from qcli.data.source import Data, text_paths
from qcli.recipe.recipe import Recipe
from qcli.study.grid import Run
from qcli.utils.trust import NOTHING, Trust


def address_by_content(runs: Iterable[Run], trust: Trust = NOTHING) -> list[Run]:
    """The runs with addresses that also depend on the content of every file and folder that their recipes name.

    Names that are not paths (hub ids, data sets) count by name alone. Runs that trust a model's own code have addresses
    of their own.
    """
    hashes: dict[str, str | None] = {}

    def content(name: str) -> str | None:
        if name not in hashes:
            hashes[name] = data_content(name)
        return hashes[name]

    addressed = []
    for run in runs:
        inputs = {name: content(name) for name in sorted(set(_names(run.recipe)))}
        key = json.dumps([run.address, inputs, *(["remote code"] if trust.remote_code else [])])
        addressed.append(replace(run, address=hashlib.sha256(key.encode()).hexdigest()[:16]))
    return addressed


def require_texts(runs: Iterable[Run]) -> None:
    """Raise UsageError unless every text that the runs' recipes name exists."""
    for name in dict.fromkeys(name for run in runs for name in _texts(run.recipe)):
        require_text(name)


def _names(recipe: Recipe) -> Iterable[str]:
    yield recipe.source
    yield from (path for text in _texts(recipe) for path in text_paths(text))
    if recipe.eval is not None:
        yield from (path for path in (recipe.eval.baseline, recipe.eval.include_path) if path is not None)


def _texts(recipe: Recipe) -> Iterable[Data]:
    yield recipe.calibration.data
    if recipe.distill is not None:
        yield recipe.distill_text.data
    if recipe.eval is not None:
        yield from recipe.eval.perplexity
