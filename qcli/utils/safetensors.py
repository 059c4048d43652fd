"""Reading safetensors files: validated headers, and single tensors.

The format is eight bytes of header length, a JSON header, and the contiguous bytes of each tensor. Our own reader does
what the library does not: it rejects duplicate names, needs no torch for headers, and reads each tensor into memory
of its own, where the library maps the whole file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qcli.utils.dtypes import DTYPES, StoredTensor
from qcli.utils.errors import UsageError, os_problem
from qcli.utils.files import parse_json, read_chunk, reading, require_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_METADATA = "__metadata__"
_CHUNK = 1 << 24  # bytes of a tensor in memory
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Extent:
    """Location of a tensor in a safetensors file.

    Attributes:
        start: offset of the first byte in the file.
        bytes: size.
    """

    file: Path
    stored: StoredTensor
    start: int
    bytes: int

    def item(self, index: int) -> Extent:
        """One of the tensors of a stack: an index along the first dimension."""
        part = self.rows(index, index + 1)
        return replace(part, stored=StoredTensor(self.stored.dtype, self.stored.shape[1:]))

    def rows(self, start: int, stop: int) -> Extent:
        """Consecutive indices along the first dimension, whose bytes are together in the file."""
        row = self.bytes // self.stored.shape[0]
        return Extent(self.file, self.stored.rows(start, stop), self.start + start * row, (stop - start) * row)


def read_header(file: Path) -> dict[str, Extent]:
    """The extents of all tensors in a safetensors file, by name.

    Raises:
        UsageError: the file is missing, truncated or malformed, or has two tensors of one name.
    """
    header, length, size = _parsed_header(file)
    header.pop(_METADATA, None)
    extents = {name: _extent(file, name, entry, 8 + length) for name, entry in header.items()}
    expected = 8 + length
    for extent in sorted(extents.values(), key=lambda extent: (extent.start, extent.bytes)):
        if extent.start != expected:
            raise _broken(file, "its tensors overlap or leave gaps")
        expected += extent.bytes
    if expected != size:
        raise _broken(file, f"it has {size} bytes where its header says {expected}")
    return extents


def read_metadata(file: Path) -> dict[str, Any]:
    """The `__metadata__` of a safetensors file; empty if it has none.

    Raises:
        UsageError: as `read_header`, but extents are not looked at.
    """
    metadata = _parsed_header(file)[0].get(_METADATA)
    return metadata if isinstance(metadata, dict) else {}


def read_bytes(extent: Extent) -> bytes:
    """The raw bytes of a tensor."""
    with reading(extent.file), extent.file.open("rb") as stream:
        stream.seek(extent.start)
        return stream.read(extent.bytes)


def same_content(one: Extent, two: Extent) -> bool:
    """Whether two tensors have the same dtype, shape and bytes, which are read in pieces up to the first difference.

    Raises:
        QcliError: a file cannot be read; see `os_problem`.
    """
    if one.stored != two.stored:
        return False
    with reading(one.file):
        first = one.file.open("rb")
    with first, reading(two.file), two.file.open("rb") as second:
        first.seek(one.start)
        second.seek(two.start)
        for start in range(0, one.bytes, _CHUNK):
            count = min(_CHUNK, one.bytes - start)
            if read_chunk(first, one.file, count) != read_chunk(second, two.file, count):
                return False
    return True


def read_tensors(extents: Iterable[tuple[str, Extent]]) -> dict[str, Tensor]:
    """Read tensors in their stored dtype, each into memory of its own; no file stays open or mapped.

    Raises:
        UsageError: a file is shorter than its header said.
        QcliError: it cannot be read; see `os_problem`.
    """
    import torch

    tensors = {}
    for name, extent in extents:
        buffer = torch.empty(extent.bytes, dtype=torch.uint8)
        with reading(extent.file), extent.file.open("rb", buffering=0) as stream:
            stream.seek(extent.start)
            _fill(stream, memoryview(buffer.numpy().data), extent.file)
        tensors[name] = buffer.view(extent.stored.torch_dtype).view(extent.stored.shape)
    return tensors


class MappedFiles:
    """Files mapped into memory, each once, for tensors whose memory is the file's: pages are read when they are used.

    The mapping is private, so that writing to a tensor leaves the file as it is; it lasts as long as its tensors.
    """

    def __init__(self) -> None:
        self._storages: dict[Path, torch.UntypedStorage] = {}

    def tensors(self, extents: Iterable[tuple[str, Extent]]) -> dict[str, Tensor]:
        """As `read_tensors`, mapped, except for those that do not lie at a multiple of their item size."""
        import torch

        tensors: dict[str, Tensor] = {}
        for name, extent in extents:
            dtype, end = extent.stored.torch_dtype, extent.start + extent.bytes
            if extent.start % dtype.itemsize or not extent.bytes:
                tensors |= read_tensors([(name, extent)])
                continue
            storage = self._storage(extent.file)
            if end > storage.nbytes():
                raise _broken(extent.file, "it ends early")
            piece = torch.asarray(storage[extent.start : end], dtype=torch.uint8)
            tensors[name] = piece.view(dtype).view(extent.stored.shape)
        return tensors

    def _storage(self, file: Path) -> torch.UntypedStorage:
        import torch

        if file not in self._storages:
            with reading(file):
                size = file.stat().st_size
            self._storages[file] = cast("torch.UntypedStorage", torch.UntypedStorage.from_file(str(file), False, size))
        return self._storages[file]


def _parsed_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, its length and the size of the file, both in bytes."""
    try:
        require_regular(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise _broken(file, "its header is longer than the file")
            text = stream.read(length)
    except FileNotFoundError:
        raise UsageError(f"{file} is missing", hint="download the model again") from None
    except OSError as error:
        raise os_problem(error, f"{file} cannot be read") from error
    try:
        header = parse_json(text, object_pairs_hook=lambda pairs: _unique(file, pairs))
    except ValueError:
        raise _broken(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    return header, length, size


def _fill(stream: Any, view: memoryview, file: Path) -> None:
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise _broken(file, "it ends early")
        view = view[count:]


def _extent(file: Path, name: str, entry: Any, data: int) -> Extent:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not isinstance(dtype, str) or not all(
            isinstance(number, int) and number >= 0 for number in (*shape, begin, end)
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _broken(file, f"the header entry of {name} is malformed") from None
    if dtype not in DTYPES:
        raise UsageError(
            f"{file}: {name} has dtype {dtype}, which qcli does not read",
            hint="use the unquantized model: MLX packs codes like this" if dtype == "U32" else None,
        )
    if end - begin != DTYPES[dtype].bytes * prod(shape):
        raise _broken(file, f"the size of {name} does not match its shape")
    return Extent(file, StoredTensor(dtype, shape), data + begin, end - begin)


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{file}: its header names {twice} twice", hint="the file is damaged or was tampered with")
    return table


def _broken(file: Path, what: str) -> UsageError:
    return UsageError(f"{file} is truncated or broken: {what}", hint="download the model again")
