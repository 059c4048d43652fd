"""Append-only JSON Lines files, a checksum in each line.

A process killed while it appends leaves a torn last line, which does not count; any other damage does not go unnoticed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcli.utils.files import parse_json, reading, writing
from qcli.utils.sealed import Damaged, digest

_CHECKSUM = "checksum"


def append(file: Path, entry: Mapping[str, Any]) -> None:
    """Append one entry and flush it to disk.

    Raises:
        QcliError: it cannot be written; see `os_problem`.
    """
    with writing(file), file.open("ab", buffering=0) as stream:  # a buffer would write again when it is closed
        complete = stream.tell()
        try:
            rest = memoryview(line(entry))
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # a torn line does not count
                stream.truncate(complete)
            raise


def line(entry: Mapping[str, Any]) -> bytes:
    """An entry as it stands in the file."""
    return json.dumps({**entry, _CHECKSUM: digest(entry)}).encode() + b"\n"


def entries(file: Path, *, unsealed: bool = False) -> list[dict[str, Any]]:
    """What was appended, in order; nothing if there is no file.

    Args:
        unsealed: whether lines without a checksum, which earlier versions wrote, are read too.

    Raises:
        Damaged: a line is not what was written; the message names it.
        QcliError: the file cannot be read; see `os_problem`.
    """
    with reading(file):
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return []
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [_entry(line, f"{file}:{number}", unsealed) for number, line in enumerate(lines, start=1)]


def cut_torn_line(file: Path) -> None:
    """Remove a torn last line: `append` would write behind it.

    Raises:
        QcliError: the file cannot be read or written; see `os_problem`.
    """
    with writing(file):
        if file.exists():
            content = file.read_bytes()
            complete = content.rfind(b"\n") + 1
            if complete < len(content):
                os.truncate(file, complete)


def _entry(line: bytes, place: str, unsealed: bool) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError:
        raise Damaged(f"{place}: damaged: not JSON") from None
    if not isinstance(entry, dict):
        raise Damaged(f"{place}: damaged: not an entry")
    if unsealed and _CHECKSUM not in entry:
        return entry
    if entry.pop(_CHECKSUM, None) != digest(entry):
        raise Damaged(f"{place}: damaged: its checksum does not match")
    return entry
