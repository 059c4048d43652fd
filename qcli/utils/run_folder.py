"""The folder of a run in progress, which makes it resumable and its result atomic.

`OUT.partial` beside the result holds the finished parts, a journal of them, the run's identity, and the result while it
is assembled. A part enters the journal after its file is complete on disk, so a run killed at any moment resumes after
its last complete part. Renaming the assembled result to `OUT` publishes it.
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
    """`OUT.partial`, locked by this process.

    Args:
        out: path of the result.
        identity: everything that decides the result's bytes, as plain data; a run resumes only with an equal identity.
        resume: `auto` resumes an interrupted run if there is one, `required` fails without one, `never` starts over.

    Raises:
        StateError: `out` exists, another process writes it, `required` found no interrupted run, or the interrupted run
            has another identity (the message names the differences).
        ResourceError: the folder cannot be created.
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
        """The file of a finished part; None if there is none or it does not match its journal entry."""
        file = self.file(part)
        if part not in self._intact:
            entry = self._entries.get(part)
            self._intact[part] = entry is not None and file.exists() and sha256(file) == entry["sha256"]
        return file if self._intact[part] else None

    def report(self, part: str) -> Any:
        """The report that was committed with a part."""
        return self._entries[part]["report"]

    def commit(self, part: str, tensors: Mapping[str, Tensor], report: Any = None) -> None:
        """Write a finished part and its report, plain data; on return both are on disk."""
        shards.write_tensors(self.file(part), tensors)
        entry = {"part": part, "sha256": sha256(self.file(part)), "report": report}
        journal.append(self.path / _JOURNAL, entry)
        self._entries[part] = entry
        self._intact[part] = True

    def file(self, part: str) -> Path:
        """Path of a part."""
        return part_file(self.path, part)

    def result(self) -> Path:
        """An empty folder to assemble the result in."""
        folder = self.path / _RESULT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def publish(self) -> None:
        """Rename the assembled result to `out` and remove the folder."""
        publish(self.path / _RESULT, self.out)
        self._lock.remove()

    def size(self) -> int:
        """Bytes of the finished parts."""
        return sum(self.file(part).stat().st_size for part in self._entries if self.done(part))

    def _opened(self, identity: Mapping[str, Any], resume: Resume) -> dict[str, dict[str, Any]]:
        """Journal entries by part; a run that is not resumed starts with an empty folder."""
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
    """Path of the folder of the run that writes `out`."""
    return out.absolute().with_name(f"{out.name}.partial")


def refuse_existing(out: Path) -> None:
    """Raise StateError if the output exists."""
    if out.exists():
        raise StateError(f"{out} exists", hint="choose another --out, or remove it")


def has_parts(out: Path) -> bool:
    """Whether an interrupted run of `out` has finished parts."""
    return (partial(out) / _JOURNAL).exists()


def part_file(folder: Path, part: str) -> Path:
    """Path of a part in the folder of a run."""
    return folder / f"part-{part}.safetensors"


def differences(before: Any, now: Any) -> str:
    """Describe up to four differences between nested mappings of plain data; empty if they are equal."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed[:4])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings; keys are joined with dots."""
    if not isinstance(value, dict):
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
