"""Folders that qcli creates for itself: marked as such, and locked by one process.

Nothing is removed from a folder without the marker, and from one with it only entries with qcli's own names. Symbolic
links are removed, never followed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from qcli.utils.errors import QcliError, StateError, warn
from qcli.utils.files import remove, warned, writing

_LOCK = "lock"
_MARKED = b"Created by qcli, which removes files from this folder.\n"


@dataclass(frozen=True)
class FolderKind:
    """The purpose of a folder.

    Attributes:
        name: suffix of the marker's name, `.qcli-NAME`.
        entries: patterns of the entries that qcli creates and may remove, lock and marker excluded.
    """

    name: str
    entries: tuple[str, ...] = ()

    def marker(self, folder: Path) -> Path:
        """The file that marks a folder as one of this kind."""
        return folder / f".qcli-{self.name}"

    def marks(self, folder: Path) -> bool:
        """Whether a folder has the marker, complete or cut short by a crash."""
        marker = self.marker(folder)
        if marker.is_symlink() or not marker.is_file():
            return False
        return marker.stat().st_size <= len(_MARKED) and _MARKED.startswith(marker.read_bytes())

    def owns(self, name: str) -> bool:
        """Whether an entry of this name is qcli's."""
        return any(fnmatchcase(name, pattern) for pattern in self.entries)


def refuse_foreign(folder: Path, kind: FolderKind) -> None:
    """Refuse an existing folder that qcli did not create, unless it is empty.

    Raises:
        StateError: it is a symbolic link, or contains files and has no marker.
        QcliError: it is not a folder, or cannot be read; see `os_problem`.
    """
    with writing(folder):
        if folder.is_symlink():
            raise StateError(f"{folder} is a symbolic link, which qcli does not follow", hint="choose another --out")
        if folder.exists() and not kind.marks(folder) and any(folder.iterdir()):
            raise StateError(
                f"{folder} contains files that qcli did not write",
                hint="move it away, or choose another --out",
            )


def mark(folder: Path, kind: FolderKind) -> None:
    """Put the marker into a folder, which is created if it does not exist.

    Raises:
        QcliError: it cannot be written; see `os_problem`.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not kind.marks(folder):
            with kind.marker(folder).open("wb", buffering=0) as marker:  # nothing of it is written twice
                marker.write(_MARKED)


class OwnedFolder:
    """A marked folder, locked for this process until `release`; it is created if it does not exist.

    The operating system releases the lock of a killed process. The lock file itself stays and has no meaning.

    Args:
        folder: not a symbolic link.
        kind: the purpose of the folder.
        busy: raised at once if another process holds the lock.

    Raises:
        StateError: qcli did not create the folder; see `refuse_foreign`.
        QcliError: `busy`; or folder or lock file cannot be created.
    """

    def __init__(self, folder: Path, kind: FolderKind, busy: QcliError) -> None:
        self.folder, self.kind = folder, kind
        refuse_foreign(folder, kind)
        mark(folder, kind)
        self._lock = FileLock(folder / _LOCK, thread_local=False)
        with writing(folder):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise busy from None
            if not kind.marks(folder):  # another process has just removed it
                self.release()
                raise busy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        with contextlib.suppress(OSError):  # the end of the process releases it too
            self._lock.release()

    def entries(self) -> set[str]:
        """The names of all entries but lock and marker; none if the folder is gone."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return {entry.name for entry in found if not self._is_own(entry)}

    def clear(self) -> None:
        """Remove all entries of the folder's kind; lock and marker stay.

        Raises:
            QcliError: something cannot be removed.
        """
        with writing(self.folder):
            self._clear()

    def remove(self) -> None:
        """Remove the folder and release the lock; warn of what cannot be removed or was not written by qcli."""
        with warned(f"{self.folder} is no longer needed but cannot be removed"):
            self._clear()
            foreign = sorted(entry.name for entry in self.folder.iterdir() if not self._is_own(entry))
            if foreign:
                warn(f"{self.folder} is no longer needed, but contains {foreign[0]}, which qcli did not write")
            else:
                if sys.platform == "win32":  # cannot remove open files
                    self.release()
                remove(self.folder / _LOCK)
                remove(self.kind.marker(self.folder))
                os.rmdir(self.folder)
        self.release()

    def _clear(self) -> None:
        for entry in list(self.folder.iterdir()):
            if self.kind.owns(entry.name):
                remove(self._set_aside(entry))

    def _set_aside(self, entry: Path) -> Path:
        """Rename a folder: what is left of it when its removal is interrupted must not pass for the whole."""
        aside = entry.with_name(f".{entry.name.strip('.')}.partial")
        if entry.is_dir() and not entry.is_symlink() and self.kind.owns(aside.name) and not aside.exists():
            return entry.rename(aside)
        return entry

    def _is_own(self, entry: Path) -> bool:
        return entry.name == _LOCK or entry == self.kind.marker(self.folder)
