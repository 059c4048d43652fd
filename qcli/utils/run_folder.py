"""The folder of a run in progress, which makes it resumable and its result atomic.

`OUT.partial` beside the result holds the finished parts, a journal of them, the run's identity, and the result while it
is assembled. A part enters the journal after its file is complete on disk, so a run killed at any moment resumes after
its last complete part. Renaming the assembled result to `OUT` publishes it. A result that it replaces waits in
`OUT.partial` meanwhile, and goes back if the new one does not get its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from qcli.utils import journal, sealed, shards
from qcli.utils.errors import QcliError, StateError, UsageError, warn
from qcli.utils.files import is_empty_folder, publish, remove, sha256, writing
from qcli.utils.owned_folder import FolderKind, OwnedFolder, refuse_foreign

if TYPE_CHECKING:
    from torch import Tensor

_IDENTITY, _JOURNAL, _RESULT, TRIALS = "run.json", "journal.jsonl", "result", "trials"
_REPLACED = "replaced"  # the result that was at OUT, until the new one is there
_STATE = "state-*"  # shards of a training state, written by several processes
_PARTIAL = ".*.partial"  # a file that was being written when the process ended
_KIND = FolderKind("run", (_IDENTITY, _JOURNAL, _RESULT, TRIALS, _REPLACED, _STATE, _PARTIAL, "part-*.safetensors"))
_ENTRY = {"part", "sha256", "report"}  # fields of a journal entry
Resume = Literal["auto", "required", "never"]


@dataclass(frozen=True)
class Replacing:
    """What may become of a result that is at `OUT` already.

    Attributes:
        require_own: raises a QcliError for a folder that is anything else than a result as qcli wrote it.
        force: whether such a result is replaced; otherwise an error says that it could be. With `resume: auto` an
            interrupted run that cannot be continued starts over, with a warning.
        reads: models and texts that the command reads, which it must not replace.
    """

    require_own: Callable[[Path], None]
    force: bool = False
    reads: tuple[str, ...] = ()


class RunFolder:
    """`OUT.partial`, locked by this process.

    Args:
        out: path of the result.
        identity: everything that decides the result's bytes, as plain data; a run resumes only with an equal identity.
        resume: `auto` resumes an interrupted run if there is one, `required` fails without one, `never` starts over.
        replacing: which results at `out` may be replaced; None: none.

    Raises:
        StateError: `out` exists and may not be replaced, another process writes it, `OUT.partial` was not created by
            qcli, `required` found no interrupted run, or the interrupted run is damaged or has another identity (the
            message names the differences).
        QcliError: the folder cannot be created; see `os_problem`.
    """

    writes: ClassVar[bool] = True

    def __init__(
        self, out: Path, identity: Mapping[str, Any], resume: Resume, replacing: Replacing | None = None
    ) -> None:
        refuse_existing(out, replacing)
        self.out, self._replacing = out.absolute(), replacing
        self.path = partial(self.out)
        busy = StateError(f"another qcli is writing {out}", hint="wait for it, or choose another --out")
        self._folder = OwnedFolder(self.path, _KIND, busy)
        try:
            self._entries = self._opened(identity, resume)
        except BaseException:
            self._folder.release()
            raise
        self._intact: dict[str, bool] = {}
        self._published = False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self._folder.entries() == {_IDENTITY}:  # nothing was computed
            self._folder.remove()
        self._folder.release()

    def done(self, part: str) -> Path | None:
        """The file of a finished part; None if there is none or it does not match its journal entry."""
        file = self.file(part)
        if part not in self._intact:
            entry = self._entries.get(part)
            self._intact[part] = entry is not None and file.is_file() and sha256(file) == entry["sha256"]
            if entry is not None and not self._intact[part]:
                warn(f"{file} is damaged or missing: recomputing it")
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

    def finished(self) -> dict[str, Any]:
        """The reports of all finished parts, by part."""
        return {part: self.report(part) for part in self._entries if self.done(part) is not None}

    def file(self, part: str) -> Path:
        """Path of a part."""
        return part_file(self.path, part)

    def result(self) -> Path:
        """An empty folder to assemble the result in."""
        folder = self.path / _RESULT
        with writing(folder):
            if os.path.lexists(folder):
                remove(folder)
            folder.mkdir()
        return folder

    def publish(self) -> None:
        """Rename the assembled result to `out`, then remove the folder and a result that was replaced."""
        try:
            if os.path.lexists(self.out):
                refuse_existing(self.out, self._replacing)  # somebody may have put something there
                if not is_empty_folder(self.out):
                    with writing(self.out):
                        self.out.rename(self._replaced)
            publish(self.path / _RESULT, self.out)
            self._published = True
        except BaseException:
            self._restore()
            raise
        self.remove()

    def remove(self) -> None:
        """Remove the folder, and with it a result that was not published; a result that was to be replaced stays, back
        in its place, or in the folder if something else has taken that."""
        self._restore()
        if os.path.lexists(self._replaced) and not self._published:
            warn(f"{self.path} has what was in {self.out}: move {self.out} away, and run the command again")
            self._folder.release()
        else:
            self._folder.remove()

    @property
    def _replaced(self) -> Path:
        return self.path / _REPLACED

    def _restore(self) -> None:
        """Put a result that was to be replaced back, unless the new one is in its place."""
        if os.path.lexists(self._replaced) and (not os.path.lexists(self.out) or is_empty_folder(self.out)):
            publish(self._replaced, self.out)

    def size(self) -> int:
        """Bytes of the finished parts."""
        return sum(file.stat().st_size for part in self._entries if (file := self.done(part)) is not None)

    def _opened(self, identity: Mapping[str, Any], resume: Resume) -> dict[str, dict[str, Any]]:
        """Journal entries by part; a run that is not resumed starts with an empty folder."""
        self._restore()
        refuse_existing(self.out, self._replacing)  # another process may have finished in between
        with writing(self.path):
            remove(self._replaced)  # the new result is there, but its run was killed before this
        journal.cut_torn_line(self.path / _JOURNAL)
        try:
            entries = _resumed(self.out, lambda: identity, resume, self._replacing)
        except _NothingToResume:
            self._folder.remove()
            raise
        if not entries:
            self._folder.clear()
            sealed.write_json(self.path / _IDENTITY, identity)
        return entries


class FollowedRun:
    """The run folder as processes see it that do not write: another one, which has it open, commits the parts.

    Args:
        path: of the folder.
        finished: `RunFolder.finished`, when it was opened.
    """

    writes: ClassVar[bool] = False

    def __init__(self, path: Path, finished: Mapping[str, Any]) -> None:
        self.path, self._reports = path, dict(finished)

    def done(self, part: str) -> Path | None:
        """The file of a finished part; None if it is not finished. What was committed just now may not be there yet."""
        return self.file(part) if part in self._reports else None

    def report(self, part: str) -> Any:
        """The report that was committed with a part."""
        return self._reports[part]

    def commit(self, part: str, tensors: Mapping[str, Tensor], report: Any = None) -> None:
        """Note the report; the other process writes the tensors."""
        self._reports[part] = report

    def file(self, part: str) -> Path:
        """Path of a part."""
        return part_file(self.path, part)


RunParts: TypeAlias = RunFolder | FollowedRun
"""The parts of a run: every process may read and commit them, one writes."""


class _NothingToResume(StateError):
    """No run was interrupted."""


def require_startable(
    out: Path, identity: Callable[[], Mapping[str, Any]], resume: Resume, replacing: Replacing
) -> None:
    """Raise what `RunFolder` would, but write nothing; whether another process has it open is not checked.

    Args:
        identity: computes it; only called if there is an interrupted run.
    """
    refuse_existing(out, replacing)
    _resumed(out, identity, resume, replacing)


def _resumed(
    out: Path, identity: Callable[[], Mapping[str, Any]], resume: Resume, replacing: Replacing | None
) -> dict[str, dict[str, Any]]:
    """Journal entries by part of the interrupted run that is to be continued; empty: a run starts from nothing."""
    try:
        entries = {} if resume == "never" else _interrupted(partial(out), identity)
    except StateError as problem:
        if resume != "auto" or replacing is None or not replacing.force:
            raise
        warn(f"{problem.message}: starting over")
        entries = {}
    if resume == "required" and not entries:
        raise _NothingToResume(f"there is no interrupted run of {out} to resume", hint="leave out --resume required")
    return entries


def _interrupted(folder: Path, identity: Callable[[], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Journal entries by part of an interrupted run with this identity; empty if none is interrupted."""
    file = folder / _JOURNAL
    try:
        entries = journal.entries(file)
    except sealed.Damaged as problem:
        raise _damaged(str(problem)) from None
    if not all(entry.keys() == _ENTRY for entry in entries):
        raise _damaged(f"{file} is not the journal of a run: it is damaged")
    if entries:
        _compare(folder, identity())
    return {entry["part"]: entry for entry in entries}


