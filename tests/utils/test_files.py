"""Files are written completely or not at all, and hashed by content."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qcli.utils import files, journal
from qcli.utils.errors import ResourceError, UsageError


def test_json_is_indented_utf8(tmp_path: Path) -> None:
    value = {"name": "größe", "list": [1, None]}
    files.write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_bytes().startswith('{\n  "name": "größe",'.encode())
    assert (tmp_path / "x.json").read_bytes().endswith(b"}\n")
    assert files.read_json(tmp_path / "x.json") == value


def test_a_failed_write_keeps_the_previous_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    files.write_bytes(file, b"previous")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"file cannot be written: No space left on device"):
        files.write_bytes(file, b"next")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"previous")]


def test_content_hashes_cover_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a").write_bytes(b"1")
    first = files.content_hash(folder)
    assert files.content_hash(folder / "inner" / "a") == files.sha256(folder / "inner" / "a")
    (folder / "inner" / "a").rename(folder / "inner" / "b")
    renamed = files.content_hash(folder)
    (folder / "inner" / "b").write_bytes(b"2")
    assert len({first, renamed, files.content_hash(folder)}) == 3
    assert files.content_hash(tmp_path / "none") is None


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert files.files_below(tmp_path) == [tmp_path / "a" / "b" / "file"]
    scandir = os.scandir

    def closed(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    for walk in (files.files_below, files.content_hash):
        with pytest.raises(UsageError, match="b cannot be read: Permission denied"):
            walk(tmp_path)


def test_required_space_is_checked_before_the_folder_exists(tmp_path: Path) -> None:
    files.require_space(tmp_path / "none" / "yet", 1)
    with pytest.raises(ResourceError, match="needs 1000000000.00 GB"):
        files.require_space(tmp_path / "none" / "yet", 10**18)


def test_folders_are_published_where_none_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "partial").mkdir()
    files.write_bytes(tmp_path / "partial" / "file", b"content")

    def open_no_folder(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.open", open_no_folder)
    with pytest.raises(PermissionError):
        files.sync_folder(tmp_path)
    monkeypatch.setattr("sys.platform", "win32")
    files.write_bytes(tmp_path / "partial" / "other", b"content")
    files.sync_file(tmp_path / "partial" / "other")
    files.publish(tmp_path / "partial", tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == dict.fromkeys(
        ("file", "other"), b"content"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
@pytest.mark.parametrize(
    "use",
    [
        journal.entries,
        journal.cut_torn_line,
        lambda file: journal.append(file, {}),
        lambda file: files.copy_file(file, file.with_name("copy")),
        lambda file: files.write_bytes(file, b"content"),
        files.sha256,
        files.read_regular,
    ],
)
def test_fifos_are_refused_rather_than_waited_for(use: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(UsageError, match="file is not a regular file"):
        use(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
