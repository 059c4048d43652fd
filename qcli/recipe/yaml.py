"""A strict reader of small YAML files that records the place of every key and item.

Scalars follow the YAML 1.2 core schema (`1e-4` is a number, `no` is text). It refuses what YAML readers usually accept:
duplicate keys, which silently overwrite; anchors and aliases, which can expand exponentially; tags, which can construct
objects; keys that are not text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qcli.utils.errors import UsageError

KeyPath = tuple[str | int, ...]  # ("overrides", 0, "method", "bits")

MAX_BYTES = 1 << 16  # the reader takes 10 us a byte, and errors are reported within a second
MAX_DEPTH = 16

_NULL = re.compile(r"|~|null|Null|NULL")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,1000}")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]{1,1000}|0x[0-9a-fA-F]{1,1000}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF_OR_NAN = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Place(NamedTuple):
    """Line and column, both from 1."""

    line: int
    column: int


class Problem(NamedTuple):
    """What was refused at a path of the document."""

    path: KeyPath
    place: Place
    message: str


@dataclass
class Document:
    """A parsed YAML text.

    Attributes:
        data: dicts with text keys, lists and scalars.
        places: of every key and list item.
        problems: what was refused; at these paths `data` holds None, or the first of duplicates.
    """

    data: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def dotted(path: KeyPath) -> str:
    """`overrides[0].method.bits`: how errors and `--set` write a path."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_yaml(text: str, name: str) -> Document:
    """Parse one YAML document.

    Raises:
        UsageError: not YAML, several documents, too large or nested too deeply, as `name:line:column: ...`.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise UsageError(f"{name}: larger than {MAX_BYTES // 1024} KiB", hint="is this a recipe?")
    reader = _Reader(YAML(typ="safe", pure=True).parse(text), name)
    try:
        return reader.document()
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        hint = "quote text that starts with *" if error.context == "while scanning an alias" else None
        raise UsageError(f"{name}{place}: not valid YAML: {error.problem}", hint=hint) from None
    except YAMLError as error:
        raise UsageError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None


def scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar in the YAML 1.2 core schema."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL_OR_HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF_OR_NAN.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


HALF_A_CHARACTER = "contains half a character (a lone surrogate)"


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold a string: no lone surrogates, which names that are not UTF-8 get from the shell."""
    return value.isascii() or value.encode(errors="ignore").decode() == value


class _Reader:
    """Builds a Document from the parser's events, so that nothing refused is ever constructed."""

    def __init__(self, events: Iterator[Any], name: str) -> None:
        self.events, self.name, self.result = events, name, Document()

    def document(self) -> Document:
        for event in self.events:
            match _kind(event):
                case "DocumentStart" if self.result.data is not None:
                    raise self.refuse(event, "a second document; one file is one recipe")
                case "StreamStart" | "DocumentStart" | "DocumentEnd" | "StreamEnd":
                    pass
                case _:
                    self.result.data = self.node(event, ())
        return self.result

    def node(self, event: Any, path: KeyPath) -> Any:
        if len(path) > MAX_DEPTH:
            raise self.refuse(event, f"nested more than {MAX_DEPTH} levels deep")
        kind = _kind(event)
        if kind == "Alias":
            self.problem(event, path, f"aliases (*{event.anchor}) are not allowed; quote text that starts with *")
            return None
        if event.anchor is not None:
            self.problem(event, path, f"anchors (&{event.anchor}) are not allowed; write the value out")
        if event.ctag is not None:
            self.problem(event, path, f"tags ({event.ctag}) are not allowed")
        if kind == "MappingStart":
            return self.mapping(path)
        if kind == "SequenceStart":
            return self.sequence(path)
        if not is_text(event.value):
            self.problem(event, path, HALF_A_CHARACTER)
            return None
        return scalar(event.value) if event.style is None else event.value

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while _kind(event := next(self.events)) != "MappingEnd":
            key = self.node(event, (*path, "?"))
            value_event = next(self.events)
            if _kind(event) != "Scalar":
                self.problem(event, (*path, "?"), "a key must be text")
                self.node(value_event, (*path, "?"))
                continue
            here = (*path, event.value)
            if not is_text(event.value):
                self.node(value_event, (*path, "?"))
                continue
            if not isinstance(key, str):
                self.problem(event, here, f"a key must be text; quote it: {event.value!r}")
            first = self.result.places.get(here)
            if first is None:
                self.result.places[here] = _place(event)
                result[event.value] = self.node(value_event, here)
            else:
                self.problem(event, here, f"given twice; first on line {first.line}")
                self.node(value_event, (*path, "?"))
        return result

    def sequence(self, path: KeyPath) -> list[Any]:
        result: list[Any] = []
        while _kind(event := next(self.events)) != "SequenceEnd":
            here = (*path, len(result))
            self.result.places[here] = _place(event)
            result.append(self.node(event, here))
        return result

    def problem(self, event: Any, path: KeyPath, message: str) -> None:
        self.result.problems.append(Problem(path, _place(event), message))

    def refuse(self, event: Any, message: str) -> UsageError:
        line, column = _place(event)
        return UsageError(f"{self.name}:{line}:{column}: {message}")


def _kind(event: Any) -> str:
    return type(event).__name__.removesuffix("Event")


def _place(event: Any) -> Place:
    return Place(event.start_mark.line + 1, event.start_mark.column + 1)
