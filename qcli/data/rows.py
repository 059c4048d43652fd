"""Rows of local files: what each kind of file holds, as dictionaries with their places. No torch, and no choice among
columns: `text_files` makes texts of rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from qcli.utils.errors import UsageError

_SPACES = (" ", "\t", "\n", "\r")  # of JSON
_LONGEST_FIELD = 2**31 - 1  # of a .csv file; Python's own limit is 128 KiB, less than a chapter


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        place: where it is, for messages: `a.jsonl:3`, `a.parquet: row 2`, or the file alone.
        values: by column.
    """

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class RowFile:
    """A file of rows.

    Attributes:
        path: the file.
        columns: its columns; of a file that names them in every row, those of the first one.
        read: rows with at least the given ones of the columns that they have; errors of the file are UsageError.
    """

    path: Path
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[Row]]


def kinds() -> tuple[str, ...]:
    """Suffixes of the files that can be read, in lower case."""
    return tuple(_OPENERS)


def is_known(path: Path) -> bool:
    """Whether a file's name ends like one of `kinds`, in letters of any case."""
    return path.suffix.lower() in _OPENERS


def open_rows(path: Path) -> RowFile:
    """A file of rows; a text is one row, with the column `text`.

    Args:
        path: an existing file of a known kind.

    Raises:
        UsageError: the file is damaged, or has no header; so does reading its rows.
    """
    return _OPENERS[path.suffix.lower()](path)


def _open_txt(path: Path) -> RowFile:
    text = _text(path)
    return RowFile(path, ("text",), lambda _: iter([Row(str(path), {"text": text})] if text.strip() else []))


def _open_jsonl(path: Path) -> RowFile:
    return _named_by_rows(path, _lines(path, "a .jsonl file has one JSON object per line"))


def _open_json(path: Path) -> RowFile:
    """A list of objects, or as many `.json` files have it, an object a line."""
    text, hint = _text(path), "a .json file is a list of objects, or has one object per line"
    by_line = not text.strip() or text.lstrip().startswith("{")
    return _named_by_rows(path, _lines(path, hint) if by_line else _items(path, text, hint))


def _named_by_rows(path: Path, rows: Iterator[Row]) -> RowFile:
    """A file that names its columns in every row."""
    every = list(rows)
    return RowFile(path, tuple(every[0].values) if every else (), lambda _: iter(every))


def _lines(path: Path, hint: str) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            with _json_errors(path, number, hint):
                value = json.loads(line)
            yield _object(value, f"{path}:{number}", hint)


def _items(path: Path, text: str, hint: str) -> Iterator[Row]:
    """The objects of one list, each with the line that it starts in."""
    decode, line, at = json.JSONDecoder().raw_decode, 1, 0

    def upcoming() -> str:
        """The next character that is no white space, to which it moves; empty at the end."""
        nonlocal line, at
        start = at
        while text[at : at + 1] in _SPACES:
            at += 1
        line += text.count("\n", start, at)
        return text[at : at + 1]

    def unexpected(expected: str) -> UsageError:
        found = repr(text[at]) if at < len(text) else "the end of the file"
        return UsageError(f"{path}:{line}: expected {expected}, found {found}", hint=hint)

    if upcoming() != "[":
        raise unexpected("a list of objects")
    at += 1
    token = upcoming()
    while token != "]":
        with _json_errors(path, line, hint):
            value, end = decode(text, at)
        yield _object(value, f"{path}:{line}", hint)
        line += text.count("\n", at, end)
        at = end
        token = upcoming()
        if token == ",":
            at += 1
            upcoming()
        elif token != "]":
            raise unexpected("',' or ']'")
    at += 1
    if upcoming():
        raise unexpected("nothing behind the list")


@contextmanager
def _json_errors(path: Path, line: int, hint: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or a huge number"
        raise UsageError(f"{path}:{line}: not JSON: {reason}", hint=hint) from None


def _object(value: Any, place: str, hint: str) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{place}: a row is a JSON object, not a {_NAMES.get(type(value), 'number')}", hint=hint)
    return Row(place, value)


_NAMES = {list: "list", str: "text", bool: "truth value", type(None): "null"}


def _open_csv(path: Path) -> RowFile:
    """A header, then a row for each record: separated by commas, quoted by `"`, of any length."""
    hint = 'a .csv file has a header line; fields that contain commas, quotes or line breaks are in "..."'
    csv.field_size_limit(_LONGEST_FIELD)
    records = csv.reader(StringIO(_text(path, newline=""), newline=""), strict=True)

    def numbered() -> Iterator[tuple[int, list[str]]]:
        """Records that are no empty lines, each with the line that it starts in."""
        line = 1
        try:
            for fields in records:
                if fields:
                    yield line, fields
                line = records.line_num + 1
        except csv.Error as error:
            raise UsageError(f"{path}:{line}: not CSV: {error}", hint=hint) from None

    def rows() -> Iterator[Row]:
        for line, fields in every:
            if len(fields) != len(columns):
                raise UsageError(f"{path}:{line}: {len(fields)} fields, the header has {len(columns)}", hint=hint)
            yield Row(f"{path}:{line}", dict(zip(columns, fields, strict=True)))

    header, *every = [*numbered()] or [(1, [])]
    columns = tuple(header[1])
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UsageError(f"{path}:{header[0]}: the header names {twice[0]!r} twice", hint=hint)
    return RowFile(path, columns, lambda _: rows())


def _open_parquet(path: Path) -> RowFile:
    """Columns of a table; only those that are asked for are read."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _parquet_errors(path):
        columns = tuple(pyarrow.parquet.read_schema(path).names)

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        names = [name for name in columns if name in wanted]
        with _parquet_errors(path):
            table = pyarrow.parquet.read_table(path, columns=names).to_pylist()
        for number, values in enumerate(table):
            yield Row(f"{path}: row {number}", values)

    return RowFile(path, columns, rows)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # damage leads to each of them
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: not a readable parquet file: {reason}", hint="write the file again") from None


def _text(path: Path, newline: str | None = None) -> str:
    """A file's text, without the mark that some editors put at its start."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from None


_OPENERS: dict[str, Callable[[Path], RowFile]] = {
    ".txt": _open_txt,
    ".jsonl": _open_jsonl,
    ".json": _open_json,
    ".csv": _open_csv,
    ".parquet": _open_parquet,
}
