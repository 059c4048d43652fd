"""Text from local files: a .txt as it is, rows of other files as documents joined by an empty line. No torch."""

from __future__ import annotations

from pathlib import Path

from qcli.data.rows import Row, RowFile, is_known, kinds, open_rows
from qcli.utils.errors import UsageError

FILES = f"{', '.join(kinds()[:-1])} or {kinds()[-1]}"
HINT = f"give a local {FILES} file, or `self` for text sampled from the model"

_COLUMN = "text"


def require_file(data: str) -> None:
    """Raise UsageError unless `data` is a file of a known kind; nothing is read."""
    path = Path(data)
    if not path.is_file():
        raise UsageError(f"{data}: no such file", hint=HINT)
    if not is_known(path):
        raise UsageError(f"{data}: unknown kind of file {path.suffix!r}", hint=HINT)


def read_file(data: str) -> str:
    """The text of a file.

    Raises:
        UsageError: no such file, of an unknown kind, not readable, or a row without text.
    """
    require_file(data)
    file = open_rows(Path(data))
    if file.columns and _COLUMN not in file.columns:
        raise _no_column(file)
    return "\n\n".join(_text(row, _COLUMN) for row in file.read((_COLUMN,)))


def _no_column(file: RowFile) -> UsageError:
    return UsageError(f"{file.path}: no column '{_COLUMN}'", hint=f"its columns: {', '.join(file.columns)}")


def _text(row: Row, column: str) -> str:
    """The text of one row.

    Raises:
        UsageError: it has none, or half a character.
    """
    if column not in row.values:
        raise UsageError(f"{row.place}: no {column!r}", hint="every row must have it, or be removed")
    if not isinstance(text := row.values[column], str):
        raise UsageError(f"{row.place}: {column!r} is no text", hint="remove the row")
    if not text.strip():
        raise UsageError(f"{row.place}: {column!r} is empty", hint="remove the row")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{row.place}: {column!r} contains half a character (a lone surrogate)", hint="remove the row"
        ) from None
    return text
