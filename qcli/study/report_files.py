"""The files of a report, which replace only those of an earlier report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from qcli.utils import sealed
from qcli.utils.errors import StateError
from qcli.utils.files import sha256, write_bytes, writing

_RECORD = ".qcli-report.json"  # by file name, the hashes of what was written or about to be written


def write_in_place(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, and remove those of an earlier call that are not among them.

    Raises:
        StateError: a file that would be replaced or removed was not written by an earlier call, or was edited since.
        QcliError: a file cannot be written; see `os_problem`.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)
    before = _record(folder)
    new = {name: [hashlib.sha256(content).hexdigest()] for name, content in files.items()}
    for name in sorted(before.keys() | new.keys()):
        file = folder / name
        if file.exists() and sha256(file) not in (*before.get(name, ()), *new.get(name, ())):
            raise StateError(f"{file} was edited or is not of a report", hint="move it away, or it would be replaced")
    both = {name: [*new.get(name, ()), *before.get(name, ())] for name in new.keys() | before.keys()}
    sealed.write_json(folder / _RECORD, both)  # first, so that the call after a crash knows its files
    for name, content in files.items():
        write_bytes(folder / name, content)
    with writing(folder):
        for name in before.keys() - new.keys():
            (folder / name).unlink(missing_ok=True)
    sealed.write_json(folder / _RECORD, new)


def _record(folder: Path) -> dict[str, list[str]]:
    file = folder / _RECORD
    if not file.exists():
        return {}
    try:
        record: dict[str, list[str]] = sealed.load_json(file)
    except sealed.Damaged as problem:
        raise StateError(str(problem), hint=f"remove {folder}") from None
    return record
