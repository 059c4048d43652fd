"""Quantized models with experts: read as transformers loads them, decoded, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qcli.models.decoded import DecodedSource
from qcli.models.families import FAMILIES, Family
from qcli.models.open import open_source
from tests.models.test_names import assert_equal, random_model, with_own_experts
from tests.tiny import tiny_model

auto: Any = AutoModelForCausalLM


def in_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random blocks and exponents in place of the experts."""
    generator = torch.Generator().manual_seed(1)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks, exponents = (experts, outputs, inputs // 32, 16), (experts, outputs, inputs // 32)
        stored[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=generator).to(torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 130, exponents, generator=generator).to(torch.uint8)
    return stored


def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linear layers in fp8 with random scales by block."""
    generator = torch.Generator().manual_seed(1)
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            rows, columns = tensor.shape
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = 0.1 + torch.rand(-(-rows // 16), -(-columns // 16), generator=generator)
    return stored


SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 32, "moe_intermediate_size": 48}
CASES = {
    "gpt_oss": (in_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4 in blocks of 32"),
    "qwen3_moe": (
        in_fp8,
        {"quant_method": "fp8", "weight_block_size": [16, 16], "dequantize": True},
        "fp8 in blocks of 16 x 16",
    ),
}


@pytest.mark.parametrize("model_type", CASES)
def test_weights_are_those_that_transformers_decodes(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, config, stored_as = CASES[model_type]
    random_model(model_type, **SIZES).bfloat16().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(quantize(load_file(file)), file, {"format": "pt"})
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"quantization_config": config}))
    expected = with_own_experts(auto.from_pretrained(tmp_path, dtype=torch.bfloat16))
    row = Family(model_type, "model.layers", (), (), renames=None)
    monkeypatch.setitem(FAMILIES, model_type, row)
    source = open_source(str(tmp_path))
    assert isinstance(source, DecodedSource)
    assert_equal(source.read(source.tensors()), expected)
    expert = "model.layers.1.mlp.experts.2.gate_proj.weight"
    assert source.stored_as(expert) == stored_as
    assert source.bits_of([expert.removesuffix(".weight")]) == pytest.approx(
        4.25 if model_type == "gpt_oss" else 8 + 32 / 16**2
    )
    assert "quantization_config" not in source.config_to_write()
    assert not hasattr(source.hf_config(), "quantization_config")


def test_a_config_in_that_of_the_language_model_counts(tmp_path: Path) -> None:
    path = tiny_model("gemma3", tmp_path)
    tensors = load_file(path / "model.safetensors")
    names = [name for name in tensors if "language_model.model.layers" in name and name.endswith("proj.weight")]
    for name in names:
        tensors[f"{name}_scale_inv"] = torch.tensor(0.5)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(config))
    source = open_source(str(path))
    assert source.quantized_as == "fp8"
    assert "quantization_config" not in source.config["text_config"]
    [up] = source.read(["model.language_model.layers.1.mlp.up_proj.weight"]).values()
    stored = tensors["language_model.model.layers.1.mlp.up_proj.weight"].float()
    assert torch.equal(up.float(), (stored / 2).to(up.dtype).float())
