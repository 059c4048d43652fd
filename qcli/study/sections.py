"""The sections of a study file, and the points that its grids expand to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Any

from qcli.recipe.draft import Draft
from qcli.recipe.errors import unknown
from qcli.recipe.yaml import KeyPath

_SECTIONS = ("base", "names", "grid", "include", "exclude")


class Sections:
    """The sections of a study file, checked for their shapes.

    Attributes:
        errors: one line each.
        grids: axes and values of each grid, by its path in the file.
        include, exclude: axes and values of each entry.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft, self.errors = draft, list(draft.lines)
        data = draft.data
        for key in data:
            if key not in _SECTIONS:
                self._add_error((key,), unknown(f"key {key!r}", key, _SECTIONS))
        self.base = self._section("base", dict)
        self.names: dict[str, Any] = self._section("names", dict)
        for axis, values in list(self.names.items()):
            if not isinstance(values, dict):
                self._add_error(("names", axis), "must be a mapping of names to values")
                del self.names[axis]
        several = isinstance(data.get("grid"), list)
        grids = self._section("grid", list) if several else [self._section("grid", dict)]
        self.grids: dict[KeyPath, dict[str, list[Any]]] = {}
        for number, grid in enumerate(grids):
            at: KeyPath = ("grid", number) if several else ("grid",)
            if not isinstance(grid, dict):
                self._add_error(at, "must be a mapping of axes to lists of values")
                continue
            self.grids[at] = grid
            for axis, values in list(grid.items()):
                if not isinstance(values, list) or not values:
                    self._add_error((*at, axis), "must be a list of values")
                    del grid[axis]
        self.include: list[dict[str, Any]] = self._section("include", list)
        self.exclude: list[dict[str, Any]] = self._section("exclude", list)
        for name, entries in (("include", self.include), ("exclude", self.exclude)):
            for number, entry in enumerate(entries):
                if not isinstance(entry, dict) or not entry:
                    self._add_error((name, number), "must be a mapping of axes to values")
        self.include, self.exclude = (
            [e for e in entries if isinstance(e, dict)] for entries in (self.include, self.exclude)
        )
        self._effective: set[int] = set()  # indices of exclusions that have left something out

    def points(self) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        """Every combination and every included run, with the place in the file of each of its values."""
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
        """An upper bound of the number of points, before exclusions."""
        return sum(prod(map(len, grid.values())) for grid in self.grids.values()) + len(self.include)

    def value(self, axis: str, value: Any) -> Any:
        """The value of an axis that `value` stands for, if that is a name."""
        return self.names.get(axis, {}).get(value, value) if isinstance(value, str) else value

    def idle_exclusions(self) -> list[str]:
        """Errors for exclusions that match no combination."""
        return [
            f"{self._place(('exclude', number))}: matches no combination"
            for number in range(len(self.exclude))
            if number not in self._effective
        ]

    def _excluded(self, point: Mapping[str, Any]) -> bool:
        excluded = False
        for number, rule in enumerate(self.exclude):
            if all(
                axis in point and point[axis] in (value if isinstance(value, list) else [value])
                for axis, value in rule.items()
            ):
                self._effective.add(number)
                excluded = True
        return excluded

    def _section(self, name: str, kind: type[Any]) -> Any:
        value = self.draft.data.get(name)
        if value is None:
            return kind()
        if not isinstance(value, kind):
            self._add_error((name,), "must be a mapping" if kind is dict else "must be a list")
            return kind()
        return value

    def _add_error(self, path: KeyPath, message: str) -> None:
        self.errors.append(f"{self._place(path)}: {'.'.join(map(str, path))}: {message}")

    def _place(self, path: KeyPath) -> str:
        return self.draft.origins.of(path)
