"""Decode a tile of rows, then a matrix product: every format on every device, and the oracle of the other backends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from qcli.core import packing
from qcli.core.weight import Format
from qcli.inference.backend import Backend

__all__ = ["Reference"]

_TILE = 1 << 20  # weights decoded at a time: bounds the scratch memory of a forward pass


class Reference(Backend):
    """Plain PyTorch."""

    name: ClassVar[str] = "reference"
    device_types: ClassVar[frozenset[str] | None] = None

    def linear(
        self, x: Tensor, format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> Tensor:
        y = x.new_empty(*x.shape[:-1], shape[0])
        for rows, weight in decoded_tiles(format, shape, tensors):
            y[..., rows] = F.linear(x, weight.to(x.dtype), None if bias is None else bias[rows].to(x.dtype))
        return y


def decoded_tiles(
    format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the decoded weight and where they are: float32 `[n, in_features]`; one tile is unpacked at a time.

    Args:
        tensors: by suffix, as `Format.stored` describes them.
    """
    packed = tensors.get("weight_packed")
    if packed is None:  # the weight is stored as it is
        yield slice(0, shape[0]), format.from_stored(tensors, shape).dense()
        return
    tables = format.float_tables(format.from_stored({**tensors, "weight_packed": packed[:0]}, shape).tables)
    step = max(1, _TILE // shape[1])
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        codes = packing.unpack_bits(packed[rows], format.bits, shape[1])
        yield rows, format.decode(codes, format.slice_rows(tables, rows))


def input_gradient(gradient: Tensor, format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor:
    """`gradient W_hat`: `[..., out_features]` -> `[..., in_features]` in the gradient's dtype, summed in float32."""
    total = torch.zeros(*gradient.shape[:-1], shape[1], device=gradient.device)
    for rows, weight in decoded_tiles(format, shape, tensors):
        total += gradient[..., rows] @ weight.to(gradient.dtype)
    return total.to(gradient.dtype)
