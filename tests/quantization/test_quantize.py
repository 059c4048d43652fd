"""The main verb on tiny models of every family: the packed model, and what it loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.block_state import BlockState
from qcli.quantization.quantize import quantize
from qcli.quantization.sequential import Sequential
from qcli.recipe.load import load_recipe
from qcli.utils import shards
from tests.quantizing import TOKENS, logits, run, write_text
from tests.tiny import CONFIGS, VARIANTS, tiny_model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        *((name, {}) for name in CONFIGS),
        *((name, {"tie_word_embeddings": True}) for name in CONFIGS),
        *VARIANTS,
    ],
    ids=str,
)
def test_every_family_at_eight_bits(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """8-bit rtn stays close; from_pretrained, packed, equals the streamed fake-quantized model; reload is exact."""
    model, out = tiny_model(model_type, tmp_path, **overrides), tmp_path / "out"
    run(model, out, method__name="rtn", method__bits=8)
    packed, original = logits(out), logits(model)
    distance = (packed.log_softmax(-1) - original.log_softmax(-1)).abs().max()
    assert 0 < float(distance) < 0.25
    stream = ModelStream(open_source(str(out)), device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stream.logits_of(TOKENS), packed, rtol=1e-5, atol=1e-5)
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(again)
    assert torch.equal(logits(again), packed)
    assert verify(out).layers == len(open_source(str(out)).linears())


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "overrides"), [*((name, {}) for name in CONFIGS), *VARIANTS], ids=str)
def test_gptq_like_runs_on_every_family(model_type: str, overrides: dict[str, Any], tmp_path: Path, text: Path) -> None:
    model = tiny_model(model_type, tmp_path, **overrides)
    result = run(model, tmp_path / "out", text, method__bits=4)
    assert result.fallbacks == {}
    assert {layer.measure for layer in result.layers} == {"output"}
    assert max(layer.error for layer in result.layers) < 0.05
    assert float((logits(tmp_path / "out").log_softmax(-1) - logits(model).log_softmax(-1)).abs().mean()) < 0.5


def test_mixed_methods_and_dense_layers(tmp_path: Path, text: Path) -> None:
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"
    recipe = load_recipe(
        None,
        {"model": str(model), "calibration.data": str(text)}
        | {"calibration.samples": 4, "calibration.seq_len": 32, "method.group_size": 32},
        [
            "overrides=[{match: '*.0.self_attn.v_proj', dense: true},"
            " {match: '*.q_proj', method: {name: rtn, bits: 8}},"
            " {match: '*.1.mlp.*', method: {bits: 2, group_size: -1, symmetric: true}}]"
        ],
    )
    quantize(recipe, out)
    source = open_source(str(out))
    assert isinstance(source, NativeSource)
    assert "model.layers.0.self_attn.v_proj" not in source.quantized
    assert source.quantized["model.layers.1.self_attn.v_proj"].format.bits == 4
    assert source.quantized["model.layers.0.self_attn.q_proj"].format.bits == 8
    assert source.quantized["model.layers.1.mlp.up_proj"].format.bits == 2
    dense = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(load_file(out / "model.safetensors")[dense], load_file(model / "model.safetensors")[dense])
    assert bool(logits(out).isfinite().all())
    verify(out)


def test_ragged_tails_load_and_verify(tmp_path: Path, text: Path) -> None:
    model, out = tiny_model("llama", tmp_path, intermediate_size=172), tmp_path / "out"
    run(model, out, text, method__group_size=48, method__group_tail="ragged", method__bits=3)
    verify(out)
    assert bool(logits(out).isfinite().all())


def test_tiny_weights_are_reported(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-5
    shards.write_tensors(file, tensors)
    result = run(model, tmp_path / "out", method__name="rtn", method__bits=8)
    (note,) = result.fallbacks["model.layers.0.mlp.up_proj"]
    assert "too small for float16" in note


def test_nothing_runs_behind_the_last_quantized_block(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, load_block = tiny_model("llama", tmp_path), ModelStream.load_block
    loaded: list[int] = []

    def counted(stream: ModelStream, block: int) -> torch.nn.Module:
        loaded.append(block)
        return load_block(stream, block)

    monkeypatch.setattr(ModelStream, "load_block", counted)
    cases: tuple[dict[str, Any], ...] = ({}, {"refine__steps": 2})
    for refined in cases:
        loaded.clear()
        out = tmp_path / f"out-{len(refined)}"
        run(model, out, text, overrides=[{"match": "*.layers.1.*", "dense": True}], **refined)
        assert loaded == [0]
        assert verify(out).layers == 7


def test_dense_export_is_an_ordinary_model(tmp_path: Path) -> None:
    checkpoint = tmp_path / "out"
    run(tiny_model("llama", tmp_path), checkpoint, method__name="rtn")
    result = pack(checkpoint, tmp_path / "dense", format="dense", shard_size=100_000)
    assert result.files > 1
    assert result.max_logit_difference == 0
    assert result.bits_per_weight == 32
    verify(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(checkpoint), rtol=1e-5, atol=1e-5)


def test_the_vocabulary_is_freed_while_blocks_are_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    transform = Sequential.transform

    def watched(quantizer: Sequential, block: BlockState) -> None:
        model = quantizer.stream.model
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        seen.extend(weight.is_meta for end in ends for weight in end.parameters())
        transform(quantizer, block)

    monkeypatch.setattr(Sequential, "transform", watched)
    run(tiny_model("llama", tmp_path), tmp_path / "out", write_text(tmp_path), method__name="gptq-like")
    assert seen and all(seen)
