"""Journals survive a crash in the middle of a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcli.utils import journal
from qcli.utils.errors import ResourceError


def test_entries_are_appended_as_ascii_lines(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    assert journal.complete_lines(file) == []
    entries = [{"part": "ä\n\u2028"}, [1, None]]
    for entry in entries:
        journal.append(file, entry)
    assert file.read_bytes() == b'{"part": "\\u00e4\\n\\u2028"}\n[1, null]\n'
    assert [json.loads(line) for line in journal.complete_lines(file)] == entries


@pytest.mark.parametrize("torn", [b'{"b', b'{"b": 2}', b'{"b": "\xc3'])
def test_a_torn_last_line_does_not_count(torn: bytes, tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    file.write_bytes(b'{"a": 1}\n' + torn)
    assert journal.complete_lines(file) == ['{"a": 1}']
    assert file.read_bytes().endswith(torn), "reading does not repair"
    journal.cut_torn_line(file)
    journal.append(file, {"c": 3})
    assert journal.complete_lines(file) == ['{"a": 1}', '{"c": 3}']


def test_a_missing_journal_is_not_created(tmp_path: Path) -> None:
    journal.cut_torn_line(tmp_path / "journal.jsonl")
    assert not list(tmp_path.iterdir())


def test_failed_writes_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"none/journal\.jsonl cannot be written"):
        journal.append(tmp_path / "none" / "journal.jsonl", {})
