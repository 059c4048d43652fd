"""Folders that `qcli calibrate` wrote, as a source of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcli.data.names import HINT
from qcli.data.stored_windows import TOKENS
from qcli.utils.errors import StateError, UsageError
from qcli.utils.files import files_below, parse_json, reading, write_json
from qcli.utils.safetensors import read_header, read_tensors
from qcli.utils.sealed import digest

if TYPE_CHECKING:
    from qcli.models.source import ModelSource

CALIBRATION = "calibration.json"  # settings and statistics
_FILES = (CALIBRATION, TOKENS, "statistics.safetensors", "hessians-*.safetensors")
_CHECKSUM = "sha256"  # of everything else in that file


def read_folder(folder: Path, source: ModelSource) -> Tensor:
    """The folder's token windows, int64 `[windows, length]`.

    Args:
        source: the model that will read them.

    Raises:
        UsageError: not a calibration folder, damaged, or its tokens lie outside the model's vocabulary.
    """
    file = folder / TOKENS
    if not file.is_file():
        raise UsageError(f"{folder} is not a folder written by `qcli calibrate`: no {TOKENS}", hint=HINT)
    try:
        ids = read_tensors(read_header(file).items()).get("ids", torch.empty(0))
    except UsageError as problem:
        raise _damaged(problem.message) from None
    if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        raise _damaged(f"{file}: damaged: no token windows")
    sha256 = read_record(folder).get("tokens_sha256")  # the record is missing where only tokens are needed
    if sha256 not in (None, hashlib.sha256(ids.numpy().tobytes()).hexdigest()):
        raise _damaged(f"{file}: damaged: its hash is not the one in {CALIBRATION}")
    vocabulary = source.hf_config().get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise UsageError(
            f"{folder}: contains token ids outside the model's vocabulary of {vocabulary}",
            hint="calibrate with the model that you quantize",
        )
    return ids


def read_record(folder: Path) -> dict[str, Any]:
    """The content of the folder's `calibration.json`; empty if there is none.

    Raises:
        UsageError: it is damaged.
        QcliError: it cannot be read; see `os_problem`.
    """
    file = folder / CALIBRATION
    if not file.is_file():
        return {}
    with reading(file):
        content = file.read_bytes()
    try:
        record = parse_json(content)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise _damaged(f"{file}: damaged: no JSON object")
    if _CHECKSUM in record and record.pop(_CHECKSUM) != digest(record):  # earlier versions wrote none
        raise _damaged(f"{file}: damaged or edited: its checksum does not match")
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `calibration.json`.

    Raises:
        QcliError: it cannot be written; see `os_problem`.
    """
    write_json(folder / CALIBRATION, {**record, _CHECKSUM: digest(record)})


def require_own_folder(folder: Path) -> None:
    """Refuse a folder that is anything else than one that `qcli calibrate` wrote: it is about to be replaced.

    Raises:
        StateError: it has no record, or a file that qcli did not write.
        UsageError: its record is damaged.
    """
    hint = "move it away, or choose another --out"
    if not (folder / CALIBRATION).is_file() or not read_record(folder).get("tokens_sha256"):
        raise StateError(f"{folder} is not a folder written by `qcli calibrate`", hint=hint)
    for file in files_below(folder):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink() or not any(fnmatchcase(name, pattern) for pattern in _FILES):
            raise StateError(f"{folder} contains {name}, which qcli did not write", hint=hint)


def _damaged(message: str) -> UsageError:
    return UsageError(message, hint="run `qcli calibrate` again")
