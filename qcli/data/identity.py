"""What identifies a text: in manifests by name or hash, in cache keys by everything its tokens depend on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.data.calibration_folder import CALIBRATION
from qcli.data.datasets import SELF, is_folder, is_named
from qcli.utils.files import parse_json, read_regular, sha256

if TYPE_CHECKING:
    from qcli.models.source import ModelSource


def text_identity(data: str) -> str | None:
    """The name of a data set or the hash of a file; of a calibration folder, that of the text it was cut from.

    None if unknown: `self`, or a folder whose `calibration.json` is missing or unreadable.
    """
    if is_folder(data):
        try:
            identity = parse_json(read_regular(Path(data) / CALIBRATION)).get("text_identity")
        except (OSError, ValueError, AttributeError):
            return None
        return identity if isinstance(identity, str) else None
    return data if is_named(data) else text_sha256(data)


def text_sha256(data: str) -> str | None:
    """SHA-256 of a local file; None for anything else."""
    return sha256(Path(data)) if Path(data).is_file() else None


def content_key(data: str, source: ModelSource) -> dict[str, Any]:
    """Cache key of a text as a model tokenizes it, or for `self` samples it; plain data."""
    return {
        "data": data,
        "text": text_sha256(data),
        "tokenizer": source.tokenizer_content(),
        "writer": source.content() if data == SELF else None,
        "context": source.context_length,
    }
