"""What identifies a text: in manifests by name or hash, in cache keys by everything its tokens depend on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.data.calibration_folder import read_record
from qcli.data.datasets import SELF, is_folder, is_named, named_sha256
from qcli.utils.environment import versions_of
from qcli.utils.files import sha256

if TYPE_CHECKING:
    from qcli.models.source import ModelSource


def text_identity(data: str) -> str | None:
    """The name of a data set or the hash of a file; of a calibration folder, that of the text it was cut from.

    None if unknown: `self`, or a folder without `calibration.json`.

    Raises:
        UsageError: a folder's `calibration.json` is damaged.
        QcliError: a file cannot be read; see `os_problem`.
    """
    if is_folder(data):
        identity = read_record(Path(data)).get("text_identity")
        return identity if isinstance(identity, str) else None
    return data if is_named(data) else text_sha256(data)


def text_sha256(data: str) -> str | None:
    """SHA-256 of a local file; None for anything else."""
    return sha256(Path(data)) if Path(data).is_file() else None


def content_key(data: str, source: ModelSource, *, calibration: bool) -> dict[str, Any]:
    """Cache key of a text as a model tokenizes it, or for `self` samples it; plain data.

    Args:
        data: not a folder.
        calibration: which part of a data set.
    """
    writer = source.content() if data == SELF else None
    text = named_sha256(data, calibration=calibration) if is_named(data) else text_sha256(data)
    return {
        "data": data,
        "text": text,
        "tokenizer": source.tokenizer_content(),
        "writer": writer,
        "context": source.context_length,
        "packages": versions_of("tokenizers", "gguf", "pyarrow"),
    }
