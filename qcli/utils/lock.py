"""A folder for one process at a time: an advisory lock on the file `lock` in it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from qcli.utils.errors import QcliError

_LOCK = "lock"


class FolderLock:
    """Holds `folder`, which is made if there is none, until `release` or the end of the process.

    The system releases the lock of a killed process; the file stays and means nothing by itself.

    Args:
        folder: what to lock.
        busy: raised if another process holds it; nobody waits.

    Raises:
        QcliError: `busy`.
        OSError: the folder or the lock file cannot be made.
    """

    def __init__(self, folder: Path, busy: QcliError) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / _LOCK, thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise busy from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Let others have the folder; a second call does nothing."""
        self._lock.release()

    def clear(self) -> None:
        """Remove everything in the folder but the lock."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def remove(self) -> None:
        """Remove the folder and release the lock."""
        self.clear()
        if sys.platform == "win32":  # removes no open file
            self.release()
        shutil.rmtree(self.folder)
        self.release()
