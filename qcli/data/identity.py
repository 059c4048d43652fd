"""What identifies a text: in manifests by name or hash, in cache keys by everything its tokens depend on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.data.calibration_folder import read_record
from qcli.data.chats import chat_template
from qcli.data.datasets import is_folder, is_sampled, named_sha256
from qcli.data.default_text import named
from qcli.data.image_rows import data_content
from qcli.data.names import is_named
from qcli.data.source import Data, TextSource, is_hub, parts, text_paths
from qcli.utils.environment import versions_of
from qcli.utils.files import sha256

if TYPE_CHECKING:
    from qcli.models.source import ModelSource

JOINED = " + "  # between the identities of several texts


def text_identity(data: Data) -> str | None:
    """The name of a data set or the hash of a file; of a calibration folder, that of the text it was cut from; of
    several texts, all of theirs.

    None if unknown: `self`, or a folder without `calibration.json`.

    Raises:
        UsageError: a folder's `calibration.json` is damaged.
        QcliError: a file cannot be read; see `os_problem`.
    """
    if is_folder(data):
        identity = read_record(Path(data)).get("text_identity")
        return identity if isinstance(identity, str) else None
    identities = [_identity(part) for part in parts(data)]
    return JOINED.join(each for each in identities if each is not None) or None


def _identity(part: TextSource) -> str | None:
    name = named(part.path)
    return name if is_named(name) else str(part) if is_hub(name) else text_sha256(name)


def _has_rows(part: TextSource) -> bool:
    return Path(part.path).is_file() and Path(part.path).suffix.lower() != ".txt"


def text_sha256(path: str) -> str | None:
    """SHA-256 of a local file; None for anything else."""
    return sha256(Path(path)) if Path(path).is_file() else None


def content_of(data: Data) -> Any:
    """What decides a text's bytes, of the files or the folder that it names, as plain data; None: it names none."""
    if isinstance(data, str):
        return data_content(data)
    return [data_content(path) for path in text_paths(data)]


def content_key(data: Data, source: ModelSource, *, calibration: bool) -> dict[str, Any]:
    """Cache key of a text as a model tokenizes it, or for `self` samples it; plain data.

    Args:
        data: not a folder, and nothing on the hub.
        calibration: which part of a data set.
    """
    texts = [
        named_sha256(part.path, calibration=calibration) if is_named(part.path) else text_sha256(part.path)
        for part in parts(data)
    ]
    return {
        "data": data if isinstance(data, str) else [part.model_dump(mode="json") for part in parts(data)],
        "text": texts,
        "tokenizer": source.tokenizer_content(),
        "chats": chat_template(source) if any(map(_has_rows, parts(data))) else None,
        "writer": source.content() if is_sampled(data) else None,
        "context": source.context_length,
        "packages": versions_of("tokenizers", "gguf", "pyarrow"),
    }
