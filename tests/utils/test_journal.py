"""Journals survive a crash in the middle of a line, and no other damage goes unnoticed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from qcli.utils import journal
from qcli.utils.errors import ResourceError, UsageError
from qcli.utils.sealed import Damaged

ENTRIES: list[dict[str, Any]] = [{"part": "ä\n\u2028", "report": {"2": 1.5}}, {"x": [1, None], "sha256": "0"}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "journal.jsonl"
    assert journal.entries(file) == []
    for entry in ENTRIES:
        journal.append(file, entry)
    return file


def test_entries_are_appended_as_ascii_lines(file: Path) -> None:
    assert file.read_bytes().startswith(b'{"part": "\\u00e4\\n\\u2028", "report": {"2": 1.5}, "checksum": "')
    assert file.read_bytes().count(b"\n") == 2
    assert journal.entries(file) == ENTRIES


def test_keys_that_json_makes_texts_do_not_matter(tmp_path: Path) -> None:
    journal.append(tmp_path / "j", {"by bits": {10: 0.5, 2: 0.25}})
    assert journal.entries(tmp_path / "j") == [{"by bits": {"10": 0.5, "2": 0.25}}]


@pytest.mark.parametrize("torn", [b'{"b', b'{"b": 2}', b'{"b": "\xc3'])
def test_a_torn_last_line_does_not_count(torn: bytes, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content + torn)
    assert journal.entries(file) == ENTRIES
    assert file.read_bytes().endswith(torn), "reading does not repair"
    journal.cut_torn_line(file)
    journal.append(file, {"c": 3})
    assert journal.entries(file) == [*ENTRIES, {"c": 3}]


def test_every_flipped_bit_is_noticed(file: Path) -> None:
    """In the last line's end it makes the line a torn one."""
    content = file.read_bytes()
    for place in range(len(content)):
        for bit in (1, 16):
            damaged = bytearray(content)
            damaged[place] ^= bit
            file.write_bytes(damaged)
            if place == len(content) - 1:
                assert journal.entries(file) == ENTRIES[:1]
                continue
            with pytest.raises(Damaged, match=r"journal\.jsonl:[12]: damaged"):
                journal.entries(file)


def test_lines_without_checksum_are_read_where_they_may_be(tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text('{"a": 1}\n')
    journal.append(file, {"b": 2})
    assert journal.entries(file, unsealed=True) == [{"a": 1}, {"b": 2}]
    with pytest.raises(Damaged, match=r"old\.jsonl:1: damaged: its checksum"):
        journal.entries(file)
    file.write_text("[1]\n")
    with pytest.raises(Damaged, match="not an entry"):
        journal.entries(file, unsealed=True)


def test_a_missing_journal_is_not_created(tmp_path: Path) -> None:
    journal.cut_torn_line(tmp_path / "journal.jsonl")
    assert not list(tmp_path.iterdir())


def test_failed_writes_name_the_file_and_leave_no_entry(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"none/journal\.jsonl cannot be written: No such file"):
        journal.append(file.parent / "none" / "journal.jsonl", {})

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(ResourceError, match=r"journal\.jsonl cannot be written: Input/output error"):
        journal.append(file, {"not": "on disk"})
    assert journal.entries(file) == ENTRIES
