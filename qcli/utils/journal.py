"""Append-only JSON Lines files. A process killed while it appends leaves a torn last line, which does not count."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qcli.utils.files import disk_problem


def append(file: Path, entry: Any) -> None:
    """Append one entry and flush it to disk.

    Raises:
        ResourceError: the disk is full.
    """
    try:
        with file.open("ab") as stream:
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_problem(file, error) from None


def complete_lines(file: Path) -> list[str]:
    """The lines that were written to their end; none if there is no file."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    return content[: content.rfind(b"\n") + 1].decode().splitlines()


def cut_torn_line(file: Path) -> None:
    """Remove a torn last line: `append` would write behind it."""
    if file.exists():
        content = file.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(file, complete)
