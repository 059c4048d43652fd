"""Checkpoints whose layers have a low-rank term: loading, exporting, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qcli.algorithms.solvers.low_rank import fit_factors
from qcli.core.activations import Activations
from qcli.core.formats.low_rank import FactorBits, LowRank
from qcli.export.inspect import inspect
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models.manifest import RECIPE, Manifest
from qcli.models.native import NativeSource, quantization_config
from qcli.models.open import open_source
from qcli.models.quantized import stored_tensors
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from qcli.utils import shards
from qcli.utils.errors import UnsupportedError, VerificationError
from qcli.utils.files import write_json
from tests.quantizing import logits, streamed
from tests.tiny import tiny_model


def low_rank_checkpoint(tmp_path: Path, bits: FactorBits = 8, activations: Activations | None = None) -> Path:
    """An rtn checkpoint of a tiny Llama: k_proj dense, up_proj without, all other linears with a low-rank term."""
    model, bare, out = tiny_model("llama", tmp_path), tmp_path / "bare", tmp_path / "out"
    recipe = load_recipe(
        None,
        {"model": str(model), "method.name": "rtn", "method.bits": 3, "method.group_size": 32},
        ["overrides=[{match: '*.k_proj', dense: true}]"],
    )
    quantize(recipe, bare)
    original, source = open_source(str(model)), open_source(str(bare))
    assert isinstance(source, NativeSource)
    formats: dict[str, Any] = dict.fromkeys(layer.name for layer in source.linears())
    tensors = {name: source.read([name])[name] for name in source.tensors()}
    for layer, storage in source.quantized.items():
        weight, dense = source.read_quantized(layer), original.read([f"{layer}.weight"])[f"{layer}.weight"]
        if not layer.endswith("up_proj"):
            format = LowRank.around(storage.format, 4, bits)
            weight = format.wrap(weight, fit_factors(dense - weight.dense(), None, format))
        formats[layer] = weight.format
        del tensors[f"{layer}.weight"]
        tensors |= stored_tensors(layer, weight)
    out.mkdir()
    config = quantization_config(source.linears(), formats, activations)
    tensors[config["guard"]] = torch.empty(0, dtype=torch.uint8)
    shards.write_tensors(out / "model.safetensors", tensors)
    write_json(out / "config.json", source.config | {"quantization_config": config})
    source.copy_companions(out)
    (out / RECIPE).write_bytes((bare / RECIPE).read_bytes())
    size = {"bits_per_weight": open_source(str(out)).bits_per_weight()}
    Manifest.read(bare).model_copy(update=size).write(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("activations", [None, Activations(bits=6)], ids=["W", "WA"])
@pytest.mark.usefixtures("exact_layers")
def test_checkpoints_load_and_survive_saving(bits: FactorBits, activations: Activations | None, tmp_path: Path) -> None:
    out = low_rank_checkpoint(tmp_path, bits, activations)
    outputs = logits(out)
    torch.testing.assert_close(streamed(out), outputs, rtol=1e-4, atol=1e-4)
    if activations is None:
        expected = logits(tmp_path / "llama-0")
        without = logits(tmp_path / "bare")
        assert float((outputs - expected).square().mean()) < 0.9 * float((without - expected).square().mean())
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), outputs)
    assert verify(out).layers == 12
    inspection = inspect(out)
    assert inspection.activations == (None if activations is None else activations.spec())
    rows = {row["name"].rpartition(".")[2]: row for row in inspection.layers}
    assert rows["q_proj"]["base"] == {"format": "affine", "bits": 3, "group_size": 32, "zero_point": "integer"}
    assert (rows["q_proj"]["format"], rows["up_proj"]["format"], rows["k_proj"]["format"]) == (
        "low-rank",
        "affine",
        None,
    )


def test_checkpoints_are_exported(tmp_path: Path) -> None:
    out = low_rank_checkpoint(tmp_path)
    result = pack(out, tmp_path / "packed", format="qcli", shard_size=100_000)
    assert result.files > 1
    assert result.max_logit_difference == 0
    assert result.bits_per_weight == open_source(str(out)).bits_per_weight()
    pack(out, tmp_path / "dense", format="dense", shard_size=10**9)
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(out), rtol=1e-4, atol=1e-4)


def test_dense_export_refuses_quantized_activations(tmp_path: Path) -> None:
    out = low_rank_checkpoint(tmp_path, activations=Activations())
    assert pack(out, tmp_path / "packed", format="qcli", shard_size=10**9).max_logit_difference == 0
    with pytest.raises(UnsupportedError, match="quantizes activations to 8 bits, which a dense model cannot"):
        pack(out, tmp_path / "dense", format="dense", shard_size=10**9)
    assert not list(tmp_path.glob("dense*"))


Q, UP, K = (f"model.layers.1.{path}" for path in ("self_attn.q_proj", "mlp.up_proj", "self_attn.k_proj"))


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (lambda tensors: tensors.pop(f"{Q}.lowrank_b"), f"{Q}.lowrank_b"),
        (lambda tensors: tensors.pop(f"{Q}.lowrank_a_scale"), f"{Q}.lowrank_a_scale"),
        (lambda tensors: tensors.update({f"{Q}.lowrank_a": tensors[f"{Q}.lowrank_a"].half()}), f"{Q}.lowrank_a"),
        (lambda tensors: tensors.update({f"{Q}.lowrank_a": tensors[f"{Q}.lowrank_a"][:, :3]}), f"{Q}.lowrank_a"),
        (
            lambda tensors: tensors.update({f"{UP}.lowrank_a": torch.zeros(2)}),
            f"{UP}.lowrank_a belongs to no quantized layer",
        ),
        (
            lambda tensors: tensors.update({f"{K}.lowrank_b": torch.zeros(2)}),
            f"{K}.lowrank_b belongs to no quantized layer",
        ),
    ],
    ids=["missing", "no-scale", "dtype", "shape", "surplus", "surplus-at-dense"],
)
def test_tampered_checkpoints_are_refused(
    tamper: Callable[[dict[str, Tensor]], Any], problem: str, tmp_path: Path
) -> None:
    out = low_rank_checkpoint(tmp_path)
    tensors = load_file(out / "model.safetensors")
    tamper(tensors)
    shards.write_tensors(out / "model.safetensors", {name: t.contiguous() for name, t in tensors.items()})
    with pytest.raises(VerificationError, match=problem):
        open_source(str(out))
    with pytest.raises(VerificationError, match=problem):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_layer_cannot_have_both_codes_and_a_dense_weight(tmp_path: Path) -> None:
    out = low_rank_checkpoint(tmp_path)
    tensors = load_file(out / "model.safetensors")
    shards.write_tensors(out / "model.safetensors", tensors | {f"{Q}.weight": torch.zeros(64, 64)})
    with pytest.raises(VerificationError, match=f"{Q} has a dense weight"):
        open_source(str(out))
    with pytest.raises(VerificationError, match=f"{Q}.weight belongs to no quantized layer"):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"activations": {"bits": 3}}, "activations.bits"),
        ({"activations": {"bits": 8, "static": True}}, "activations.static"),
        ({"activations": None}, "activations: "),
        ({"inputs": 8}, "unknown: inputs"),
    ],
    ids=str,
)
def test_unknown_or_invalid_config_entries_are_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    out = low_rank_checkpoint(tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=problem):
        open_source(str(out))
    with pytest.raises(VerificationError, match=problem):
        AutoModelForCausalLM.from_pretrained(out)
