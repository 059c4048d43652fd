"""Raw values from a file, `--set` and flags, merged by precedence; what they mean is left to the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qcli.recipe.origins import Origins
from qcli.recipe.yaml import HALF_A_CHARACTER, MAX_BYTES, KeyPath, dotted, is_text, read_yaml
from qcli.utils.errors import UsageError

_FLAGS = {  # flags that are not named after the last part of their path
    "model": "MODEL",
    "method.name": "--method",
    "method.symmetric": "--symmetric/--asymmetric",
}


class Draft:
    """Merged values, the later of two winning.

    Attributes:
        data: the values so far, as plain data.
        origins: where each of them came from.
        lines: errors so far, as shown.
    """

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.origins = Origins()
        self.lines: list[str] = []
        self._refused: set[KeyPath] = set()  # paths whose value is a stand-in for one that was refused

    def add_file(self, path: Path) -> None:
        """The values of a YAML file, which comes first.

        Raises:
            UsageError: it cannot be read, or is not a mapping.
        """
        name = self.origins.source = str(path)
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UsageError(f"recipe {name}: {reason}", hint=_near_file(path)) from None
        document = read_yaml(text, name)
        if not isinstance(document.data, dict):
            raise UsageError(f"{name}:1:1: a recipe is a mapping of keys to values", hint="model: ...")
        self.data = document.data
        self.origins.by_path = {at: f"{name}:{line}:{column}" for at, (line, column) in document.places.items()}
        for at, (line, column), message in document.problems:
            key = "" if "?" in at else f"{dotted(at)}: "
            self.lines.append(f"{name}:{line}:{column}: {key}{message}")
            self._refused.add(at)

    def add_set(self, text: str) -> None:
        """A `key=value` of `--set`, the value in YAML."""
        key, equals, value = text.partition("=")
        if not key or not equals:
            self.lines.append(f"--set {text}: must be key=value, as in method.bits=3")
            return
        self._add_yaml(key, value, f"--set {text}")

    def add_flag(self, path: str, value: Any) -> None:
        """The value of the flag that sets the dotted `path`."""
        if isinstance(value, str) and not is_text(value):
            self.lines.append(f"{flag_name(path)}: {HALF_A_CHARACTER}: rename it in UTF-8")
            return
        if path.endswith(".data") and isinstance(value, str) and value.startswith(("{", "[")):
            self._add_yaml(path, value, flag_name(path))  # a text that needs more than a name
            return
        self.put(path.split("."), value, flag_name(path))

    def _add_yaml(self, path: str, value: str, origin: str) -> None:
        try:
            document = read_yaml(value, origin)
        except UsageError as error:
            self.lines.append(error.message)
            return
        self.lines += [f"{origin}: {problem.message}" for problem in document.problems]
        self.put(path.split("."), document.data, origin)

    def put(self, parts: Sequence[str], value: Any, origin: str) -> None:
        """Set the value at a path and create the mappings around it; items of a list have their index as name."""
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

    def was_refused(self, path: KeyPath) -> bool:
        """Whether the value at `path`, or a mapping around it, has an error among `lines` already."""
        return any(path[:length] in self._refused for length in range(1, len(path) + 1))


def _near_file(path: Path) -> str | None:
    """The recipe beside a missing one whose name is nearest."""
    if path.exists() or not path.parent.is_dir():
        return None
    near = get_close_matches(path.name, sorted(file.name for file in path.parent.glob("*.y*ml")), n=1)
    return f"did you mean {path.parent / near[0]}?" if near else None


def flag_name(path: str) -> str:
    """`--group-size` for `method.group_size`."""
    return _FLAGS.get(path, "--" + path.rpartition(".")[2].replace("_", "-"))


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
