"""What formats share in storing tables: symmetric 8-bit numbers, and checks of what was read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # of float16
_TOP = 127  # symmetric, so that 0 is a value and a sign is free


def symmetric_int8(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The nearest int8 numbers and their float16 scales, one for all entries along `dim`, which is kept."""
    import torch

    scale = (values.abs().amax(dim, keepdim=True) / _TOP).clamp(min=SMALLEST_SCALE).half()
    return (values / scale.to(values.dtype)).round().clamp(-_TOP, _TOP).to(torch.int8), scale


def check_tables(tables: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Raise VerificationError unless every table of `stored` has its shape and dtype and is finite."""
    for name, expected in stored.items():
        table = tables[name]
        if tuple(table.shape) != expected.shape or table.dtype != expected.torch_dtype:
            raise VerificationError(
                f"{name} is {table.dtype} {list(table.shape)}, not {expected.dtype} {expected.shape}"
            )
        if not bool(table.isfinite().all()):
            raise VerificationError(f"{name} holds NaN or infinity")
