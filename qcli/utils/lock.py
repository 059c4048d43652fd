"""An advisory lock on a folder, through the file `lock` in it."""

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
    """Locks `folder` for this process until `release`; the folder is created if it does not exist.

    The operating system releases the lock of a killed process. The file itself stays and has no meaning.

    Args:
        folder: what to lock.
        busy: raised at once if another process holds the lock.

    Raises:
        QcliError: `busy`.
        OSError: the folder or the lock file cannot be created.
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
        """Release the lock; a second call does nothing."""
        self._lock.release()

    def clear(self) -> None:
        """Remove everything in the folder except the lock file."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def remove(self) -> None:
        """Remove the folder and release the lock."""
        self.clear()
        if sys.platform == "win32":  # cannot remove open files
            self.release()
        shutil.rmtree(self.folder)
        self.release()
