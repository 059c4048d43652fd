"""Text from local files and the hub: documents joined by an empty line, chats one behind the other. No torch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from qcli.data.hub_rows import open_hub_rows
from qcli.data.names import HINT
from qcli.data.row_texts import Render, choose
from qcli.data.rows import is_known, open_rows
from qcli.data.source import TextSource, is_hub
from qcli.utils.errors import UsageError


def require_file(data: str) -> None:
    """Raise UsageError unless `data` is a file of a known kind; nothing is read."""
    path = Path(data)
    if path.is_dir():
        raise UsageError(f"{data} is a folder", hint="a folder of `qcli calibrate` is named alone: data: FOLDER")
    if not path.is_file():
        raise UsageError(f"{data}: no such file", hint=HINT)
    if not is_known(path):
        raise UsageError(f"{data}: unknown kind of file {path.suffix!r}", hint=HINT)


def read_file(source: TextSource, render: Render, *, calibration: bool) -> str:
    """The text of a file, or of a data set on the hub.

    Args:
        render: makes text of chats.
        calibration: which part of a data set to read where the source names none.

    Raises:
        UsageError: it cannot be read, it is unclear which column is the text, or a row has none.
    """
    file = open_hub_rows(source, calibration=calibration) if is_hub(source.path) else open_rows(Path(source.path))
    if not file.columns:
        return ""
    choice = choose(file, source, render)
    return choice.separator.join(choice.text(row) for row in file.read(choice.columns))


def read_first_row(source: TextSource, render: Render) -> None:
    """Raise what `read_file` would of the columns and the first row of a local file."""
    if Path(source.path).suffix.lower() == ".txt":  # a single row
        return
    if not (file := open_rows(Path(source.path))).columns:
        return
    choice = choose(file, source, render)
    for row in islice(file.read(choice.columns), 1):
        choice.text(row)
