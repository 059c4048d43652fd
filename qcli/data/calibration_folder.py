"""Folders that `qcli calibrate` wrote, as a source of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcli.data.stored_windows import TOKENS
from qcli.data.text_files import HINT
from qcli.utils.errors import UsageError
from qcli.utils.safetensors import read_header, read_tensors

if TYPE_CHECKING:
    from qcli.models.source import ModelSource

CALIBRATION = "calibration.json"  # settings and statistics


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
        ids = read_tensors([("ids", read_header(file)["ids"])])["ids"]
    except (UsageError, KeyError):
        ids = torch.empty(0)
    if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        raise UsageError(f"{file}: damaged", hint="run `qcli calibrate` again")
    vocabulary = source.hf_config().get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise UsageError(
            f"{folder}: contains token ids outside the model's vocabulary of {vocabulary}",
            hint="calibrate with the model that you quantize",
        )
    return ids
