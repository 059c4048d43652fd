"""AutoAWQ's layout, read back by an independent implementation of it and by qcli's reader of other software's."""

from __future__ import annotations

import json
import shutil
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
from qcli.models.layouts import awq as layout
from qcli.models.manifest import MANIFEST
from qcli.models.open import open_source
from qcli.utils.errors import UnsupportedError, VerificationError
from tests.quantizing import run, streamed
from tests.tiny import tiny_model

LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


def decoded(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """`[out, in]`, as AutoAWQ 0.2.7 does (`awq.utils.packing_utils.dequantize_gemm`), written anew: eight shifts, then
    outputs put into order."""
    qweight, qzeros, scales = (tensors[f"{layer}.{name}"] for name in ("qweight", "qzeros", "scales"))
    shifts, order = torch.arange(0, 32, 4), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def unpacked(words: Tensor) -> Tensor:
        columns = (words[:, :, None] >> shifts & 15).flatten(1)
        return columns[:, torch.arange(columns.shape[1]).view(-1, 8)[:, order].flatten()]

    size = len(qweight) // len(scales)
    codes, zeros = unpacked(qweight), unpacked(qzeros).repeat_interleave(size, 0)
    return ((codes - zeros) * scales.float().repeat_interleave(size, 0)).T


def packed(model: Path, folder: Path, **flags: Any) -> tuple[Path, Path]:
    run(model, folder / "native", **{"method__name": "rtn", "method__bits": 4, **flags})
    pack(folder / "native", folder / "packed", format="awq", shard_size=10**9, allow_refused=True)
    return folder / "native", folder / "packed"


@pytest.mark.parametrize(("symmetric", "group"), [(False, 32), (True, 64), (False, -1)])
def test_an_independent_reader_decodes_the_same_weights(
    symmetric: bool, group: int, llama: Path, tmp_path: Path
) -> None:
    native, out = packed(llama, tmp_path, method__group_size=group, method__symmetric=symmetric)
    tensors, source = load_file(out / "model.safetensors"), open_source(str(native))
    for layer in LAYERS:
        assert torch.equal(decoded(tensors, layer), source.read([f"{layer}.weight"])[f"{layer}.weight"])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["zero_point"], config["version"]) == (4, group, True, "gemm")
    assert torch.equal(streamed(out), streamed(native))
    assert verify(out).layers == 14
    foreign = tmp_path / "foreign"  # as software that is not qcli would leave it
    shutil.copytree(out, foreign, ignore=shutil.ignore_patterns(MANIFEST))
    read = open_source(str(foreign))
    assert read.quantized_as is not None and read.quantized_as.startswith("awq, 4 bits")
    for layer in LAYERS:
        weight = read.read([f"{layer}.weight"])[f"{layer}.weight"]
        assert torch.equal(weight, decoded(tensors, layer).half().to(weight.dtype))


def test_layout_by_hand() -> None:
    """Outputs 0 to 7 of an input are the digits 0, 2, 4, 6, 1, 3, 5, 7 of a word, the first the lowest."""
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 4)
    scale = torch.full((8, 1), 0.5, dtype=torch.float16)
    symmetric = QuantizedWeight(Affine(bits=4, group_size=4, zero_point="none"), (8, 4), codes, {"weight_scale": scale})
    tensors = layout.tensors("layer", symmetric)
    assert tensors["layer.qweight"].tolist() == [[0x75316420]] * 4
    assert [word & 0xFFFFFFFF for word in tensors["layer.qzeros"][0].tolist()] == [0x88888888]
    assert tensors["layer.scales"].shape == (1, 8)
    tables = {"weight_scale": scale, "weight_zero_point": codes[:, :1]}
    asymmetric = QuantizedWeight(Affine(bits=4, group_size=4, zero_point="integer"), (8, 4), codes, tables)
    assert layout.tensors("layer", asymmetric)["layer.qzeros"].tolist() == [[0x75316420]]


def test_dense_layers_are_listed(llama: Path, tmp_path: Path) -> None:
    _, out = packed(llama, tmp_path, overrides=[{"match": "*.1.mlp.down_proj", "dense": True}])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.down_proj"]
    assert "model.layers.1.mlp.down_proj.weight" in load_file(out / "model.safetensors")


def test_damage_is_noticed(llama: Path, tmp_path: Path) -> None:
    _, out = packed(llama, tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="is not what `qcli pack --format awq` writes"):
        open_source(str(out))
    config["quantization_config"] |= {"version": "gemm", "group_size": 64}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"qzeros|scales"):
        open_source(str(out))
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qweight"] = tensors["model.layers.0.mlp.up_proj.qweight"].flatten()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="qweight is not a matrix"):
        open_source(str(out))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method__bits": 3}, "q_proj has 3 bits, awq stores 4"),
        ({"method__zero_point": "float"}, "has floating-point zero points, awq stores only integers"),
        ({"overrides": [{"match": "*.down_proj", "method": {"group_size": 64}}]}, "has other groups than"),
        ({"overrides": [{"match": "*.q_proj", "dense": True}]}, "engines that load awq fuse them"),
        ({"method__group_size": 48, "method__group_tail": "ragged"}, "in groups of 48: awq has no shorter last group"),
        ({"method__group_size": 16}, r"vLLM does not load this as awq: groups of 16, its kernels take 32, 64, 128"),
        ({"activations__bits": 8}, "quantizes activations to 8 bits, which awq cannot store"),
    ],
)
def test_what_the_layout_or_its_engines_cannot_have_is_refused(
    flags: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    run(llama, tmp_path / "native", **{"method__name": "rtn", "method__bits": 4, **flags})
    with pytest.raises(UnsupportedError, match=message) as raised:
        pack(tmp_path / "native", tmp_path / "packed", format="awq", shard_size=10**9)
    assert raised.value.exit_code == 6 and raised.value.hint is not None and "qcli" in raised.value.hint
    assert [path.name for path in tmp_path.iterdir() if "packed" in path.name] == []


def test_outputs_fill_words(tmp_path: Path) -> None:
    run(
        tiny_model("llama", tmp_path, intermediate_size=100),
        tmp_path / "native",
        method__name="rtn",
        method__group_size=-1,
    )
    with pytest.raises(UnsupportedError, match="gate_proj has 100 outputs, awq packs 8 of them into a word"):
        pack(tmp_path / "native", tmp_path / "packed", format="awq", shard_size=10**9)


def test_the_card_names_the_engines_that_load_it(tmp_path: Path) -> None:
    """transformers multiplies activations of some models by scales that this checkpoint does not have."""
    model = tiny_model("gpt_neox", tmp_path)
    run(model, tmp_path / "native", method__name="rtn", method__bits=4)
    with pytest.raises(UnsupportedError, match="transformers does not load this as awq: in gpt_neox it expects scales"):
        pack(tmp_path / "native", tmp_path / "packed", format="awq", shard_size=10**9)
    pack(tmp_path / "native", tmp_path / "packed", format="awq", shard_size=10**9, allow_refused=True)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "vllm serve" in card and "gptqmodel" not in card
