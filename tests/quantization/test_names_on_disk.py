"""A checkpoint's tensors have the names that the hub's have, where the model's own differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qcli.cli.main import app
from qcli.export.pack import pack
from qcli.models.open import open_source
from qcli.utils.safetensors import read_header
from tests.models.test_names import random_model
from tests.quantizing import logits, run, streamed
from tests.tiny import tiny_model, tiny_tokenizer

NAMES = {
    "gpt_neox": ("embed_out.weight", "gpt_neox.layers.1.attention.dense.weight_packed"),
    "gemma3": (
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.o_proj.weight_packed",
    ),
}


def on_disk(folder: Path) -> list[str]:
    return [name for file in folder.glob("*.safetensors") for name in read_header(file)]


@pytest.mark.parametrize("model_type", NAMES)
def test_names_are_those_of_the_hub_and_every_loader_finds_them(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, tmp_path)
    result = run(model, tmp_path / "q", method__name="rtn")
    names = on_disk(tmp_path / "q")
    assert {*NAMES[model_type]} <= {*names}
    dense, source = {*on_disk(model)}, open_source(str(model))
    assert {name for name in names if name.endswith((".weight", ".bias"))} <= dense
    assert (tmp_path / "q" / "model.safetensors").stat().st_size == result.plan.bytes
    assert not [name for name in names if name.startswith("lm_head")], names
    reopened = open_source(str(tmp_path / "q"))
    assert reopened.tensors().keys() == source.tensors().keys()
    torch.testing.assert_close(logits(tmp_path / "q"), streamed(tmp_path / "q"), rtol=1e-4, atol=1e-4)


def test_what_transformers_joins_is_apart_again(tmp_path: Path) -> None:
    """Kernels of queries, keys and values, which it loads as one."""
    model = tiny_model("olmo_hybrid", tmp_path)
    kernels = {name for name in on_disk(model) if "conv1d" in name}
    assert len(kernels) == 3
    result = run(model, tmp_path / "q", method__name="rtn")
    assert (tmp_path / "q" / "model.safetensors").stat().st_size == result.plan.bytes
    for format in ("qcli", "dense"):
        pack(tmp_path / "q", tmp_path / format, format=format, shard_size=10**9)
    before = load_file(model / "model.safetensors")
    for folder in ("q", "qcli", "dense"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert {name for name in after if "conv1d" in name} == kernels
        assert all(torch.equal(after[name], before[name]) for name in kernels)
        torch.testing.assert_close(logits(tmp_path / folder), streamed(tmp_path / "q"), rtol=1e-4, atol=1e-4)


def test_dense_experts_are_stacks_again_where_the_hub_has_stacks(tmp_path: Path) -> None:
    random_model("gpt_oss", vocab_size=320).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "q", grouped=False, method__name="rtn", method__group_size=8)
    pack(tmp_path / "q", tmp_path / "dense", format="dense", shard_size=10**9)
    assert {*on_disk(tmp_path / "dense")} == {*on_disk(tmp_path / "model")}
    auto: Any = AutoModelForCausalLM
    _, info = auto.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_plan_names_what_transformers_does_not_load(tmp_path: Path) -> None:
    """Heads that predict several tokens are on the hub, and not in transformers' model."""
    model = random_model("ernie4_5_moe", vocab_size=320, moe_num_experts=3)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {"model.mtp_block.0.mlp.up_proj.weight": torch.zeros(8, 8)}, file, {"format": "pt"})
    flags = ["--dry-run", "--method", "rtn", "--group-size", "8"]
    command = ["quantize", str(tmp_path / "model"), *flags]
    plan = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert plan["left_out"] == ["model.mtp_block.0.mlp.up_proj.weight"]
    shown = " ".join(CliRunner().invoke(app, command).output.split())
    assert "1 tensors that transformers does not load, such as model.mtp_block.0.mlp.up_proj.weight" in shown


@pytest.mark.parametrize("format", ["qcli", "dense", "compressed-tensors"])
def test_packed_checkpoints_have_them_too(format: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"method__symmetric": True} if format == "compressed-tensors" else {}
    run(tiny_model("gpt_neox", tmp_path), tmp_path / "q", method__name="rtn", **flags)
    pack(tmp_path / "q", tmp_path / "packed", format=format, shard_size=10**9, allow_refused=True)
    assert "embed_out.weight" in on_disk(tmp_path / "packed")
    assert "lm_head.weight" not in on_disk(tmp_path / "packed")
