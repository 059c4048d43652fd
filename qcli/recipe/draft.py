"""Raw recipe values from a file, `--set` and flags, merged by precedence; what they mean is not known here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qcli.recipe.errors import Origins
from qcli.recipe.yaml import MAX_BYTES, KeyPath, dotted, read_yaml
from qcli.utils.errors import UsageError


class Draft:
    """Raw values on their way to a recipe, with their origins and everything found wrong so far."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.origins = Origins()
        self.lines: list[str] = []  # errors, as shown
        self.spoilt: set[KeyPath] = set()  # paths whose value is a stand-in for one that was refused

    def add_file(self, path: Path) -> None:
        name = self.origins.source = str(path)
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UsageError(f"recipe {name}: {reason}") from None
        document = read_yaml(text, name)
        if not isinstance(document.data, dict):
            raise UsageError(f"{name}:1:1: a recipe is a mapping of keys to values", hint="model: ...")
        self.data = document.data
        self.origins.by_path = {at: f"{name}:{line}:{column}" for at, (line, column) in document.places.items()}
        for at, (line, column), message in document.problems:
            key = "" if "?" in at else f"{dotted(at)}: "
            self.lines.append(f"{name}:{line}:{column}: {key}{message}")
            self.spoilt.add(at)

    def add_set(self, text: str) -> None:
        key, equals, value = text.partition("=")
        if not key or not equals:
            self.lines.append(f"--set {text}: must be key=value, as in method.bits=3")
            return
        try:
            document = read_yaml(value, f"--set {text}")
        except UsageError as error:
            self.lines.append(error.message)
            return
        self.lines += [f"--set {text}: {problem.message}" for problem in document.problems]
        self.put(key.split("."), document.data, f"--set {text}")

    def put(self, parts: Sequence[str], value: Any, origin: str) -> None:
        """Set the value at a path, which makes the mappings around it; items of lists go by their number."""
        node: Any = self.data
        path: KeyPath = ()
        for last, part in zip([False] * (len(parts) - 1) + [True], parts, strict=True):
            index = int(part) if isinstance(node, list) and part.isdecimal() else part
            missing = isinstance(node, dict) and node.get(part) is None
            if not missing and not _holds(node, index):
                self.lines.append(f"{origin}: {dotted(path)} has no {part!r}")
                return
            path = (*path, index)
            if last:
                node[index] = value
            elif missing:
                node[index] = {}
            node = node[index]
        known = self.origins.by_path
        self.origins.by_path = {at: place for at, place in known.items() if at[: len(path)] != path}
        self.origins.by_path.update(dict.fromkeys(_paths(value, path), origin))

    def is_spoilt(self, path: KeyPath) -> bool:
        """Whether the value at `path`, or a mapping around it, was refused already."""
        return any(path[:length] in self.spoilt for length in range(1, len(path) + 1))


def _paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """`path` and those of everything inside its value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def _holds(node: Any, part: str | int) -> bool:
    if isinstance(node, list):
        return isinstance(part, int) and part < len(node)
    return isinstance(node, dict) and part in node
