"""What a text may be named by: a data set of `sets/`, a file, a calibration folder, `self`, or `auto`. No torch."""

from __future__ import annotations

import hashlib
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from qcli.data.default_text import AUTO
from qcli.data.image_rows import IMAGES, has_images
from qcli.data.named_set import NamedSet, PackagedText
from qcli.data.text_files import HINT, read_file, require_file
from qcli.utils import registry
from qcli.utils.errors import UnsupportedError, UsageError

SELF = "self"  # sampled from the model
_SETS = "qcli.data.sets"


def set_names() -> list[str]:
    """Names of the data sets in `sets/`; imports none of them."""
    return registry.names(_SETS)


def is_named(data: str) -> bool:
    """Whether `data` is the name of a data set in `sets/`."""
    return data in set_names()


def is_folder(data: str) -> bool:
    """Whether `data` is a folder, which must be one that `qcli calibrate` wrote."""
    return not is_named(data) and data not in (AUTO, SELF) and Path(data).is_dir()


def require_text(data: str) -> None:
    """Raise UsageError unless `data` names a data set, `self`, `auto`, a folder or a file of text; nothing is read."""
    if not is_named(data) and data not in (AUTO, SELF) and not is_folder(data):
        _require_file(data)


def read_text(data: str, *, calibration: bool) -> str:
    """The text of a data set or a file, its rows or documents joined.

    Args:
        calibration: whether to read a data set's part for calibration or the one for evaluation.

    Raises:
        UsageError: no such data, or it contains no text.
        UnsupportedError: it has images, too.
    """
    if is_named(data):
        text = _read_named(data, calibration=calibration)
    else:
        _require_file(data)
        refuse_images(data)
        text = read_file(data)
    if not text.strip():
        raise UsageError(f"{data}: contains no text", hint=HINT)
    return text


def refuse_images(data: str) -> None:
    """Raise UnsupportedError if `data` is a file of rows with images, of which the text alone would be read."""
    if has_images(data):
        raise UnsupportedError(
            f"{data} has rows with images, which only calibration for quantize reads",
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
    if Path(data).is_file() or Path(data).suffix or Path(data).name != data:
        require_file(data)
        return
    known = [*set_names(), SELF]
    near = get_close_matches(data, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown data set {data!r}", hint=f"{guess}known: {', '.join(known)}; or a file")


def _read_named(name: str, *, calibration: bool) -> str:
    found: NamedSet | PackagedText = registry.load(_SETS, name)
    try:
        return found.read(calibration=calibration)
    except UsageError as error:
        raise UsageError(f"data set {name!r} {error.message}", hint=f"`builtin` needs no network; or {HINT}") from error
