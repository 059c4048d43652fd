"""A study: recipes that differ along axes, from one YAML file.

    base: {model: ..., calibration: {...}, eval: {...}}   # a recipe, where every run starts from
    names:                                                # what values are called, where that is shorter
      refine: {ZQ-Global: {scope: block, steps: 100}}
    grid:                                                 # every combination; or a list of such grids
      method.name: [rtn, gptq-like]
      method.bits: [2, 3, 4]
      refine: [null, ZQ-Global]
    include: [{method.name: onebit}]                      # single runs besides
    exclude: [{method.name: rtn, method.bits: 2}]         # combinations that are left out

Axes are paths of recipe fields; of two that overlap (`method`, `method.bits`) the later one wins. Everything wrong is
told at once, with its place in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from qcli.recipe.draft import Draft
from qcli.recipe.errors import unknown
from qcli.recipe.load import checked
from qcli.recipe.recipe import Recipe
from qcli.recipe.yaml import KeyPath, dotted
from qcli.utils.errors import UsageError

_SECTIONS = ("base", "names", "grid", "include", "exclude")
_NOT_DECISIVE = {"device", "out", "resume", "pack"}  # and `eval.gates`
_IGNORED: tuple[KeyPath, ...] = (("pack",), ("out",), ("eval", "gates"))
_NO_PART = "{}: {}: pack, out and gates are no part of a study"
_EXPANDED = 10  # times the limit: so many combinations, made recipes in half a second, may still come to few runs


@dataclass(frozen=True)
class Run:
    """One recipe of a study.

    Attributes:
        point: its value on each axis, or that value's name.
        recipe: resolved.
        address: hash of the fields that decide the run's row.
    """

    point: dict[str, Any]
    recipe: Recipe
    address: str


@dataclass(frozen=True)
class Study:
    """Runs in the order of the file, each once.

    Attributes:
        axes: every path that differs between runs.
    """

    source: str
    axes: list[str]
    runs: list[Run]


def load_study(path: Path, sets: Sequence[str] = (), most: int | None = None) -> Study:
    """Read and expand a study.

    Args:
        sets: `a.b=c` texts, which change its base.
        most: runs that nobody need agree to; None: any number was agreed to.

    Raises:
        UsageError: everything that is wrong, a line each; or far more combinations than `most`.
    """
    draft = Draft()
    draft.add_file(path)
    sections = _Sections(draft)
    if most is not None and sections.combinations() > _EXPANDED * most:
        raise too_many(f"{path} has up to {sections.combinations()} combinations", most)
    axes = [*dict.fromkeys(axis for entry in (*sections.grids.values(), *sections.include) for axis in entry)]
    runs: dict[str, Run] = {}
    lines = list(sections.lines)
    for point, origins in sections.points():
        try:
            recipe = _recipe(sections, point, origins, sets)
        except UsageError as error:
            lines += error.message.splitlines()
            continue
        address = _address(recipe)
        runs.setdefault(address, Run(point, recipe, address))
    lines += sections.idle()
    if lines:
        raise UsageError("\n".join(dict.fromkeys(lines)))
    return Study(str(path), axes, list(runs.values()))


def too_many(found: str, most: int) -> UsageError:
    """More runs than anybody meant."""
    return UsageError(found, hint=f"--yes runs more than {most}")


class _Sections:
    """The parts of the file, with what is wrong with their shapes."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.lines = draft, list(draft.lines)
        data = draft.data
        for key in data:
            if key not in _SECTIONS:
                self._wrong((key,), unknown(f"key {key!r}", key, _SECTIONS))
        self.base = self._section("base", dict)
        self.names: dict[str, Any] = self._section("names", dict)
        for axis, values in list(self.names.items()):
            if not isinstance(values, dict):
                self._wrong(("names", axis), "must be a mapping of names to values")
                del self.names[axis]
        many = isinstance(data.get("grid"), list)
        grids = self._section("grid", list) if many else [self._section("grid", dict)]
        self.grids: dict[KeyPath, dict[str, list[Any]]] = {}
        for number, grid in enumerate(grids):
            at: KeyPath = ("grid", number) if many else ("grid",)
            if not isinstance(grid, dict):
                self._wrong(at, "must be a mapping of axes to lists of values")
                continue
            self.grids[at] = grid
            for axis, values in list(grid.items()):
                if not isinstance(values, list) or not values:
                    self._wrong((*at, axis), "must be a list of values")
                    del grid[axis]
        self.include: list[dict[str, Any]] = self._section("include", list)
        self.exclude: list[dict[str, Any]] = self._section("exclude", list)
        for name, entries in (("include", self.include), ("exclude", self.exclude)):
            for number, entry in enumerate(entries):
                if not isinstance(entry, dict) or not entry:
                    self._wrong((name, number), "must be a mapping of axes to values")
        self.include, self.exclude = (
            [e for e in entries if isinstance(e, dict)] for entries in (self.include, self.exclude)
        )
        self.used: set[int] = set()

    def points(self) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        """Every combination and every single run, and where their values stand."""
        for at, grid in self.grids.items():
            if not grid and self.include:
                continue
            for picks in product(*(enumerate(values) for values in grid.values())):
                point = {axis: value for axis, (_, value) in zip(grid, picks, strict=True)}
                if not self._excluded(point):
                    yield point, {axis: self._place((*at, axis, i)) for axis, (i, _) in zip(grid, picks, strict=True)}
        for number, entry in enumerate(self.include):
            yield dict(entry), {axis: self._place(("include", number, axis)) for axis in entry}

    def combinations(self) -> int:
        """How many points there are at most: nothing is left out or merged yet."""
        return sum(prod(map(len, grid.values())) for grid in self.grids.values()) + len(self.include)

    def value(self, axis: str, value: Any) -> Any:
        """What a value of an axis means, which may be given by its name."""
        return self.names.get(axis, {}).get(value, value) if isinstance(value, str) else value

    def idle(self) -> list[str]:
        """Exclusions that leave nothing out."""
        return [
            f"{self._place(('exclude', number))}: leaves nothing out"
            for number in range(len(self.exclude))
            if number not in self.used
        ]

    def _excluded(self, point: Mapping[str, Any]) -> bool:
        found = False
        for number, rule in enumerate(self.exclude):
            if all(
                axis in point and point[axis] in (value if isinstance(value, list) else [value])
                for axis, value in rule.items()
            ):
                self.used.add(number)
                found = True
        return found

    def _section(self, name: str, kind: type[Any]) -> Any:
        value = self.draft.data.get(name)
        if value is None:
            return kind()
        if not isinstance(value, kind):
            self._wrong((name,), "must be a mapping" if kind is dict else "must be a list")
            return kind()
        return value

    def _wrong(self, path: KeyPath, message: str) -> None:
        self.lines.append(f"{self._place(path)}: {'.'.join(map(str, path))}: {message}")

    def _place(self, path: KeyPath) -> str:
        return self.draft.origins.of(path)


def _recipe(sections: _Sections, point: Mapping[str, Any], places: Mapping[str, str], sets: Sequence[str]) -> Recipe:
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
    ignored = [_NO_PART.format(_origin(draft, path), dotted(path)) for path in _IGNORED if _given(draft.data, path)]
    if ignored:
        raise UsageError("\n".join(ignored))
    return checked(draft)


def _given(data: Any, path: KeyPath) -> bool:
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data is not None


def _origin(draft: Draft, path: KeyPath) -> str | None:
    """Where what is at `path`, or the first of what is in it, stands."""
    known = draft.origins.by_path.items()
    return next((place for at, place in known if at[: len(path)] == path), draft.origins.near(path))


def _address(recipe: Recipe) -> str:
    decisive = {name: value for name, value in recipe.to_dict().items() if name not in _NOT_DECISIVE}
    if recipe.eval is not None:
        decisive["eval"] = recipe.eval.model_dump(mode="json", exclude={"gates"})
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
