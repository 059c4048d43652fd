"""One process holds a folder until it releases it or dies, and nothing of the user's in it is removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qcli.utils.errors import QcliWarning, StateError, UsageError
from qcli.utils.owned_folder import FolderKind, OwnedFolder

HOLD = """
import sys, time
from pathlib import Path
from qcli.utils.errors import StateError
from qcli.utils.owned_folder import FolderKind, OwnedFolder
folder = OwnedFolder(Path(sys.argv[1]), FolderKind("test"), StateError("busy"))
print("locked", flush=True)
time.sleep(600)
"""
BUSY = StateError("busy")
KIND = FolderKind("test", ("part-*", "result"))


def opened(folder: Path) -> OwnedFolder:
    return OwnedFolder(folder, KIND, BUSY)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    with opened(folder), pytest.raises(StateError, match="busy"):
        opened(folder)
    assert names(folder) == {"lock", ".qcli-test"}
    opened(folder).release()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(StateError, match="busy"):
        opened(tmp_path)
    holder.kill()
    holder.communicate(timeout=60)
    opened(tmp_path).release()


def test_only_what_qcli_put_there_is_removed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    owned = opened(folder)
    (folder / "result" / "inner").mkdir(parents=True)
    (folder / "result" / "inner" / "link").symlink_to(elsewhere)
    (folder / "part-0").touch()
    (folder / "part-link").symlink_to(elsewhere)
    (folder / "notes").touch()
    owned.clear()
    assert names(folder) == {"lock", ".qcli-test", "notes"}
    with pytest.raises(StateError, match="busy"):
        opened(folder)
    (folder / "part-0").touch()
    with pytest.warns(QcliWarning, match="contains notes, which qcli did not write"):
        owned.remove()
    assert names(folder) == {"lock", ".qcli-test", "notes"}
    (folder / "notes").unlink()
    opened(folder).remove()
    assert not folder.exists() and (elsewhere / "precious").exists()
    opened(folder).release()


def test_a_folder_of_the_users_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "lock").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(StateError, match="full contains files that qcli did not write"):
        opened(tmp_path / "full")
    with pytest.raises(StateError, match="link is a symbolic link"):
        opened(tmp_path / "link")
    assert names(tmp_path / "full") == {"lock"} and not names(tmp_path / "empty")
    opened(tmp_path / "empty").release()


def test_markers_are_files_with_our_words(tmp_path: Path) -> None:
    words = "Created by qcli, which removes files from this folder.\n"
    for number, content in enumerate(("", words[:9])):  # a crash may cut it short
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / ".qcli-test").write_text(content)
        (folder / "part-0").touch()
        opened(folder).release()
    for content in ("mine", words + "more"):
        (tmp_path / "0" / ".qcli-test").write_text(content)
        with pytest.raises(StateError, match="contains files that qcli did not write"):
            opened(tmp_path / "0")
    (tmp_path / "0" / ".qcli-test").unlink()
    (tmp_path / "0" / ".qcli-test").symlink_to(tmp_path / "1" / ".qcli-test")
    with pytest.raises(StateError, match="contains files that qcli did not write"):
        opened(tmp_path / "0")


def test_a_folder_that_cannot_be_created_names_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(UsageError, match=f"{folder} cannot be written: "):
            opened(folder)


def test_what_an_interrupted_removal_leaves_does_not_pass_for_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kind = tmp_path / "runs", FolderKind("test", ("result", ".*.partial"))
    owned = OwnedFolder(folder, kind, BUSY)
    (folder / "result").mkdir()
    (folder / "result" / "manifest").touch()

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("qcli.utils.files.shutil.rmtree", interrupted)
        owned.remove()
    assert not (folder / "result").exists()
    owned.release()
    OwnedFolder(folder, kind, BUSY).remove()
    assert not folder.exists()
