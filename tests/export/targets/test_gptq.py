"""The GPTQ layout, read back by an independent implementation of its published description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcli.core.formats.affine import Affine
from qcli.core.weight import QuantizedWeight
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models.layouts import gptq as layout
from qcli.models.open import open_source
from qcli.utils.errors import UnsupportedError, VerificationError
from tests.quantizing import run, streamed
from tests.tiny import tiny_model


def decoded(tensors: dict[str, Tensor], layer: str, bits: int) -> Tensor:
    """`[out, in]`, one code at a time as AutoGPTQ's first kernels did: weight = scale * (code - (zero + 1))."""
    qweight, qzeros, scales, g_idx = (tensors[f"{layer}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx"))
    per_word, mask = 32 // bits, (1 << bits) - 1
    weight = torch.empty(scales.shape[1], len(g_idx))
    for column, group in enumerate(g_idx.tolist()):
        for row in range(scales.shape[1]):
            code = int(qweight[column // per_word, row]) >> bits * (column % per_word) & mask
            zero = int(qzeros[group, row // per_word]) >> bits * (row % per_word) & mask
            weight[row, column] = scales[group, row].float() * (code - (zero + 1))
    return weight


def packed(folder: Path, model_type: str = "llama", **flags: Any) -> tuple[Path, Path]:
    run(tiny_model(model_type, folder), folder / "native", method__name="rtn", method__symmetric=True, **flags)
    pack(folder / "native", folder / "packed", format="gptq", shard_size=10**9)
    return folder / "native", folder / "packed"


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, -1)])
def test_an_independent_reader_decodes_the_same_weights(bits: int, group: int, tmp_path: Path) -> None:
    native, out = packed(tmp_path, method__bits=bits, method__group_size=group)
    tensors = load_file(out / "model.safetensors")
    source = open_source(str(native))
    for layer in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(decoded(tensors, layer, bits), source.read([f"{layer}.weight"])[f"{layer}.weight"])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (bits, group, True, False)
    assert torch.equal(streamed(out), streamed(native))
    assert verify(out).layers == 14


def test_layout_by_hand() -> None:
    """Eight inputs of an output are the hexadecimal digits of a word; the zero points of 8 are sevens."""
    codes = torch.arange(8, dtype=torch.uint8).repeat(8, 1)
    scale = torch.full((8, 1), 0.5, dtype=torch.float16)
    weight = QuantizedWeight(Affine(bits=4, group_size=8, zero_point="none"), (8, 8), codes, {"weight_scale": scale})
    tensors = layout.tensors("layer", weight)
    assert tensors["layer.qweight"].tolist() == [[0x76543210] * 8]
    assert tensors["layer.qzeros"].tolist() == [[0x77777777]]
    assert tensors["layer.g_idx"].tolist() == [0] * 8
    assert tensors["layer.scales"].shape == (1, 8)


@pytest.mark.parametrize(("name", "message"), [("qzeros", "symmetric"), ("g_idx", "original order")])
def test_other_zero_points_and_column_orders_are_refused(name: str, message: str, tmp_path: Path) -> None:
    _, out = packed(tmp_path)
    file = out / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.0.mlp.up_proj.{name}"] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(VerificationError, match=message):
        open_source(str(out)).read(["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method__bits": 3}, "3 bits symmetric, gptq stores 4 and 8 bits"),
        ({"method__symmetric": False}, "4 bits asymmetric"),
        ({"overrides": [{"match": "*.down_proj", "method": {"bits": 8}}]}, "another format than"),
        ({"overrides": [{"match": "*.down_proj", "dense": True}]}, "down_proj is dense"),
        ({"overrides": [{"match": "*.q_proj", "dense": True}]}, "q_proj is dense"),  # engines fuse it with k_proj
        ({"low_rank__rank": 2}, "is low-rank"),
    ],
)
def test_layers_the_layout_cannot_store_are_refused(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little grid. " * 200)
    flags = {"method__name": "rtn", "method__symmetric": True, **flags}
    run(tiny_model("llama", tmp_path), tmp_path / "native", text, **flags)
    with pytest.raises(UnsupportedError, match=message) as raised:
        pack(tmp_path / "native", tmp_path / "packed", format="gptq", shard_size=10**9)
    assert raised.value.hint is not None and "qcli" in raised.value.hint
    assert [path.name for path in tmp_path.iterdir() if "packed" in path.name] == []
