"""Where each value of a recipe came from, and errors that say so."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qcli.recipe.errors import Issue
from qcli.recipe.yaml import KeyPath, dotted
from qcli.utils.errors import UsageError


@dataclass
class Origins:
    """Origins of values: `recipe.yaml:6:10`, `--set method.bits=3`, `--bits` or `default`.

    They are no part of a recipe's value: all origins compare equal.

    Attributes:
        source: name of the recipe file, None without one.
        by_path: the origin of every value that was given, in the order in which they were given.
    """

    source: str | None = field(default=None, compare=False)
    by_path: dict[KeyPath, str] = field(default_factory=dict, compare=False)

    def of(self, path: KeyPath) -> str:
        """Origin of the value at `path`."""
        return self.by_path.get(path, "default")

    def near(self, path: KeyPath) -> str | None:
        """Where to look for an error at `path`: its own origin, that of a mapping around it, or the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.by_path:
                return self.by_path[path[:length]]
        return self.source

    def error(self, problems: Sequence[Issue], *, hint: str | None = None) -> UsageError:
        """All problems as one error, a line each."""
        return UsageError(*self.in_order(map(self.line, problems)), hint=hint)

    def in_order(self, lines: Iterable[str]) -> list[str]:
        """Lines of errors without repetition: those of the file as one reads it, then the others."""
        place = re.compile(rf"{re.escape(self.source or '')}:(\d+):(\d+): ")

        def order(line: str) -> tuple[float, float]:
            found = place.match(line) if self.source else None
            return (int(found[1]), int(found[2])) if found else (math.inf, 0)

        return sorted(dict.fromkeys(lines), key=order)

    def line(self, problem: Issue) -> str:
        """`recipe.yaml:6:10: method.bitz: unknown key`, or `--bits: must be at least 2, not 1`."""
        origin = self.near(problem.path)
        path = problem.path
        if origin is not None and origin.startswith("-") and path in self.by_path:  # a flag names what it sets,
            whole = next(n for n in range(1, len(path) + 1) if self.by_path.get(path[:n]) == origin)
            path = path[whole:]  # but not a key inside of it
        return ": ".join(filter(None, (origin, dotted(path), problem.message)))
