"""Quantized tables, and checks of tables read from disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
SMALLEST_NORMAL_SCALE = 2.0**-14  # the smallest normal float16: scales below it have fewer than 11 significant bits
SMALLEST_BLOCK_SCALE = 2.0**-17  # below it a float16 has fewer than 8 significant bits, those of the integers it scales
_MAX = 127  # the range is symmetric, so that 0 is representable and negation exact


def symmetric_int8(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Quantize to int8, with one float16 scale for all entries along `dim`.

    Returns:
        int8 of the same shape, and scales with `dim` kept at size 1.
    """
    import torch

    scale = (values.abs().amax(dim, keepdim=True) / _MAX).clamp(min=SMALLEST_SCALE).half()
    return (values / scale.to(values.dtype)).round().clamp(-_MAX, _MAX).to(torch.int8), scale


def check_tables(
    tables: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], problems: Mapping[str, Tensor] | None = None
) -> None:
    """Raise VerificationError unless every table has the shape and dtype that `stored` requires and is finite.

    Args:
        problems: further ones, as for `refuse`.
    """
    for name, expected in stored.items():
        table = tables[name]
        if tuple(table.shape) != expected.shape or table.dtype != expected.torch_dtype:
            raise VerificationError(
                f"{name} is {table.dtype} {list(table.shape)}, not {expected.dtype} {expected.shape}"
            )
    refuse({**not_finite({name: tables[name] for name in stored}), **(problems or {})})


def not_finite(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `refuse` says of tables with NaN or infinity."""
    floats = {name: table for name, table in tables.items() if table.is_floating_point()}
    return {f"{name} holds NaN or infinity": ~table.isfinite().all() for name, table in floats.items()}


def refuse(problems: Mapping[str, Tensor]) -> None:
    """Raise VerificationError with the first message whose condition, a boolean of one element, is true.

    All conditions are read at once: on a GPU every reading waits for all work before it.
    """
    import torch

    if problems:
        found = torch.stack([*problems.values()]).tolist()
        for message, is_true in zip(problems, found, strict=True):
            if is_true:
                raise VerificationError(message)
