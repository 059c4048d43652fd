"""What identifies a text: in manifests by name or hash, in cache keys by everything its tokens depend on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.data.calibration_folder import read_record
from qcli.data.chats import chat_template
from qcli.data.datasets import is_folder, is_sampled, named_sha256
from qcli.data.default_text import named
from qcli.data.hub_rows import FOR_CALIBRATION, FOR_EVALUATION
from qcli.data.image_rows import data_content
from qcli.data.names import is_named
from qcli.data.source import Data, TextSource, is_hub, parts, text_paths
from qcli.utils.environment import versions_of
from qcli.utils.files import sha256

if TYPE_CHECKING:
    from qcli.models.source import ModelSource

JOINED = " + "  # between the identities of several texts
_ON_HUB = re.compile(
    r"(?P<path>[^ ,/]+/[^ ,/]+)(, config (?P<config>.+?))?(, split (?P<split>.+?))?"
    r"(, column .+?)?(, template)?"  # of earlier versions
)


def text_identity(data: Data, *, calibration: bool) -> str | None:
    """The name of a data set, on the hub with its split, or the hash of a file; of a calibration folder, that of the
    text it was cut from; of several texts, all of theirs. Compare them with `may_overlap`.

    None if unknown: `self`, or a folder without `calibration.json`; and for evaluation a named set, which has a part of
    its own for it.

    Args:
        calibration: which part of a data set is read where `data` names none.

    Raises:
        UsageError: a folder's `calibration.json` is damaged.
        QcliError: a file cannot be read; see `os_problem`.
    """
    if is_folder(data):
        identity = read_record(Path(data)).get("text_identity")
        return identity if isinstance(identity, str) else None
    identities = [_identity(part, calibration) for part in parts(data)]
    return JOINED.join(each for each in identities if each is not None) or None


def _identity(part: TextSource, calibration: bool) -> str | None:
    name = named(part.path)
    if is_named(name):
        return name if calibration else None
    if not is_hub(name):
        return text_sha256(name)
    # Whichever column is read: the columns of a row are of one thing, as a question and its answer.
    split = part.split or "+".join(FOR_CALIBRATION if calibration else FOR_EVALUATION)
    return f"{name}{f', config {part.config}' if part.config else ''}, split {split.replace(' ', '')}"


def may_overlap(identity: str, other: str) -> bool:
    """Whether two texts may share rows, by what `text_identity` gives for them: one of several that they are made of is
    the same, or of the same split of a data set on the hub. Slices of a split are not told apart, and a configuration
    that is not named may be any."""
    return any(_may_overlap(one, two) for one in identity.split(JOINED) for two in other.split(JOINED))


def _may_overlap(one: str, two: str) -> bool:
    first, second = _ON_HUB.fullmatch(one), _ON_HUB.fullmatch(two)
    if first is None or second is None or first["path"] != second["path"]:
        return one == two
    configs = {match["config"] for match in (first, second)} - {None}
    splits, others = _splits(first["split"]), _splits(second["split"])
    return len(configs) < 2 and (not splits.isdisjoint(others) or "all" in splits | others)


def _splits(split: str | None) -> set[str]:
    """The names in a split such as `train[:10%]+test`; where an earlier version recorded none, what it read."""
    return {part.partition("[")[0] for part in split.split("+")} if split else set(FOR_CALIBRATION)


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
