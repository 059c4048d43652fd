"""Plain data as YAML text, with comments behind the values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from qcli.recipe.yaml import KeyPath, scalar

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*")


def to_yaml(data: Mapping[str, Any], comment: Callable[[KeyPath], str] = lambda _: "") -> str:
    """Dicts, lists and finite scalars as YAML, each with the `comment` of its path, if that is not empty."""
    lines = list(_lines(data, (), comment))
    width = max((len(text) for text, comment in lines if comment), default=0)
    return "".join(f"{text:<{width}}  # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


def _lines(data: Mapping[str, Any], path: KeyPath, comment: Callable[[KeyPath], str]) -> list[tuple[str, str]]:
    indent = "  " * len(path)
    lines: list[tuple[str, str]] = []
    for key, value in data.items():
        here = (*path, key)
        if isinstance(value, Mapping) and value:
            lines += [(f"{indent}{key}:", ""), *_lines(value, here, comment)]
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            items = [(f"{indent}  - {_flow(item)}", _escaped(comment((*here, i)))) for i, item in enumerate(value)]
            lines += [(f"{indent}{key}:", ""), *items]
        else:
            lines.append((f"{indent}{key}: {_flow(value)}", _escaped(comment(here))))
    return lines


def _escaped(comment: str) -> str:
    return json.dumps(comment, ensure_ascii=True)[1:-1]


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and scalar(value) == value:
        return value
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    """JSON strings are YAML, but for characters beyond 16 bits, which JSON writes as two halves."""
    return '"' + "".join(json.dumps(c)[1:-1] if c <= "\uffff" else f"\\U{ord(c):08x}" for c in text) + '"'
