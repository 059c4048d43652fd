"""Writing safetensors files: atomically from tensors, or joined from finished files into shards.

Joining copies bytes and writes new headers. It loads no tensor, so a checkpoint of any size is assembled in constant
memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.utils.dtypes import STORED_NAME, StoredTensor
from qcli.utils.errors import VerificationError
from qcli.utils.files import read_chunk, reading, write_chunks, write_json, writing
from qcli.utils.safetensors import Extent

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_SIZE = 5 * 10**9  # bytes, by default
_CHUNK = 1 << 24  # bytes of a copy in memory


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically.

    Raises:
        QcliError: it cannot be written; see `os_problem`.
    """
    entries, contents = serialized(tensors)
    write_chunks(file, [header_text(entries), *contents])


def serialized(tensors: Mapping[str, Tensor]) -> tuple[dict[str, StoredTensor], list[memoryview]]:
    """Headers and bytes of tensors, in their order; on the CPU the bytes are views."""
    import torch

    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {
        name: StoredTensor(STORED_NAME[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in contents.items()
    }
    return entries, [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in contents.values()]


def header_text(tensors: Mapping[str, StoredTensor], **metadata: str) -> bytes:
    """Header of a safetensors file with these tensors in this order, including its length."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def grouped(parts: Sequence[Mapping[str, StoredTensor]], shard_size: int) -> list[list[int]]:
    """Indices of the parts of each shard: in order, at most `shard_size` bytes of tensors unless one part is larger."""
    shards: list[list[int]] = []
    filled = 0
    for index, part in enumerate(parts):
        size = sum(tensor.bytes for tensor in part.values())
        if not shards or filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += size
    return shards


def shard_bytes(parts: Sequence[Mapping[str, StoredTensor]], shard_size: int) -> int:
    """Exact size in bytes of all shards that `join` would write."""
    total = 0
    for members in grouped(parts, shard_size):
        tensors = {name: tensor for index in members for name, tensor in parts[index].items()}
        total += len(header_text(tensors)) + sum(tensor.bytes for tensor in tensors.values())
    return total


def join(parts: Sequence[Mapping[str, Extent]], out: Path, shard_size: int) -> None:
    """Copy tensors from other files into shards of at most `shard_size` bytes; several get an index.

    Args:
        parts: groups of tensors that stay in one shard, in order; names are unique over all parts.
        out: folder of the shards.
        shard_size: bytes; a larger part becomes a shard of its own.

    Raises:
        QcliError: a file cannot be read or written; see `os_problem`.
        VerificationError: a file is shorter than its header said.
    """
    stored = [{name: extent.stored for name, extent in part.items()} for part in parts]
    shards = grouped(stored, shard_size)
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        extents = {tensor: extent for index in members for tensor, extent in parts[index].items()}
        _write_shard(out / name, extents)
        weight_map |= dict.fromkeys(extents, name)
    if len(shards) > 1:
        total = sum((out / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(out / INDEX, index)


def _write_shard(file: Path, extents: Mapping[str, Extent]) -> None:
    with writing(file), file.open("wb") as stream:
        stream.write(header_text({name: extent.stored for name, extent in extents.items()}))
        for extent in extents.values():
            _copy(extent, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _copy(extent: Extent, target: Any) -> None:
    with reading(extent.file):
        source = extent.file.open("rb")
    with source:
        source.seek(extent.start)
        left = extent.bytes
        while left:
            data = read_chunk(source, extent.file, min(_CHUNK, left))
            if not data:
                raise VerificationError(f"{extent.file} has become shorter while it was copied")
            target.write(data)
            left -= len(data)
