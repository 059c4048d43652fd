"""What a text may be: a data set of `sets/`, a file, a data set on the hub, a calibration folder, `self`, or `auto`."""

from __future__ import annotations

import hashlib
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TypeGuard

from qcli.data.default_text import AUTO
from qcli.data.image_rows import IMAGES, has_images
from qcli.data.named_set import NamedSet, PackagedText
from qcli.data.names import HINT, NO_HUB, SELF, SETS, is_named, set_names
from qcli.data.row_texts import Render, without_template
from qcli.data.source import Data, TextSource, is_hub, label, parts
from qcli.data.text_files import read_file, read_first_row, require_file
from qcli.utils import registry
from qcli.utils.errors import UnsupportedError, UsageError


def is_folder(data: Data) -> TypeGuard[str]:
    """Whether `data` is a folder, which must be one that `qcli calibrate` wrote."""
    return isinstance(data, str) and not is_named(data) and data not in (AUTO, SELF) and Path(data).is_dir()


def is_sampled(data: Data) -> bool:
    """Whether any part of `data` is sampled from the model."""
    return any(part.path == SELF for part in parts(data))


def require_text(data: Data) -> None:
    """Raise UsageError unless `data` is a folder, or each part of it names a data set, `self`, `auto`, or a file of
    text; nothing is read."""
    for part in parts(data) if not is_folder(data) else ():
        if part.path in (AUTO, SELF) or is_named(part.path):
            if part.path == AUTO and not isinstance(data, str):
                raise UsageError("auto is no part of a mixture, and has no columns", hint="name a data set or a file")
            if (part.column or part.template) is not None:
                raise UsageError(f"{part.path} has no columns to choose from", hint="leave column and template out")
        elif not is_hub(part.path):
            _require_file(part.path)


def require_first_row(data: Data, render: Render) -> None:
    """Raise what `read_text` would, if the first row of a file does not become text; no further row is read.

    Args:
        data: passes `require_text`.
        render: makes text of chats.
    """
    for part in parts(data) if not is_folder(data) else ():
        if part.path not in (AUTO, SELF) and not is_named(part.path) and not is_hub(part.path):
            read_first_row(part, render)


def read_text(data: str | TextSource, render: Render = without_template, *, calibration: bool) -> str:
    """The text of a data set or a file, its rows or documents joined.

    Args:
        data: no folder, and neither `self` nor `auto`.
        render: makes text of chats.
        calibration: whether to read a data set's part for calibration or the one for evaluation.

    Raises:
        UsageError: no such data, a row without text, or no text at all.
        UnsupportedError: it has images, too.
    """
    require_text(data)
    (part,) = parts(data)
    if is_named(part.path):
        text = _read_named(part.path, calibration=calibration)
    else:
        refuse_images(part.path)
        text = read_file(part, render, calibration=calibration)
    if not text.strip():
        raise UsageError(f"{part.path}: contains no text", hint=HINT)
    return text


def refuse_images(data: Data) -> None:
    """Raise UnsupportedError if `data` is a file of rows with images, of which the text alone would be read."""
    if has_images(data):
        raise UnsupportedError(
            f"{label(data)} has rows with images, which only calibration for quantize reads",
            hint=f"use text, or a copy of the file without the column {' or '.join(IMAGES)}",
        )


@cache
def named_sha256(name: str, *, calibration: bool) -> str:
    """SHA-256 of the text of a named set, of which hub and disk may have another version tomorrow.

    Raises:
        UsageError: it cannot be loaded.
    """
    return hashlib.sha256(_read_named(name, calibration=calibration).encode()).hexdigest()


def _require_file(data: str) -> None:
    """The same as `require_file`; a bare word is reported as the name of an unknown data set."""
    if Path(data).exists() or Path(data).suffix or Path(data).name != data:
        require_file(data)
        return
    known = [*set_names(), SELF]
    near = get_close_matches(data, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown data set {data!r}", hint=f"{guess}known: {', '.join(known)}; or a file")


def _read_named(name: str, *, calibration: bool) -> str:
    found: NamedSet | PackagedText = registry.load(SETS, name)
    try:
        return found.read(calibration=calibration)
    except UsageError as error:
        raise UsageError(f"data set {name!r} {error.message}", hint=NO_HUB) from error
