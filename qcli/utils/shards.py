"""Writing safetensors files: atomically from tensors, or joined from finished files into shards.

Joining copies bytes and writes new headers. It loads no tensor, so a checkpoint of any size is assembled in constant
memory.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.utils.dtypes import STORED_NAME, StoredTensor
from qcli.utils.files import disk_problem, write_chunks, write_json
from qcli.utils.safetensors import Extent

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_SIZE = 5 * 10**9  # bytes, by default


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically.

    Raises:
        ResourceError: the disk is full.
    """
    import torch

    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {
        name: StoredTensor(STORED_NAME[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in contents.items()
    }
    raw = (tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in contents.values())
    write_chunks(file, chain([header_text(entries)], raw))


def header_text(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Header of a safetensors file with these tensors in this order, including its length."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
        ResourceError: the disk is full.
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
    try:
        with file.open("wb") as stream:
            stream.write(header_text({name: extent.stored for name, extent in extents.items()}))
            for extent in extents.values():
                with extent.file.open("rb") as source:
                    source.seek(extent.start)
                    _copy(source, stream, extent.bytes)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_problem(file, error) from None


def _copy(source: Any, target: Any, count: int, chunk: int = 1 << 24) -> None:
    while count:
        data = source.read(min(chunk, count))
        if not data:
            raise OSError(errno.EIO, "a source file has become shorter")
        target.write(data)
        count -= len(data)