def _compare(folder: Path, identity: Mapping[str, Any]) -> None:
    try:
        before = sealed.load_json(folder / _IDENTITY)
    except sealed.Damaged as problem:
        raise _damaged(str(problem)) from None
    described = differences(before, identity)
    if described:
        raise StateError(
            f"{folder} holds an interrupted run with other settings: {described}",
            hint="repeat its settings to continue it, or start over: --force",
        )


def _damaged(message: str) -> StateError:
    return StateError(message, hint="start over: --force, or remove it")


def partial(out: Path) -> Path:
    """Path of the folder of the run that writes `out`.

    Raises:
        UsageError: nothing can be written beside `out`.
    """
    try:
        return out.absolute().with_name(f"{out.absolute().name}.partial")
    except ValueError:  # it has no name
        raise UsageError(f"{out} cannot be the folder of a result", hint="choose another --out") from None


def refuse_existing(out: Path, replacing: Replacing | None = None) -> None:
    """Refuse, before any work, an output that exists or that nothing can be written to; an empty folder is none yet.

    Args:
        replacing: which results may be there; None: none.

    Raises:
        StateError: it exists, is a dangling symbolic link or a mount point, or `OUT.partial` was not created by qcli.
        UsageError: there can be no such folder.
        QcliError: it cannot be looked up, see `os_problem`; or as `Replacing.require_own`.
    """
    with writing(out):
        if out.is_symlink() and not out.exists():
            raise StateError(f"{out} is a dangling symbolic link", hint="choose another --out, or remove it")
        if out.exists() and not is_empty_folder(out):
            _refuse_result(out, replacing)
        if out.exists() and os.path.ismount(out):
            raise StateError(f"{out} is a mount point, which cannot be renamed", hint="choose a folder in it")
        parent = next(parent for parent in out.absolute().parents if parent.exists())
        if not parent.is_dir():
            raise UsageError(f"{out} cannot be written: {parent} is not a folder", hint="choose another --out")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{out} cannot be written: {parent} is not writable", hint="choose another --out")
    refuse_foreign(partial(out), _KIND)


