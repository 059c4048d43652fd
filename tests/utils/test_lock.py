"""One process holds a folder's lock until it releases it or dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qcli.utils.errors import StateError
from qcli.utils.lock import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from qcli.utils.errors import StateError
from qcli.utils.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), StateError("busy"))
print("locked", flush=True)
time.sleep(600)
"""
BUSY = StateError("busy")


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    with FolderLock(folder, BUSY), pytest.raises(StateError, match="busy"):
        FolderLock(folder, BUSY)
    assert [file.name for file in folder.iterdir()] == ["lock"]
    FolderLock(folder, BUSY).release()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(StateError, match="busy"):
        FolderLock(tmp_path, BUSY)
    holder.kill()
    holder.communicate(timeout=60)
    FolderLock(tmp_path, BUSY).release()


def test_clearing_keeps_the_lock_and_removing_releases_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    lock = FolderLock(folder, BUSY)
    (folder / "inner").mkdir()
    (folder / "inner" / "file").touch()
    (folder / "file").touch()
    lock.clear()
    assert [file.name for file in folder.iterdir()] == ["lock"]
    with pytest.raises(StateError, match="busy"):
        FolderLock(folder, BUSY)
    (folder / "file").touch()
    lock.remove()
    assert not folder.exists()
    FolderLock(folder, BUSY).release()


def test_a_folder_that_cannot_be_created_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        FolderLock(tmp_path / "file", BUSY)
