"""The folder of a study and its rows.

DIR/study.json       version of the layout
DIR/results.jsonl    one row per finished or failed run, appended and synced
DIR/runs/ADDRESS     a run in progress, which can be resumed
DIR/cache            shared by all runs: calibration tokens and results of baselines
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
_STUDY, _ROWS = "study.json", "results.jsonl"
Row = dict[str, Any]


@contextmanager
def study_folder(out: Path) -> Iterator[None]:
    """Create or open a study's folder, for this process alone while the context is open.

    Raises:
        StateError: it is something else, a study of another version, or in use.
    """
    if out.exists() and not (out / _STUDY).exists() and any(out.iterdir()):
        raise StateError(f"{out} exists and is not a study", hint="choose another --out")
    with FolderLock(out, StateError(f"another qcli is using {out}", hint="wait for it")):
        if not (out / _STUDY).exists():
            write_json(out / _STUDY, {"version": VERSION})
        _check_version(out)
        journal.cut_torn_line(out / _ROWS)
        yield


def read_rows(out: Path) -> list[Row]:
    """The newest row of each recipe, in order of completion.

    A recipe has several rows if files that it names have changed in between.

    Raises:
        StateError: `out` is not a study, one of another version, or a row is damaged.
    """
    _check_version(out)
    lines = journal.complete_lines(out / _ROWS)
    rows = [_row(line, f"{out / _ROWS}:{number}") for number, line in enumerate(lines, start=1)]
    return list({row["recipe"]: row for row in rows}.values())


def append(out: Path, row: Row) -> None:
    """Append a row and sync it, so that a run reported as done stays done."""
    journal.append(out / _ROWS, row)


def _row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
        if {"address", "status", "point", "recipe"} <= row.keys():
            return dict(row)
    except (ValueError, AttributeError):
        pass
    raise StateError(f"{place}: not a row of a study", hint="remove the line; its run will be repeated")


def _check_version(out: Path) -> None:
    try:
        version = read_json(out / _STUDY)["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise StateError(f"{out} is not a study", hint="create one: qcli study STUDY.yaml --out DIR") from None
    except (ValueError, KeyError, TypeError):
        raise StateError(f"{out / _STUDY} is damaged", hint="choose another --out") from None
    if version != VERSION:
        raise StateError(
            f"{out} is a study of version {version}, this qcli reads version {VERSION}", hint="choose another --out"
        )
