"""Texts of rows: which columns hold them, and how a row becomes one text. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcli.data.rows import Row, RowFile
from qcli.data.source import TextSource, template_columns
from qcli.utils.errors import UsageError

Messages = list[dict[str, Any]]
Render = Callable[[Messages, str], str]
"""Makes text of the messages of a chat; the place is for errors."""


def without_template(messages: Messages, place: str) -> str:
    """Refuse chats, where there is no model whose template makes text of them."""
    raise UsageError(f"{place} is a chat, which takes a model's chat template", hint="name the column of a text")


CHATS = ("messages", "conversations")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"))
_CONTEXT = ("input", "context")  # beside an instruction, may be empty
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_FOUND = "found by themselves: text, messages, conversations, prompt and completion, instruction and output"


@dataclass(frozen=True)
class Choice:
    """How the rows of a file become text.

    Attributes:
        columns: what is read of every row.
        separator: stands between the texts of two rows.
        text: the text of a row; errors name its place.
    """

    columns: tuple[str, ...]
    separator: str
    text: Callable[[Row], str]


def choose(file: RowFile, source: TextSource, render: Render) -> Choice:
    """How a file's rows become text: as the source says, else by the columns that there are.

    Raises:
        UsageError: a column is missing, or it is unclear which one is meant.
    """
    known = f"its columns: {', '.join(file.columns)}"
    if source.template is not None:
        names = template_columns(source.template)
        if missing := [name for name in names if name not in file.columns]:
            raise UsageError(f"{file.path}: no column {missing[0]!r}, which the template names", hint=known)
        return Choice(names, "\n\n", lambda row: _filled(source.template or "", row))
    if source.column is not None:
        if source.column not in file.columns:
            raise UsageError(f"{file.path}: no column {source.column!r}", hint=known)
        return _single(file, source.column, render)
    for name in ("text", *CHATS):
        if name in file.columns:
            return _single(file, name, render)
    for asked, answered in PAIRS:
        if asked in file.columns and answered in file.columns:
            more = next((name for name in _CONTEXT if name in file.columns), None) if asked == "instruction" else None
            return _pair(asked, answered, more, render)
    raise UsageError(
        f"{file.path}: it is unclear which column is the text; {known}",
        hint=f"name it: data: {{path: {file.path}, column: {file.columns[0]}}}, or write a template; {_FOUND}",
    )


def _single(file: RowFile, column: str, render: Render) -> Choice:
    """Text as it is, or a chat, as the first row has it."""
    first = next(iter(file.read((column,))), None)
    if first is None or not isinstance(first.values.get(column), list):
        return Choice((column,), "\n\n", lambda row: text_of(row, column))
    return Choice((column,), "", lambda row: _rendered(messages_of(row, column), row, column, render))


def _pair(asked: str, answered: str, more: str | None, render: Render) -> Choice:
    def text(row: Row) -> str:
        if isinstance(row.values.get(asked), list):
            turns = messages_of(row, asked) + messages_of(row, answered)
        else:
            question = text_of(row, asked)
            if more is not None and row.values.get(more):
                question += f"\n\n{text_of(row, more)}"
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": text_of(row, answered)},
            ]
        return _rendered(turns, row, asked, render)

    return Choice((asked, answered, *([more] if more else [])), "", text)


def _rendered(messages: Messages, row: Row, column: str, render: Render) -> str:
    return whole(render(messages, row.place), row.place, f"the chat of {column!r}")


def _filled(template: str, row: Row) -> str:
    """The template with a row's texts; a column may be empty as long as not all are."""
    names = template_columns(template)
    texts = {name: _value(row, name) for name in names}
    if not any(text.strip() for text in texts.values()):
        raise UsageError(f"{row.place}: {', '.join(map(repr, names))} are empty", hint="remove the row")
    filled = re.sub(r"\{([^{}]+)\}", lambda match: texts[match[1]], template)
    return whole(filled, row.place, "the template's text")


def text_of(row: Row, column: str) -> str:
    """The text in one column of a row.

    Raises:
        UsageError: there is none, or it holds half a character.
    """
    text = _value(row, column)
    if not text.strip():
        raise UsageError(f"{row.place}: {column!r} is empty", hint="remove the row")
    return whole(text, row.place, repr(column))


def whole(text: str, place: str, what: str) -> str:
    """A text that can be encoded.

    Raises:
        UsageError: it holds half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{place}: {what} contains half a character (a lone surrogate)", hint="remove the row"
        ) from None
    return text


def messages_of(row: Row, column: str) -> Messages:
    """The messages of a chat, with `role` and `content`, also where the row has `from` and `value`.

    Raises:
        UsageError: the column holds no list of messages, or one of them no text.
    """
    found = _present(row, column)
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise UsageError(f"{row.place}: {column!r} is no list of messages", hint=_MESSAGES)
    return [_message(each, row, f"{column}[{number}]") for number, each in enumerate(found)]


_MESSAGES = 'a chat is [{"role": "user", "content": "..."}, ...], or with "from" and "value"'


def _message(found: Any, row: Row, name: str) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise UsageError(f"{row.place}: {name} is no message", hint=_MESSAGES)
    role, content = (found.get(key, found.get(other)) for key, other in (("role", "from"), ("content", "value")))
    if "from" in found and "role" not in found:
        if role not in _ROLES:
            raise UsageError(f"{row.place}: {name} is from {role!r}", hint=f"known: {', '.join(_ROLES)}")
        role = _ROLES[role]
    if not isinstance(role, str) or not isinstance(content, str):
        what = "role" if not isinstance(role, str) else "content"
        raise UsageError(f"{row.place}: {name} has no text as its {what}", hint=_MESSAGES)
    if not content.strip() and role != "system":
        raise UsageError(f"{row.place}: {name} is empty", hint="remove the row")
    return {"role": role, "content": content}


def _present(row: Row, column: str) -> Any:
    if column not in row.values:
        raise UsageError(f"{row.place}: no {column!r}", hint="every row must have it, or be removed")
    return row.values[column]


def _value(row: Row, column: str) -> str:
    if not isinstance(text := _present(row, column), str):
        raise UsageError(f"{row.place}: {column!r} is no text", hint="remove the row")
    return text
