"""Rows of text and images in local files. No torch; images are not decoded here.

A row has a text or messages, and in the column `image` or `images` what it shows: none, one or several images.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qcli.data.rows import Row, RowFile, is_known, open_rows
from qcli.data.source import Data, text_paths
from qcli.utils.errors import UsageError
from qcli.utils.files import content_hash, reading

IMAGES = ("images", "image")
_TEXTS = ("messages", "text")
_HINT = (
    'an image is the path of a file, relative to the file that names it, base64 data, or {"bytes": ..., "path": ...}; '
    "a row without one has null"
)
_IMAGE_PART = {"type": "image"}
_LONGEST_PATH = 1024  # a longer text is data


@dataclass(frozen=True)
class ImageRow:
    """A row.

    Attributes:
        place: where it is, for messages.
        text: as it is written; None: there are messages.
        messages: of a chat, with a part `{"type": "image"}` for every image.
        images: encoded, as files hold them.
    """

    place: str
    text: str | None
    messages: tuple[dict[str, Any], ...]
    images: tuple[bytes, ...]


def has_images(data: Data) -> bool:
    """Whether a file, or any of several, has rows with images.

    Raises:
        UsageError: the file is damaged.
    """
    files = [path for path in map(Path, text_paths(data)) if path.is_file() and is_known(path)]
    return any(_has_images(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files)


def data_content(data: str) -> str | None:
    """`content_hash` of a file or folder; of rows that name files of images, with the content of these.

    Raises:
        UsageError: an image cannot be read.
    """
    content, path = content_hash(Path(data)), Path(data)
    if not has_images(data):
        return content
    files = {name: None for row in open_rows(path).read(IMAGES) for name in _named_files(_values(row))}
    if not files:
        return content
    hashes = [hashlib.sha256(_read(path, name, str(path))).hexdigest() for name in files]
    return hashlib.sha256(json.dumps([content, hashes]).encode()).hexdigest()


def draw_rows(data: str, samples: int, seed: int) -> list[ImageRow]:
    """Rows of a file, drawn at random without putting back.

    Raises:
        UsageError: the file is damaged or has too few rows; a row that was drawn has no text, or an image that cannot
            be read.
    """
    file = open_rows(Path(data))
    count = sum(1 for _ in file.read(IMAGES))
    if count < samples:
        raise UsageError(
            f"{data} has {count} rows, and {samples} samples are asked for", hint=f"use --samples {count} or less"
        )
    drawn = random.Random(seed).sample(range(count), samples)
    wanted = set(drawn)
    rows = {
        number: _image_row(file.path, row)
        for number, row in enumerate(file.read((*IMAGES, *_TEXTS)))
        if number in wanted
    }
    return [rows[number] for number in drawn]


@lru_cache(maxsize=8)
def _has_images(path: Path, modified: int, size: int) -> bool:
    file = open_rows(path)
    if file.columns and not set(file.columns).isdisjoint(IMAGES):
        return True
    return any(name in row.values for row in _named_by_rows(file) for name in IMAGES)


def _named_by_rows(file: RowFile) -> Iterator[Row]:
    """Rows of a file in which each has its own columns."""
    return file.read(()) if file.path.suffix.lower() in (".json", ".jsonl") else iter(())


def _image_row(path: Path, row: Row) -> ImageRow:
    images = tuple(_image(path, value, row.place) for value in _values(row))
    messages, text = row.values.get("messages"), row.values.get("text")
    if messages is not None:
        return ImageRow(row.place, None, _messages(messages, len(images), row.place), images)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{row.place}: no text beside the images", hint="a row has 'text', or 'messages' of a chat")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{row.place}: 'text' contains half a character (a lone surrogate)", hint="remove the row"
        ) from None
    return ImageRow(row.place, text, (), images)


def _values(row: Row) -> list[Any]:
    """What a row has for images."""
    found = [row.values[name] for name in IMAGES if row.values.get(name) is not None]
    if len(found) > 1:
        raise UsageError(f"{row.place}: both 'image' and 'images'", hint="name all of a row's images in one of them")
    value = found[0] if found else []
    return value if isinstance(value, list) else [value]


def _named_files(values: list[Any]) -> Iterator[str]:
    """The files among them."""
    for value in values:
        if isinstance(value, dict) and value.get("bytes") is None:
            value = value.get("path")
        if isinstance(value, str) and _names_file(value):
            yield value


def _image(path: Path, value: Any, place: str) -> bytes:
    """An image's bytes, as its file has them."""
    if isinstance(value, dict):
        content, name = value.get("bytes"), value.get("path")
        if isinstance(content, str):
            return _decoded(content, place)
        value = name if content is None else content
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise UsageError(f"{place}: no image that qcli can read", hint=_HINT)
    return _read(path, value, place) if _names_file(value) else _decoded(value, place)


def _names_file(value: str) -> bool:
    """Whether a text is a path, and not base64 data, by itself or in a data URL."""
    return not value.startswith("data:") and len(value) <= _LONGEST_PATH


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except binascii.Error as error:
        raise UsageError(f"{place}: an image is no base64 ({error})", hint=_HINT) from None


def _read(path: Path, name: str, place: str) -> bytes:
    if "://" in name:
        raise UsageError(f"{place}: {name}: images are not downloaded", hint=_HINT)
    file = path.parent / name
    if not file.is_file():
        raise UsageError(f"{place}: no image {name}", hint=_HINT)
    with reading(file):
        return file.read_bytes()


def _messages(messages: Any, images: int, place: str) -> tuple[dict[str, Any], ...]:
    """Messages in parts, with one for every image: those that name none have all in front of the user's first text."""
    hint = 'messages are [{"role": "user", "content": "..." or [{"type": "image"}, {"type": "text", "text": "..."}]}]'
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{place}: 'messages' is no list of messages", hint=hint)
    found: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"{place}: a message has no role", hint=hint)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(map(_is_part, parts)):
            raise UsageError(f"{place}: a message is neither text nor parts of text and images", hint=hint)
        found.append({"role": message["role"], "content": [_part(part) for part in parts]})
    shown = sum(part["type"] == "image" for message in found for part in message["content"])
    if shown == 0 and images:
        users = [message for message in found if message["role"] == "user"]
        if not users:
            raise UsageError(f"{place}: no message of a user that the images could belong to", hint=hint)
        users[0]["content"] = [_IMAGE_PART] * images + users[0]["content"]
    elif shown != images:
        raise UsageError(f"{place}: {images} images, but the messages show {shown}", hint=hint)
    return tuple(found)


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message without the fields of other kinds of parts."""
    return _IMAGE_PART if part["type"] == "image" else {"type": "text", "text": part["text"]}


def _is_part(part: Any) -> bool:
    """Whether it is a part of a message; rows of a table have all fields in every part, perhaps null."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))
