"""The folder of a run in progress: finished parts, a journal, what the run is of, and the result being assembled.

It lives beside the result as `OUT.partial`. A part is in the journal only after its file is complete on disk, so a run
killed at any moment continues after its last whole part. The result is assembled in a folder inside and renamed to
`OUT` in one step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from qcli.utils import journal, shards
from qcli.utils.errors import StateError
from qcli.utils.files import disk_problem, publish, read_json, sha256, write_json
from qcli.utils.lock import FolderLock

if TYPE_CHECKING:
    from torch import Tensor

_IDENTITY, _JOURNAL, _RESULT = "run.json", "journal.jsonl", "result"
Resume = Literal["auto", "required", "never"]


class RunFolder:
    """`OUT.partial`, held by one process.

    Args:
        out: where the result will be.
        identity: what decides the result's bytes; a run continues only with the same.
        resume: `auto` continues if there is something, `required` only then, `never` starts over.

    Raises:
        StateError: `out` exists, another process writes it, there is nothing to resume although required, or what
            there is belongs to a run with another identity (the difference is named).
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], resume: Resume) -> None:
        self.out = out.absolute()
        self.path = partial(self.out)
        refuse_existing(self.out)
        busy = StateError(f"another qcli is writing {out}", hint="wait for it, or choose another --out")
        try:
            self._lock = FolderLock(self.path, busy)
        except OSError as error:
            raise disk_problem(self.path, error) from None
        try:
            self._entries = self._opened(identity, resume)
        except BaseException:
            self._lock.release()
            raise
        self._intact: dict[str, bool] = {}

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._lock.release()

    def done(self, part: str) -> Path | None:
        """The file of a finished part, or None. A file that does not match its journal entry does not count."""
        file = self.file(part)
        if part not in self._intact:
            entry = self._entries.get(part)
            self._intact[part] = entry is not None and file.exists() and sha256(file) == entry["sha256"]
        return file if self._intact[part] else None

    def report(self, part: str) -> Any:
        """What `commit` was given besides the tensors."""
        return self._entries[part]["report"]

    def commit(self, part: str, tensors: Mapping[str, Tensor], report: Any = None) -> None:
        """Write a part; from now on it is done."""
        shards.write_tensors(self.file(part), tensors)
        entry = {"part": part, "sha256": sha256(self.file(part)), "report": report}
        journal.append(self.path / _JOURNAL, entry)
        self._entries[part] = entry
        self._intact[part] = True

    def file(self, part: str) -> Path:
        """Where a part lies."""
        return part_file(self.path, part)

    def result(self) -> Path:
        """An empty folder to assemble the result in."""
        folder = self.path / _RESULT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def publish(self) -> None:
        """Give the assembled result its name, and remove everything else."""
        publish(self.path / _RESULT, self.out)
        self._lock.remove()

    def size(self) -> int:
        """Bytes of the finished parts."""
        return sum(self.file(part).stat().st_size for part in self._entries if self.done(part))

    def _opened(self, identity: Mapping[str, Any], resume: Resume) -> dict[str, dict[str, Any]]:
        """Journal entries by part; a folder that is not resumed is emptied."""
        refuse_existing(self.out)  # another process may have finished in between
        journal.cut_torn_line(self.path / _JOURNAL)
        entries = [json.loads(line) for line in journal.complete_lines(self.path / _JOURNAL)]
        if resume == "required" and not entries:
            self._lock.remove()
            raise StateError(f"there is no interrupted run of {self.out} to resume", hint="leave out --resume required")
        if entries and resume != "never":
            self._compare(identity)
            return {entry["part"]: entry for entry in entries}
        self._lock.clear()
        write_json(self.path / _IDENTITY, identity)
        return {}

    def _compare(self, identity: Mapping[str, Any]) -> None:
        described = differences(read_json(self.path / _IDENTITY), identity)
        if described:
            raise StateError(
                f"{self.path} holds an interrupted run with other settings: {described}",
                hint="repeat its settings to continue it, or start over with --resume never",
            )


def partial(out: Path) -> Path:
    """Where the run that makes `out` is kept."""
    return out.absolute().with_name(f"{out.name}.partial")


def refuse_existing(out: Path) -> None:
    """Raise StateError where there is something under the name of a result."""
    if out.exists():
        raise StateError(f"{out} exists", hint="choose another --out, or remove it")


def has_parts(out: Path) -> bool:
    """Whether an interrupted run of `out` has finished parts, which starting over would lose."""
    return (partial(out) / _JOURNAL).exists()


def part_file(folder: Path, part: str) -> Path:
    """Where a part lies in the folder of a run."""
    return folder / f"part-{part}.safetensors"


def differences(before: Any, now: Any) -> str:
    """What changed between two nested mappings of plain data, in words; empty when they are equal."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed[:4])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
