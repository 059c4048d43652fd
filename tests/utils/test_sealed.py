"""Files with a hash: what was written is read, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qcli.utils import sealed
from qcli.utils.sealed import Damaged


def test_plain_data_is_read_as_json_has_it(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for value, read in (
        (None, None),
        ("text", "text"),
        ({"b": [1, float("inf")], "a": {2: "ä", 10: 0.1}}, {"a": {"2": "ä", "10": 0.1}, "b": [1, float("inf")]}),
    ):
        sealed.write_json(file, value)
        assert sealed.load_json(file) == read


def test_tensors_are_read_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(True), "none": torch.empty(0, 4)}
    sealed.write_tensors(file, tensors)
    for read in (sealed.load_tensors(file), load_file(file)):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    data, tensors = tmp_path / "x.json", tmp_path / "x.safetensors"
    sealed.write_json(data, {"value": 0.5})
    sealed.write_tensors(tensors, {"a": torch.arange(4, dtype=torch.float32)})
    for file, load in ((data, sealed.load_json), (tensors, sealed.load_tensors)):
        content = file.read_bytes()
        for place in range(len(content)):
            for bit in (1, 4, 64):
                damaged = bytearray(content)
                damaged[place] ^= bit
                file.write_bytes(damaged)
                with pytest.raises(Damaged):
                    load(file)


def test_a_file_of_another_name_is_not_read(tmp_path: Path) -> None:
    sealed.write_json(tmp_path / "a.json", 1)
    sealed.write_tensors(tmp_path / "a.safetensors", {})
    for suffix, load in (("json", sealed.load_json), ("safetensors", sealed.load_tensors)):
        (tmp_path / f"a.{suffix}").rename(tmp_path / f"b.{suffix}")
        with pytest.raises(Damaged, match=f"b.{suffix} is damaged: its checksum does not match"):
            load(tmp_path / f"b.{suffix}")


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 10**5, '{"a": 1}', '{"sha256": "0", "content": 1}'])
def test_what_is_no_sealed_file_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "x").write_text(content)
    for load in (sealed.load_json, sealed.load_tensors):
        with pytest.raises(Damaged, match="x is "):
            load(tmp_path / "x")
    with pytest.raises(Damaged, match="none is missing"):
        sealed.load_json(tmp_path / "none")
