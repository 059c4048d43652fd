"""Values with tensors in them as one tensor of bytes, which processes send to each other as they send any tensor."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 16  # bytes: every tensor starts at a multiple, so that its bytes can be viewed in its dtype
_LENGTH = 8  # bytes of the header's length, which come first


def pack(value: Any, device: torch.device) -> Tensor:
    """Bytes of a value that can be pickled, uint8 `[n]` on `device`; its tensors keep dtype and shape."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> int | None:
            if not isinstance(item, Tensor):
                return None
            tensors.append(item.detach())
            return len(tensors) - 1

    described = io.BytesIO()
    Pickler(described).dump(value)
    extents = [(tensor.dtype, tensor.shape) for tensor in tensors]
    header = pickle.dumps((described.getvalue(), extents))
    *places, end = _places(_LENGTH + len(header), extents)
    content = torch.empty(end, dtype=torch.uint8, device=device)
    head = bytearray(len(header).to_bytes(_LENGTH, "little") + header)
    content[: len(head)] = torch.frombuffer(head, dtype=torch.uint8).to(device)
    for place, tensor in zip(places, tensors, strict=True):
        flat = tensor.contiguous().flatten().view(torch.uint8)
        content[place : place + len(flat)] = flat.to(device)
    return content


def unpack(content: Tensor) -> Any:
    """Inverse of `pack`, for bytes that another process of the same run has packed; tensors lie on their device."""
    length = int.from_bytes(_bytes(content[:_LENGTH]), "little")
    described, extents = pickle.loads(_bytes(content[_LENGTH : _LENGTH + length]))
    tensors = [
        content[place : place + _size(dtype, shape)].view(dtype).view(shape).clone()
        for place, (dtype, shape) in zip(_places(_LENGTH + length, extents), extents, strict=False)
    ]

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: Any) -> Any:
            return tensors[number]

    return Unpickler(io.BytesIO(described)).load()


def _places(start: int, extents: list[tuple[torch.dtype, torch.Size]]) -> Iterator[int]:
    """Where each tensor starts, and where the last one ends."""
    sizes = (_padded(_size(dtype, shape)) for dtype, shape in extents)
    return accumulate(sizes, initial=_padded(start))


def _size(dtype: torch.dtype, shape: torch.Size) -> int:
    return dtype.itemsize * prod(shape)


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _bytes(content: Tensor) -> bytes:
    return content.cpu().numpy().tobytes()
