"""The folder of a run in progress: finished blocks, a journal, and what the run is of.

It lives beside the result as `OUT.partial` and becomes it at the end. A block is in the journal only after its
file is complete on disk, so a run killed at any moment continues after its last whole block.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from qcli import shards
from qcli.errors import StateError

if TYPE_CHECKING:
    from torch import Tensor

_IDENTITY, _JOURNAL, _LOCK = "run.json", "journal.jsonl", "lock"


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

    def __init__(self, out: Path, identity: Mapping[str, Any], resume: Literal["auto", "required", "never"]) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.partial")
        if out.exists():
            raise StateError(f"{out} exists", hint="choose another --out, or remove it")
        if resume == "required" and not (self.path / _IDENTITY).exists():
            raise StateError(f"there is no interrupted run of {out} to resume", hint="leave out --resume required")
        fresh = not (self.path / _IDENTITY).exists() or resume == "never"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise shards.disk_problem(self.path, error) from None
        self._lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateError(f"another qcli is writing {out}", hint="wait for it, or choose another --out") from None
        if fresh:
            self._clear()
            shards.write_json(self.path / _IDENTITY, identity)
        else:
            self._compare(identity)
        self._entries = {entry["part"]: entry for entry in self._read_journal()}

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._lock.close()

    def done(self, part: str) -> Path | None:
        """The file of a finished part, or None. A file that does not match its journal entry does not count."""
        entry, file = self._entries.get(part), self.file(part)
        if entry is None or not file.exists() or shards.sha256(file) != entry["sha256"]:
            return None
        return file

    def report(self, part: str) -> Any:
        """What `commit` was given besides the tensors."""
        return self._entries[part]["report"]

    def commit(self, part: str, tensors: Mapping[str, Tensor], report: Any = None) -> None:
        """Write a part; from now on it is done."""
        shards.write_tensors(self.file(part), tensors)
        entry = {"part": part, "sha256": shards.sha256(self.file(part)), "report": report}
        try:
            with (self.path / _JOURNAL).open("a") as journal:
                journal.write(json.dumps(entry) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        except OSError as error:
            raise shards.disk_problem(self.path / _JOURNAL, error) from None
        self._entries[part] = entry

    def file(self, part: str) -> Path:
        """Where a part lies."""
        return self.path / f"part-{part}.safetensors"

    def publish(self) -> None:
        """Remove the parts and the journal, and give the folder its final name."""
        for file in self.own_files():
            file.unlink(missing_ok=True)
        shards.publish(self.path, self.out)

    def own_files(self) -> list[Path]:
        """What is in the folder only while the run goes on."""
        return [*self.path.glob("part-*"), *(self.path / name for name in (_JOURNAL, _IDENTITY, _LOCK))]

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def _compare(self, identity: Mapping[str, Any]) -> None:
        before = _flat(json.loads((self.path / _IDENTITY).read_text()))
        now = _flat(json.loads(json.dumps(identity)))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            described = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed[:4])
            raise StateError(
                f"{self.path} holds an interrupted run with other settings: {described}",
                hint="repeat its settings to continue it, or start over with --resume never",
            )

    def _read_journal(self) -> list[dict[str, Any]]:
        """Whole lines; the last one may have been cut short."""
        try:
            lines = (self.path / _JOURNAL).read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        whole = [line for line in lines if line.endswith("\n")]
        if whole != lines:
            (self.path / _JOURNAL).write_text("".join(whole))
        return [json.loads(line) for line in whole]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
