"""Rows of text and images."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from qcli.data.image_rows import data_content, draw_rows, has_images
from qcli.utils.errors import UsageError

PIXELS = b"\x89PNG and so on"
ENCODED = base64.b64encode(PIXELS).decode()


def write_rows(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "a.png").write_bytes(PIXELS)
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.mark.parametrize(
    "image",
    [
        "a.png",
        {"bytes": None, "path": "a.png"},
        {"bytes": ENCODED, "path": "gone.png"},
        f"data:image/png;base64,{ENCODED}",
        base64.b64encode(PIXELS * 100).decode(),
        ["a.png"],
    ],
)
def test_images_are_files_or_data(image: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path, {"image": image, "text": "a"})
    assert has_images(data)
    (row,) = draw_rows(data, 1, 0)
    assert row.images in ((PIXELS,), (PIXELS * 100,))
    assert (row.text, row.messages) == ("a", ())


def test_tables_as_data_sets_write_them(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": PIXELS, "path": "gone.png"}
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "a"}]
    rows = [{"images": [image], "messages": [{"role": "user", "content": parts}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert has_images(str(tmp_path / "rows.parquet"))
    (row,) = draw_rows(str(tmp_path / "rows.parquet"), 1, 0)
    assert row.images == (PIXELS,)
    assert row.messages == ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},)


def test_rows_are_drawn_by_seed_without_putting_back(tmp_path: Path) -> None:
    data = write_rows(tmp_path, *({"image": None, "text": str(number)} for number in range(20)))
    drawn = [row.text for row in draw_rows(data, 20, 3)]
    assert sorted(map(str, drawn), key=int) == [str(number) for number in range(20)]
    assert drawn == [row.text for row in draw_rows(data, 20, 3)] != [row.text for row in draw_rows(data, 20, 4)]


def test_text_alone_has_no_images(tmp_path: Path) -> None:
    assert not has_images(write_rows(tmp_path, {"text": "a"}))
    assert has_images(write_rows(tmp_path, {"text": "a"}, {"text": "b", "image": "a.png"}))
    assert not has_images("wikitext2")


def test_content_is_that_of_named_images_too(tmp_path: Path) -> None:
    data = write_rows(tmp_path, {"image": "a.png", "text": "a"})
    before = data_content(data)
    assert before == data_content(data) != data_content(write_rows(tmp_path, {"image": "a.png", "text": "b"}))
    data = write_rows(tmp_path, {"image": "a.png", "text": "a"})
    (tmp_path / "a.png").write_bytes(b"another")
    assert data_content(data) != before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "b.png", "text": "a"}, "rows.jsonl:1: no image b.png"),
        ({"image": "https://b.png", "text": "a"}, "images are not downloaded"),
        ({"image": "data:image/png;base64,???", "text": "a"}, "an image is no base64"),
        ({"image": 3, "text": "a"}, "no image that qcli can read"),
        ({"image": "a.png"}, "no text beside the images"),
        ({"image": "a.png", "images": ["a.png"], "text": "a"}, "both 'image' and 'images'"),
        ({"image": "a.png", "messages": "a"}, "'messages' is no list of messages"),
        ({"image": "a.png", "messages": [{"content": "a"}]}, "a message has no role"),
        ({"image": "a.png", "messages": [{"role": "user", "content": 3}]}, "neither text nor parts"),
        ({"image": "a.png", "messages": [{"role": "system", "content": "a"}]}, "no message of a user"),
        (
            {"images": ["a.png", "a.png"], "messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "2 images, but the messages show 1",
        ),
    ],
)
def test_rows_that_cannot_be_read(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        draw_rows(write_rows(tmp_path, row), 1, 0)
    assert message in caught.value.message


def test_too_few_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has 1 rows, and 2 samples are asked for"):
        draw_rows(write_rows(tmp_path, {"image": "a.png", "text": "a"}), 2, 0)
