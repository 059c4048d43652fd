"""A study: recipes that differ along axes, from one YAML file.

    base: {model: ..., calibration: {...}, eval: {...}}   # the recipe that every run starts from
    names:                                                # short names for values
      refine: {ZQ-Global: {scope: block, steps: 100}}
    grid:                                                 # every combination; or a list of such grids
      method.name: [rtn, gptq-like]
      method.bits: [2, 3, 4]
      refine: [null, ZQ-Global]
    include: [{method.name: onebit}]                      # further single runs
    exclude: [{method.name: rtn, method.bits: 2}]         # combinations to leave out

Axes are paths of recipe fields; of two that overlap (`method`, `method.bits`) the later one wins. All errors are
reported together, each with its place in the file.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcli.recipe.draft import Draft
from qcli.recipe.load import checked
from qcli.recipe.recipe import Recipe
from qcli.recipe.yaml import KeyPath, dotted
from qcli.study.rows import ROWS
from qcli.study.sections import Sections
from qcli.utils.errors import UsageError

_NOT_IN_ADDRESS = {"device", "out", "resume", "pack"}  # nor is `eval.gates`
_FORBIDDEN: tuple[KeyPath, ...] = (("pack",), ("out",), ("eval", "gates"))
# Up to so many times the limit, combinations are expanded (half a second): exclusion may leave few enough runs.
_EXPANDABLE = 10


@dataclass(frozen=True)
class Run:
    """One recipe of a study.

    Attributes:
        point: its value on each axis, or the name of that value.
        recipe: the complete recipe.
        address: hash of everything that determines the run's row.
    """

    point: dict[str, Any]
    recipe: Recipe
    address: str


@dataclass(frozen=True)
class Study:
    """The distinct runs of a study file, in its order.

    Attributes:
        file: path of the study file.
        axes: all paths of recipe fields that runs differ on.
    """

    file: str
    axes: list[str]
    runs: list[Run]


def load_study(path: Path, sets: Sequence[str] = (), limit: int | None = None) -> Study:
    """Read and expand a study.

    Args:
        sets: `a.b=c` texts, which change its base.
        limit: the number of runs that needs no confirmation; None: any number is fine.

    Raises:
        UsageError: all errors in the file, one per line; or far more combinations than `limit`.
    """
    if (path / ROWS).exists():
        report = shlex.join(["qcli", "study", "report", str(path)])
        raise UsageError(f"{path} is the folder of a study's rows, not a study", hint=f"`{report}` reports on them")
    draft = Draft()
    draft.add_file(path)
    if "model" in draft.data and "base" not in draft.data:
        raise UsageError(f"{path} is a recipe, not a study", hint=f"`qcli run {path} --dry-run` checks it")
    sections = Sections(draft)
    if limit is not None and sections.combinations() > _EXPANDABLE * limit:
        raise too_many(f"{path} has up to {sections.combinations()} combinations", limit)
    axes = [*dict.fromkeys(axis for entry in (*sections.grids.values(), *sections.include) for axis in entry)]
    runs: dict[str, Run] = {}
    errors = list(sections.errors)
    for point, places in sections.points():
        try:
            recipe = _recipe(sections, point, places, sets)
        except UsageError as error:
            errors += error.message.split("\n")
            continue
        address = address_of(recipe)
        runs.setdefault(address, Run(point, recipe, address))
    errors += sections.idle_exclusions()
    if errors:
        raise UsageError(*draft.origins.in_order(errors))
    return Study(str(path), axes, list(runs.values()))


def require_size(study: Study, limit: int, confirmed: bool) -> None:
    """Raise UsageError if a study has more runs than `limit`, unless that number is confirmed."""
    if len(study.runs) > limit and not confirmed:
        raise too_many(f"{study.file} has {len(study.runs)} runs", limit)


def too_many(problem: str, limit: int) -> UsageError:
    """The error of more runs than `limit`, which are rarely intended."""
    return UsageError(problem, hint=f"--yes allows more than {limit}")


def _recipe(sections: Sections, point: Mapping[str, Any], places: Mapping[str, str], sets: Sequence[str]) -> Recipe:
    draft = Draft()
    draft.data = deepcopy(sections.base)
    draft.origins.source = sections.draft.origins.source
    draft.origins.by_path = {
        path[1:]: place for path, place in sections.draft.origins.by_path.items() if path[:1] == ("base",) and path[1:]
    }
    for text in sets:
        draft.add_set(text)
    for axis, value in point.items():
        draft.put(axis.split("."), deepcopy(sections.value(axis, value)), places[axis])
    errors = [
        f"{_origin(draft, path)}: {dotted(path)}: pack, out and gates cannot be part of a study"
        for path in _FORBIDDEN
        if _is_set(draft.data, path)
    ]
    if errors:
        raise UsageError(*errors)
    return checked(draft)


def _is_set(data: Any, path: KeyPath) -> bool:
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data is not None


def _origin(draft: Draft, path: KeyPath) -> str | None:
    """Where the value at `path`, or the first one inside it, comes from."""
    known = draft.origins.by_path.items()
    return next((place for at, place in known if at[: len(path)] == path), draft.origins.near(path))


def address_of(recipe: Recipe) -> str:
    """A hash of the values that determine a run's row, without the content of what the recipe names."""
    content = {name: value for name, value in recipe.to_dict().items() if name not in _NOT_IN_ADDRESS}
    if recipe.eval is not None:
        content["eval"] = recipe.eval.model_dump(mode="json", exclude={"gates"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
