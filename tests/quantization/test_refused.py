"""What quantizing and loading refuse: broken models, broken checkpoints, other versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qcli.export.verify import verify
from qcli.models.open import open_source
from qcli.utils import shards
from qcli.utils.errors import QcliError, UnsupportedError, UsageError, VerificationError
from tests.quantizing import run, write_text
from tests.tiny import tiny_model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def test_broken_weights_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    shards.write_tensors(file, tensors)
    with pytest.raises(UsageError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        run(model, tmp_path / "out", method__name="rtn")
    assert not (tmp_path / "out").exists()


def test_scales_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e8
    shards.write_tensors(file, tensors)
    with pytest.raises(UsageError, match=r"^model.layers.0.mlp.up_proj: weights of up to .* beyond float16's range"):
        run(model, tmp_path / "out", method__name="rtn")


def edited(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run(tiny_model("llama", tmp_path), tmp_path / "out", method__name="rtn")
    return tmp_path / "out"


def both_refuse(folder: Path, message: str) -> None:
    """qcli's own reading and transformers' loading stop with the same kind of error."""
    with pytest.raises(QcliError, match=message):
        open_source(str(folder))
    with pytest.raises(VerificationError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_other_versions_are_refused(checkpoint: Path) -> None:
    edited(checkpoint, format_version=3)
    both_refuse(checkpoint, "version 3 is not supported")


def test_unknown_formats_are_refused(checkpoint: Path) -> None:
    layers = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["layers"]
    edited(checkpoint, layers=[{**layer, "format": "fractal"} for layer in layers])
    both_refuse(checkpoint, "unknown weight format 'fractal'")


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_missing_tensors_are_refused(checkpoint: Path, suffix: str) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.down_proj.{suffix}"]
    shards.write_tensors(file, tensors)
    both_refuse(checkpoint, rf"model.layers.1.mlp.down_proj.{suffix}")


def test_reshaped_and_surplus_tensors_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    shards.write_tensors(file, {**whole, name: whole[name].float()})
    both_refuse(checkpoint, name)
    shards.write_tensors(file, {**whole, "model.layers.0.input_layernorm.weight_packed": whole[name]})
    both_refuse(checkpoint, "input_layernorm.weight_packed belongs to no quantized layer")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "recipe.yaml", "tokenizer.json"])
def test_one_changed_byte_fails_verification(checkpoint: Path, name: str) -> None:
    verify(checkpoint)
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(VerificationError, match=name):
        verify(checkpoint)


def test_missing_dense_tensors_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    shards.write_tensors(file, tensors)
    with pytest.raises(VerificationError, match=r"model.norm.weight is missing"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": []}', "not json", '{"files": {"config.json": {}}}'])
def test_broken_manifests_are_refused(checkpoint: Path, manifest: str) -> None:
    (checkpoint / "qcli.manifest.json").write_text(manifest)
    with pytest.raises(VerificationError, match="is not a manifest"):
        verify(checkpoint)


def test_quantizing_twice_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="already quantized"):
        run(checkpoint, tmp_path / "twice", method__name="rtn", method__bits=2)


def test_overflowing_activations_are_refused(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= 2000
    shards.write_tensors(file, tensors)
    with pytest.raises(UsageError, match=r"inputs of mlp.down_proj are not finite"):
        run(model, tmp_path / "out", text, dtype="float16")
