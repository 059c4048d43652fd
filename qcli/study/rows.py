"""The folder of a study and its rows.

DIR/study.json       version of the layout
DIR/results.jsonl    one row per finished or failed run, with a checksum, appended and synced
DIR/runs/ADDRESS     a run in progress, or one that ran out of a resource; can be resumed
DIR/cache            shared by all runs: calibration tokens and results of baselines
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcli.utils import journal, sealed
from qcli.utils.errors import StateError
from qcli.utils.files import read_json, reading, write_bytes, write_json, writing
from qcli.utils.owned_folder import FolderKind, OwnedFolder, mark

VERSION = 2
_UNSEALED = 1  # a version whose rows have no checksums
RUNS, CACHE = "runs", "cache"
ROWS = "results.jsonl"
_STUDY = "study.json"
_KIND = FolderKind("study")
_FIELDS = {"address", "status", "point", "recipe"}  # of every row
Row = dict[str, Any]


@contextmanager
def study_folder(out: Path) -> Iterator[None]:
    """Create or open a study's folder, for this process alone while the context is open.

    Raises:
        StateError: it is something else, a study of another version, or in use.
        QcliError: it cannot be created; see `os_problem`.
    """
    if out.is_symlink() and not out.exists():
        raise StateError(f"{out} is a dangling symbolic link", hint="choose another --out, or remove it")
    out = out.resolve()  # a link here is the user's choice
    with writing(out):
        begun = (out / _STUDY).exists()
        if out.exists() and not begun and not _KIND.marks(out) and any(out.iterdir()):
            raise StateError(f"{out} exists and is not a study", hint="choose another --out")
    if begun:
        _version(out)
        mark(out, _KIND)  # version 1 had no marker
    with OwnedFolder(out, _KIND, StateError(f"another qcli is using {out}", hint="wait for it")):
        if not (out / _STUDY).exists():
            write_json(out / _STUDY, {"version": VERSION})
        journal.cut_torn_line(out / ROWS)
        if _version(out) == _UNSEALED:
            _seal(out)
        yield


def read_rows(out: Path) -> list[Row]:
    """The newest row of each recipe, in order of completion.

    A recipe has several rows if files that it names have changed in between.

    Raises:
        StateError: `out` is not a study, one of another version, or a row is damaged.
    """
    return list({row["recipe"]: row for row in _rows(out, _version(out))}.values())


def append(out: Path, row: Row) -> None:
    """Append a row and sync it, so that a run reported as done stays done."""
    journal.append(out / ROWS, row)


def _rows(out: Path, version: int) -> list[Row]:
    try:
        rows = journal.entries(out / ROWS, unsealed=version == _UNSEALED)
    except sealed.Damaged as problem:
        raise StateError(str(problem), hint="remove the line; its run will be repeated") from None
    for number, row in enumerate(rows, start=1):
        if not row.keys() >= _FIELDS:
            raise StateError(f"{out / ROWS}:{number}: not a row of a study", hint="remove the line")
    return rows


def _seal(out: Path) -> None:
    """Give the rows of a study of an earlier version their checksums."""
    rows = _rows(out, _UNSEALED)
    write_bytes(out / ROWS, b"".join(map(journal.line, rows)))
    write_json(out / _STUDY, {"version": VERSION})


def _version(out: Path) -> int:
    try:
        with reading(out / _STUDY):
            study = read_json(out / _STUDY) if (out / _STUDY).is_file() else None
    except ValueError:
        study = {}
    if study is None:
        raise StateError(f"{out} is not a study", hint="create one: qcli study STUDY.yaml --out DIR")
    version = study.get("version") if isinstance(study, Mapping) else None
    if not isinstance(version, int):
        raise StateError(f"{out / _STUDY} is damaged", hint="choose another --out")
    if version not in (_UNSEALED, VERSION):
        raise StateError(
            f"{out} is a study of version {version}, this qcli reads version {VERSION}", hint="choose another --out"
        )
    return version
