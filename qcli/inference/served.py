"""What computes a checkpoint on this machine: the dtype it runs in, and the backend of each layer."""

from __future__ import annotations

import torch

from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.row_scaled import RowScaled
from qcli.core.weight import Format
from qcli.inference.backend import Choice, choose
from qcli.models.source import ModelSource
from qcli.utils.device import has_fast_matmul
from qcli.utils.dtypes import COMPUTE_DTYPES, torch_dtype


def own_dtype(source: ModelSource, device: torch.device) -> torch.dtype:
    """The dtype to run a model in: that of its config, but float32 or bfloat16 where the device is slow in it."""
    name = str(source.config.get("dtype") or source.config.get("torch_dtype"))
    dtype = torch_dtype(name if name in COMPUTE_DTYPES else "float32")
    if dtype == torch.float32:
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if has_fast_matmul(device) else torch.float32
    return dtype if has_fast_matmul(device) else torch.float16


def backend_of(format: Format, shape: tuple[int, int], device_type: str, dtype: torch.dtype) -> Choice:
    """The backend that computes a layer; low-rank terms and exponents of rows are torch's, whatever serves the rest."""
    while isinstance(format, LowRank | RowScaled):
        format = format.base
    return choose(format, shape, device_type, dtype)
