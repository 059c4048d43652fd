"""Files of rows: every kind gives the same rows, and says in which line something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from qcli.data.row_texts import without_template
from qcli.data.rows import kinds, open_rows
from qcli.data.source import TextSource
from qcli.data.text_files import read_file
from qcli.utils.errors import UsageError

ROWS = [{"text": 'one, "two"\n\u2028three', "id": "1"}, {"text": "four \u00e9", "id": "2"}]
CSV = 'text,id\r\n"one, ""two""\n\u2028three",1\r\n\r\nfour \u00e9,2\r\n'


def text_of(path: Path) -> str:
    return read_file(TextSource(path=str(path)), without_template, calibration=True)


def written(folder: Path, name: str) -> Path:
    """ROWS in a file of the kind that its name says."""
    path, lines = folder / name, [json.dumps(row, ensure_ascii=False) for row in ROWS]
    match path.suffix.lower():
        case ".jsonl":
            path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
        case ".csv":
            path.write_bytes(CSV.encode())
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.Csv", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    file = open_rows(written(tmp_path, name))
    assert file.columns == ("text", "id")
    for _ in range(2):
        assert [row.values for row in file.read(("text", "id"))] == ROWS
    assert text_of(file.path) == "\n\n".join(row["text"] for row in ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_mark_at_the_start_of_a_file_is_no_text(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.values for row in open_rows(path).read(("text",))] == ROWS
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfabc")
    assert text_of(tmp_path / "a.TXT") == "abc"


def test_json_may_have_an_object_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl").rename(tmp_path / "a.json")
    assert [row.values for row in open_rows(path).read(())] == ROWS


def test_places_are_the_lines_where_rows_start(tmp_path: Path) -> None:
    files = [open_rows(written(tmp_path, name)) for name in ("b.csv", "b.json")]
    places = {file.path.name: [row.place for row in file.read(())] for file in files}
    assert places == {
        "b.csv": [f"{tmp_path}/b.csv:2", f"{tmp_path}/b.csv:5"],
        "b.json": [f"{tmp_path}/b.json:2", f"{tmp_path}/b.json:6"],
    }
    (tmp_path / "p").mkdir()
    parquet = written(tmp_path, "p/a.parquet")
    assert [row.place for row in open_rows(parquet).read(("id",))] == [f"{parquet}: row 0", f"{parquet}: row 1"]
    assert [row.values for row in open_rows(parquet).read(("id", "none"))] == [{"id": "1"}, {"id": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"},\n 3]', ":2: a row is a JSON object, not a number"),
        ("a.json", '[{"text": "a"}\n\n{"text": "b"}]', ":3: expected ',' or ']', found '{'"),
        ("a.json", '[{"text": "a"},\n', ":2: not JSON: Expecting value"),
        ("a.json", '[{"text": "a"}\n', ":2: expected ',' or ']', found the end of the file"),
        ("a.json", '[{"text": "a"},]', ":1: not JSON: Expecting value"),
        ("a.json", '[{"text": "a"}]\n]', ":2: expected nothing behind the list, found ']'"),
        ("a.json", '"text"', ":1: expected a list of objects, found '\"'"),
        ("a.json", '{"rows": [\n{"text": "a"}]}', ":1: not JSON: Expecting value"),
        ("a.json", "[" * 100_000, ":1: not JSON: nested too deeply, or a huge number"),
        ("a.json", '[{"text": "a"}, {"text": " "}]', ":1: 'text' is empty"),
        ("a.jsonl", "null", ":1: a row is a JSON object, not a null"),
        ("a.csv", "text,id\na,1\nb\n", ":3: 1 fields, the header has 2"),
        ("a.csv", 'text,id\na,1\n\n"b"c,2\n', ":4: not CSV: ',' expected after '\"'"),
        ("a.csv", 'text\n"a\n', ":2: not CSV: unexpected end of data"),
        ("a.csv", "text,id,text\na,1,b\n", ":1: the header names 'text' twice"),
        ("a.csv", "text,id\n,1\n", ":2: 'text' is empty"),
        ("a.csv", "body,id\na,1\n", ": it is unclear which column is the text; its columns: body, id"),
        ("a.json", '[{"text": "a"}, {"body": "a"}]', ":1: no 'text'"),
    ],
)
def test_what_is_wrong_has_its_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        text_of(tmp_path / name)
    assert caught.value.message == f"{tmp_path / name}{message}"
    assert caught.value.hint


def test_a_long_field_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert text_of(tmp_path / "a.csv") == "x" * 200_000


@pytest.mark.parametrize("kind", kinds())
def test_files_of_every_kind_may_be_empty(kind: str, tmp_path: Path) -> None:
    if kind == ".parquet":
        pyarrow.parquet.write_table(
            pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet"
        )
    else:
        (tmp_path / f"a{kind}").write_text("text\n" if kind == ".csv" else "[ ]" if kind == ".json" else " \n")
    assert text_of(tmp_path / f"a{kind}") == ""
