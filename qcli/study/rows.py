"""The folder of a study and its rows.

DIR/study.json       version
DIR/results.jsonl    a row for each run that has ended, well or not, appended and synced
DIR/runs/ADDRESS     a run in progress; resumes
DIR/cache            what runs share: calibration tokens and what baselines give
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcli.utils import journal
from qcli.utils.errors import StateError
from qcli.utils.files import read_json, write_json
from qcli.utils.lock import FolderLock

VERSION = 1
RUNS, CACHE = "runs", "cache"
_STORY, _ROWS = "study.json", "results.jsonl"
Row = dict[str, Any]


@contextmanager
def opened(out: Path) -> Iterator[None]:
    """The folder, made if there is none, for this process alone.

    Raises:
        StateError: it is something else, a study of another version, or in use.
    """
    if out.exists() and not (out / _STORY).exists() and any(out.iterdir()):
        raise StateError(f"{out} exists and is no study", hint="choose another --out")
    with FolderLock(out, StateError(f"another qcli is at work in {out}", hint="wait for it")):
        if not (out / _STORY).exists():
            write_json(out / _STORY, {"version": VERSION})
        _check_version(out)
        journal.cut_torn_line(out / _ROWS)
        yield


def read_rows(out: Path) -> list[Row]:
    """The newest row of each recipe, in the order in which they ended: files that it names may have changed since.

    Raises:
        StateError: `out` is no study, one of another version, or a row is damaged.
    """
    _check_version(out)
    lines = journal.complete_lines(out / _ROWS)
    rows = [_row(line, f"{out / _ROWS}:{number}") for number, line in enumerate(lines, start=1)]
    return list({row["recipe"]: row for row in rows}.values())


def append(out: Path, row: Row) -> None:
    """Synced: what is told as done stays done."""
    journal.append(out / _ROWS, row)


def _row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
        if {"address", "status", "point", "recipe"} <= row.keys():
            return dict(row)
    except (ValueError, AttributeError):
        pass
    raise StateError(f"{place}: not a row of a study", hint="remove the line: its run is made again")


def _check_version(out: Path) -> None:
    try:
        version = read_json(out / _STORY)["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise StateError(f"{out} is no study", hint="`qcli study STUDY.yaml --out DIR` makes one") from None
    except (ValueError, KeyError, TypeError):
        raise StateError(f"{out / _STORY} is damaged", hint="choose another --out") from None
    if version != VERSION:
        raise StateError(
            f"{out} is a study of version {version}, this qcli knows {VERSION}", hint="choose another --out"
        )
