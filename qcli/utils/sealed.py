"""Files that carry a hash of their content and of their own name: damaged or exchanged, they are not read.

Plain data is JSON, `{"sha256": ..., "content": ...}`; tensors are safetensors with the hash in the metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.utils.errors import UsageError
from qcli.utils.files import read_json, reading, write_chunks
from qcli.utils.files import write_json as write_plain_json
from qcli.utils.safetensors import read_header, read_metadata
from qcli.utils.safetensors import read_tensors as read_extents
from qcli.utils.shards import header_text, serialized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_SHA256, _CONTENT = "sha256", "content"


class Damaged(ValueError):
    """A file is not what was written."""


def digest(value: Any) -> str:
    """SHA-256 of plain data, the same before and after it has been JSON, however that is laid out."""
    plain = json.loads(json.dumps(value))  # keys are texts, and sorted as such
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_json(file: Path, value: Any, *, name: str | None = None) -> None:
    """Write plain data atomically.

    Args:
        name: that the file will be read by; None: its own.

    Raises:
        QcliError: it cannot be written; see `os_problem`.
    """
    write_plain_json(file, {_SHA256: digest([name or file.name, value]), _CONTENT: value})


def load_json(file: Path) -> Any:
    """Plain data that `write_json` wrote.

    Raises:
        Damaged: it is missing, or not what was written.
        QcliError: it cannot be read; see `os_problem`.
    """
    if not file.is_file():
        raise Damaged(f"{file} is missing")
    try:
        with reading(file):
            sealed = read_json(file)
    except ValueError:
        raise Damaged(f"{file} is damaged: it is not JSON") from None
    if not isinstance(sealed, dict) or sealed.keys() != {_SHA256, _CONTENT}:
        raise Damaged(f"{file} is damaged or of an earlier version: it has no checksum")
    if sealed[_SHA256] != digest([file.name, sealed[_CONTENT]]):
        raise Damaged(f"{file} is damaged: its checksum does not match")
    return sealed[_CONTENT]


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, name: str | None = None) -> None:
    """Write tensors atomically.

    Args:
        name: that the file will be read by; None: its own.

    Raises:
        QcliError: they cannot be written; see `os_problem`.
    """
    entries, contents = serialized(tensors)
    sha256 = _digest_of(name or file.name, header_text(entries), contents)
    write_chunks(file, [header_text(entries, sha256=sha256), *contents])


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors that `write_tensors` wrote, each in memory of its own.

    Raises:
        Damaged: they are not what was written.
        QcliError: they cannot be read; see `os_problem`.
    """
    try:
        metadata = read_metadata(file)
        tensors = read_extents(read_header(file).items())
    except UsageError as error:
        raise Damaged(error.message) from None
    entries, contents = serialized(tensors)
    if metadata != {"format": "pt", _SHA256: _digest_of(file.name, header_text(entries), contents)}:
        raise Damaged(f"{file} is damaged: its checksum does not match")
    return tensors


def _digest_of(name: str, header: bytes, contents: Iterable[memoryview]) -> str:
    sha256 = hashlib.sha256(name.encode() + header)
    for content in contents:
        sha256.update(content)
    return sha256.hexdigest()