def _refuse_result(out: Path, replacing: Replacing | None) -> None:
    """Refuse what is at `out`, unless it is to be replaced and may be."""
    if replacing is None:
        raise StateError(f"{out} exists", hint="choose another --out, or remove it")
    if not replacing.force:
        try:
            replacing.require_own(out)
        except QcliError:
            raise StateError(f"{out} exists", hint="choose another --out, or remove it") from None
        raise StateError(f"{out} exists", hint="choose another --out, or replace it: --force")
    if out.is_symlink():
        raise StateError(f"{out} is a symbolic link, which qcli does not follow", hint="choose another --out")
    refuse_read(out, replacing.reads)
    replacing.require_own(out)


def refuse_read(out: Path, reads: Iterable[str]) -> None:
    """Refuse to replace `out` if one of the models and texts that the command reads is, or is in, it.

    Raises:
        StateError: one is.
    """
    for text in reads:
        if (path := Path(text).expanduser()).exists() and path.resolve().is_relative_to(out.resolve()):
            raise StateError(f"{out} has what this command reads: {text}", hint="choose another --out")


def remove_remainder(out: Path) -> None:
    """Remove what is left of the run that has published `out`: it could not be cleaned up, or was killed meanwhile."""
    folder = partial(out)
    if _KIND.marks(folder):
        OwnedFolder(folder, _KIND, StateError(f"another qcli is writing {out}", hint="wait for it")).remove()


def has_parts(out: Path) -> bool:
    """Whether an interrupted run of `out` has finished parts."""
    return (partial(out) / _JOURNAL).exists()


def refuse_interrupted(out: Path) -> None:
    """Refuse, before any work, to write over an interrupted run of another command.

    Raises:
        StateError: it has finished parts.
    """
    if has_parts(out):
        raise StateError(
            f"{partial(out)} holds an interrupted run", hint="finish it, remove it, or choose another --out"
        )


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
