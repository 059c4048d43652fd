"""Models that other software quantized already: quantized again from their decoded weights, and said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qcli.cli.main import app
from qcli.export.pack import pack
from qcli.models.decoded import DecodedSource
from qcli.models.manifest import Manifest
from qcli.models.open import open_source
from qcli.utils.errors import UnsupportedError
from tests.quantizing import run, streamed
from tests.tiny import tiny_model

WEIGHTS = "model.safetensors"
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}


def with_config(folder: Path, **fields: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def in_fp8(folder: Path, out: Path) -> tuple[Path, Path]:
    """A model whose linear layers are fp8 with scales by block, and the same with the weights decoded by hand."""
    dense, quantized = {}, {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        dense[name] = quantized[name] = tensor.bfloat16()
        if "proj" in name:
            rows, columns = tensor.shape
            blocks = tensor.view(rows // 32, 32, columns // 32, 32)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            codes = (blocks / scale).to(torch.float8_e4m3fn)
            quantized[name] = codes.view(rows, columns)
            quantized[f"{name}_scale_inv"] = scale[:, 0, :, 0].clone()
            dense[name] = (codes.float() * scale).view(rows, columns).bfloat16()
    for target, tensors in ((out / "fp8", quantized), (out / "dense", dense)):
        target.mkdir()
        for file in folder.iterdir():
            if file.name != WEIGHTS:
                (target / file.name).write_bytes(file.read_bytes())
        save_file(tensors, target / WEIGHTS, {"format": "pt"})
        with_config(target, dtype="bfloat16")
    return with_config(out / "fp8", quantization_config=FP8), out / "dense"


def test_an_fp8_model_is_quantized_as_its_decoded_weights_are(tmp_path: Path) -> None:
    fp8, dense = in_fp8(tiny_model("llama", tmp_path), tmp_path)
    assert torch.equal(streamed(fp8), streamed(dense))
    result = run(fp8, tmp_path / "q", method__name="rtn")
    run(dense, tmp_path / "d", method__name="rtn")
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == (tmp_path / "d" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["quant_method"] == "qcli"
    assert result.to_json()["source_quantized_as"] == "fp8 in blocks of 32 x 32"
    assert Manifest.read(tmp_path / "q").source.quantized_as == "fp8 in blocks of 32 x 32"
    assert Manifest.read(tmp_path / "d").source.quantized_as is None
    pack(tmp_path / "q", tmp_path / "packed", format="dense", shard_size=10**9)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "quantized already (fp8 in blocks of 32 x 32)" in card


def test_layers_that_stay_dense_are_written_decoded(tmp_path: Path) -> None:
    fp8, dense = in_fp8(tiny_model("llama", tmp_path), tmp_path)
    dense_layer = [{"match": "*.o_proj", "dense": True}]
    run(fp8, tmp_path / "q", method__name="rtn", overrides=dense_layer)
    run(dense, tmp_path / "d", method__name="rtn", overrides=dense_layer)
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == (tmp_path / "d" / WEIGHTS).read_bytes()


def test_bits_are_those_stored(tmp_path: Path) -> None:
    fp8, _ = in_fp8(tiny_model("llama", tmp_path), tmp_path)
    source = open_source(str(fp8))
    assert source.linear_bits_per_weight() == 8 + 32 / 32**2
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.stored_as(name) == "fp8 in blocks of 32 x 32"
    assert source.tensors()[name].dtype == "BF16"


def test_the_plan_says_so(tmp_path: Path) -> None:
    fp8, dense = in_fp8(tiny_model("llama", tmp_path), tmp_path)
    flags = ["--dry-run", "--method", "rtn", "--group-size", "32"]
    shown = CliRunner().invoke(app, ["quantize", str(fp8), *flags]).output
    assert "quantized already (fp8 in blocks of 32 x 32), decoded as it is read" in " ".join(shown.split())
    assert "quantized already" not in CliRunner().invoke(app, ["quantize", str(dense), *flags]).output


def test_inspect_shows_any_model(tmp_path: Path) -> None:
    fp8, dense = in_fp8(tiny_model("llama", tmp_path), tmp_path)
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(fp8), "--json"]).output)
    assert shown["quantized_as"] == "fp8 in blocks of 32 x 32"
    assert shown["bits_per_weight"] == 8 + 32 / 32**2
    assert {layer["stored_as"] for layer in shown["layers"]} == {"fp8 in blocks of 32 x 32"}
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(dense), "--json"]).output)
    assert (shown["quantized_as"], shown["bits_per_weight"], len(shown["layers"])) == (None, 16, 14)
    table = CliRunner().invoke(app, ["inspect", str(fp8)]).output
    assert "quantized" in table and "256 tokens" in table
    run(dense, tmp_path / "q", method__name="rtn")
    (tmp_path / "q" / "qcli.manifest.json").unlink()
    refused = CliRunner().invoke(app, ["inspect", str(tmp_path / "q")])
    assert refused.exit_code == 2


@pytest.mark.parametrize(("format", "bits"), [("compressed-tensors", 3), ("gptq", 4)])
def test_what_qcli_packed_for_engines_is_read_without_its_manifest(format: str, bits: int, tmp_path: Path) -> None:
    run(tiny_model("llama", tmp_path), tmp_path / "q", method__name="rtn", method__bits=bits, method__symmetric=True)
    pack(tmp_path / "q", tmp_path / "packed", format=format, shard_size=10**9, allow_refused=True)
    packed = open_source(str(tmp_path / "packed"))
    (tmp_path / "packed" / "qcli.manifest.json").unlink()
    foreign = open_source(str(tmp_path / "packed"))
    assert isinstance(foreign, DecodedSource)
    names = [name for name in packed.tensors() if "proj" in name]
    expected, actual = packed.read(names), foreign.read(names)
    for name in names:
        assert torch.equal(actual[name].float(), expected[name].half().float())


def test_layers_that_are_stored_turned_are_refused(tmp_path: Path) -> None:
    model = with_config(tiny_model("gpt2", tmp_path), quantization_config=FP8)
    tensors = load_file(model / WEIGHTS)
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = tensors[name].to(torch.float8_e4m3fn), torch.ones(2, 8)
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"already quantized \(fp8\), which qcli does not read of a gpt2"):
        open_source(str(model))
