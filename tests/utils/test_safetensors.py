"""Our reader agrees with the safetensors library, and rejects files that the library accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcli.utils.dtypes import DTYPES
from qcli.utils.errors import UsageError
from qcli.utils.safetensors import MappedFiles, read_header, read_tensors


def write(file: Path, header: str, data: bytes = b"") -> Path:
    """Write a safetensors file with this header text."""
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return file


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5), generator=generator).to(getattr(torch, dtype.torch))
        for name, dtype in DTYPES.items()
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: extent.stored.shape for name, extent in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    for read in (read_tensors, MappedFiles().tensors):
        for name, tensor in read(header.items()).items():
            assert tensor.dtype == tensors[name].dtype
            assert tensor.shape == tensors[name].shape
            assert torch.equal(tensor.float(), tensors[name].float())


def test_mapped_tensors_are_their_part_of_the_file_and_cannot_change_it(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(4096.0), "b": torch.ones(3)}, file)
    before = file.read_bytes()
    extents = read_header(file)
    mapped = MappedFiles().tensors(extents.items())
    assert mapped["a"].untyped_storage().nbytes() == 4 * 4096, "what a copy of the model would copy"
    mapped["a"].zero_()
    assert file.read_bytes() == before
    assert torch.equal(mapped["b"], torch.ones(3))
    file.write_bytes(before[:-4])
    with pytest.raises(UsageError, match="it ends early"):
        MappedFiles().tensors(extents.items())


@pytest.mark.parametrize("keep", [0, 5, 40, 400])
def test_truncated_files_are_rejected(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"x\.safetensors is truncated or broken"):
        read_header(file)


def test_trailing_bytes_are_rejected(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", json.dumps({"a": entry()}), bytes(9))
    with pytest.raises(UsageError, match="where its header says"):
        read_header(file)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x\.safetensors is missing"):
        read_header(tmp_path / "x.safetensors")


def test_duplicate_names_are_rejected(tmp_path: Path) -> None:
    one = json.dumps(entry())
    file = write(tmp_path / "x.safetensors", f'{{"a": {one}, "a": {one}}}', bytes(8))
    with pytest.raises(UsageError, match="names a twice"):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "[1, 2]",
        "[" * 100_000,
        '{"a": 3}',
        json.dumps({"a": entry(shape=(-2,))}),
        json.dumps({"a": entry(shape="ab")}),
        json.dumps({"a": entry(shape=(3,))}),
        json.dumps({"a": entry(offsets=(8, 0))}),
        json.dumps({"a": entry(offsets=(4, 12))}),
        json.dumps({"a": entry(), "b": entry()}),
        json.dumps({"a": entry(dtype="F4")}),
        json.dumps({"a": entry() | {"dtype": {}}}),
        json.dumps({"a": entry() | {"dtype": ["F32"]}}),
        json.dumps({"\ud800": entry()}),
    ],
)
def test_malformed_headers_are_rejected(header: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(UsageError, match=r"x\.safetensors"):
        read_header(file)


def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(UsageError, match="longer than the file"):
        read_header(file)


def test_a_file_truncated_after_its_header_was_read_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, file)
    header = read_header(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UsageError, match="ends early"):
        read_tensors(header.items())
