"""The structure that is discovered: it agrees with every row of the table, and reads models that have none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from qcli.models import families
from qcli.models.discovery import discover
from qcli.models.listed_experts import ListedExperts, list_experts
from qcli.models.loadable import quantizable_skeleton, skeleton
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.folding import channel_scales
from qcli.utils.errors import UnsupportedError
from tests.tiny import CONFIGS, VARIANTS, WITHOUT_ROW, tiny_config, tiny_model


def discovered(config: Any) -> families.Family:
    return discover(quantizable_skeleton(config, trust_remote_code=False).eval(), config.model_type)


@pytest.mark.parametrize(
    ("model_type", "overrides"), [*((name, {}) for name in (*CONFIGS, "gemma3")), *VARIANTS], ids=str
)
def test_discovery_finds_what_every_row_says(model_type: str, overrides: dict[str, Any]) -> None:
    config = tiny_config(model_type, **overrides)
    row, found = families.family(config.to_dict()), discovered(config)
    assert found.blocks == row.blocks
    assert found.embedding == row.embedding
    assert found.dense_parts == row.dense_parts
    assert (found.tuple_output, found.conv1d, found.own_linear) == (row.tuple_output, row.conv1d, row.own_linear)
    groups = row.groups
    if overrides.get("apply_residual_connection_post_layernorm"):  # more than the row says: what the stream is read by
        residuals = {"self_attention.dense": "self_attention.query_key_value", "mlp.dense_4h_to_h": "mlp.dense_h_to_4h"}
        groups = tuple(replace(group, residual=residuals.get(group.linears[0])) for group in groups)
    assert found.groups_by_block == (groups,) * config.get_text_config().num_hidden_layers


@pytest.mark.parametrize(
    ("model_type", "overrides"), [*((name, {}) for name in (*CONFIGS, "gemma3")), *VARIANTS], ids=str
)
def test_discovery_finds_the_folds_of_every_row(model_type: str, overrides: dict[str, Any]) -> None:
    """Producers, readers, channels and offsets of norms. Only Falcon's values are not found: its code chooses them by a
    list of indices, which has no values on the meta device."""
    config = tiny_config(model_type, **overrides)
    row, found = families.family(config.to_dict()), discovered(config)
    skipped = {"self_attention.query_key_value"} if model_type == "falcon" else set()
    for index, block in enumerate(skeleton(config, trust_remote_code=False).get_submodule(row.blocks)):
        expected, scales = (
            {scale.producer: scale for scale in channel_scales(block.to_empty(device="cpu"), folds, config)}
            for folds in (row.folds_of(index), found.folds_of(index))
        )
        assert scales.keys() == expected.keys() - skipped
        for producer, scale in scales.items():
            other = expected[producer]
            assert set(scale.readers) == set(other.readers) and scale.size == other.size and not scale.dense
            assert torch.equal(scale.outputs, other.outputs) and torch.equal(scale.inputs, other.inputs)
            if block.get_parameter(f"{producer}.weight").ndim == 1:
                assert scale.norm_offset == other.norm_offset


def test_a_scaled_output_joins_no_stream() -> None:
    for group in discovered(tiny_config("granite")).groups_of(0):
        assert group.residual is None


def test_blocks_are_described_one_by_one() -> None:
    found = discovered(tiny_config("qwen3_5_text"))
    assert found.groups_of(0)[-3].linears == ("linear_attn.out_proj",)
    assert found.groups_of(1)[-3].linears == ("self_attn.o_proj",)
    assert found.groups_of(1)[-3].residual == "input_layernorm"


def test_experts_have_sets_of_their_own_and_routers_stay_dense() -> None:
    *_, gate_up, down = discovered(tiny_config("qwen3_moe")).groups_of(1)
    assert gate_up.sets[3] == ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")
    assert down.sets[3] == ("mlp.experts.3.down_proj",)
    assert len(gate_up.sets) == len(down.sets) == 4
    assert not any("gate.weight" in path for path in discovered(tiny_config("qwen3_moe")).paths_of(1))


def test_a_router_that_is_a_linear_stays_dense_whatever_its_size() -> None:
    """One that is large enough to be quantized, and is called as any linear layer."""
    mixture = {"enable_moe_block": True, "num_experts": 32, "top_k_experts": 2, "moe_intermediate_size": 64}
    config = tiny_config("gemma4_text", hidden_size_per_layer_input=48, **mixture)
    block = quantizable_skeleton(config, trust_remote_code=False).get_submodule("model.layers.1")
    assert block.get_submodule("router.proj").out_features == 32
    paths = discovered(config).paths_of(1)
    assert "router.proj" not in paths
    assert {"per_layer_input_gate", "experts.31.gate_proj"} <= set(paths)


def test_a_linear_with_as_many_outputs_as_there_are_experts_is_no_router() -> None:
    config = tiny_config("mixtral", num_local_experts=32, num_key_value_heads=2, head_dim=16)
    beside = [path for path in discovered(config).paths_of(1) if ".experts." not in path]
    assert beside == [f"self_attn.{name}_proj" for name in "qkvo"]


def test_a_chain_of_projections_is_read_up_to_the_one_that_leads_out() -> None:
    groups = discovered(tiny_config("deepseek_v3")).groups_of(0)
    number = {path: at for at, group in enumerate(groups) for path in group.linears}
    assert groups[number["self_attn.q_a_proj"]].last_reader == number["self_attn.o_proj"]
    assert groups[number["self_attn.q_b_proj"]].last_reader == number["self_attn.o_proj"]
    assert groups[number["self_attn.o_proj"]].leads_out


@pytest.mark.parametrize("model_type", sorted(WITHOUT_ROW))
def test_a_model_without_a_row_is_read(model_type: str, tmp_path: Path) -> None:
    source = open_source(str(tiny_model(model_type, tmp_path)))
    linears = source.linears()
    assert {linear.block for linear in linears} == {0, 1}
    stored = source.tensors()
    assert all(stored[f"{linear.name}.weight"].shape == linear.shape for linear in linears)


def test_a_type_that_transformers_does_not_know_names_the_version_that_does(tmp_path: Path) -> None:
    folder = tiny_model("granite", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "later", "transformers_version": "9.1.0"}))
    with pytest.raises(UnsupportedError, match="does not know model type 'later'") as raised:
        open_source(str(folder))
    assert raised.value.hint is not None and "9.1.0" in raised.value.hint


def test_what_is_no_language_model_by_itself_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = tiny_model("granite", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GraniteForSequenceClassification"]}))
    with pytest.raises(UnsupportedError, match="GraniteForSequenceClassification has no head that predicts tokens"):
        open_source(str(folder))
    for model_type, message in {
        "mllama_text_model": "AutoModelForCausalLM of transformers does not load it",
        "shieldgemma2": "ShieldGemma2ForImageClassification has no head that predicts tokens",
    }.items():
        with pytest.raises(UnsupportedError, match=f"{model_type!r}: {message}"):
            skeleton(AutoConfig.for_model(model_type), trust_remote_code=False)


def test_a_forward_pass_that_needs_values_is_refused() -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "kv_channels": 16, "intermediate_size": 64, "vocab_size": 320}
    config = AutoConfig.for_model("jetmoe", **small, num_key_value_heads=2)
    with pytest.raises(UnsupportedError, match="'jetmoe': its forward pass depends on values"):
        discover(quantizable_skeleton(config, trust_remote_code=False).eval(), "jetmoe")


def test_a_model_without_blocks_is_refused() -> None:
    class NoBlocks(nn.Module):
        _no_split_modules = None

        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Sequential(nn.Linear(4, 4))

    with pytest.raises(UnsupportedError, match="model type 'flat' has no list of blocks"):
        discover(NoBlocks(), "flat")  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("every_token", [False, True])
def test_listed_experts_compute_what_fused_ones_do(model_type: str, every_token: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(model_type, tmp_path)
    fused = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    listed = skeleton(fused.config, trust_remote_code=False)
    list_experts(listed)
    source = open_source(str(folder))
    listed.load_state_dict(source.read(source.tensors()), strict=False, assign=True)
    lists = {path: module for path, module in listed.named_modules() if isinstance(module, ListedExperts)}
    assert lists
    for path, module in lists.items():
        module.every_token = every_token
        caught: list[Any] = []
        own = fused.get_submodule(path)
        handle = own.register_forward_hook(lambda _, args, output, caught=caught: caught.append((args, output)))
        with torch.no_grad():
            fused(torch.arange(3, 51)[None])
            handle.remove()
            args, output = caught[0]
            torch.testing.assert_close(module(*args), output, rtol=1e-4, atol=1e-5)


def test_a_token_may_choose_an_expert_twice(tmp_path: Path) -> None:
    source = open_source(str(tiny_model("qwen3_moe", tmp_path)))
    listed = ModelStream(source, device=torch.device("cpu"), dtype=torch.float32).load_block(0)
    experts = listed.get_submodule("mlp.experts")
    assert isinstance(experts, ListedExperts)
    hidden, twice = torch.randn(3, 64), torch.tensor([[1, 1], [0, 1], [2, 2]])
    weights = torch.rand(3, 2)
    with torch.no_grad():
        torch.testing.assert_close(experts(hidden, twice, weights), experts.fused()(hidden, twice, weights))


def test_linears_that_blocks_share_stay_dense(tmp_path: Path) -> None:
    found = open_source(str(tiny_model("zamba", tmp_path)))
    paths = {linear.path for linear in found.linears()}
    assert "mamba_decoder.mamba.in_proj" in paths
    assert not any(path.startswith("shared_transf") for path in paths)


def test_experts_without_weights(tmp_path: Path) -> None:
    """A router may choose them; they give what they get, and the weights that files have for them are not used."""
    source = open_source(str(tiny_model("longcat_flash", tmp_path)))
    experts = {linear.name.split(".")[5] for linear in source.linears() if ".experts." in linear.name}
    assert experts == {"0", "1", "2", "3"}
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" in source.left_out
