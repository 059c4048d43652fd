"""Names on disk and in the causal LM: checkpoints that transformers wrote, read and written again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qcli.models.derived import Derived, SourceTensor, read
from qcli.models.names import Names
from qcli.utils.errors import UsageError
from qcli.utils.safetensors import Extent, read_header

auto: Any = AutoModelForCausalLM
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "phimoe": {},
    "qwen3_moe": {"num_experts": 3},
    "gpt_oss": {},
    "llama4_text": {"intermediate_size_mlp": 24},
    "granitemoe": {},
    "gpt_neox": {},
    "olmo_hybrid": {
        **{
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "layer_types": ["linear_attention", "full_attention"],
    },
}
STACKED = ("gpt_oss", "llama4_text", "granitemoe")  # on disk


def random_model(model_type: str, **settings: Any) -> Any:
    """A model whose tensors all differ."""
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(model_type, **{**SMALL, **TYPES.get(model_type, {}), **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def names_of(model: Any) -> Names:
    with torch.device("meta"):
        return Names(type(model)(model.config))


def headers(folder: Path) -> dict[str, Extent]:
    return {name: extent for file in sorted(folder.glob("*.safetensors")) for name, extent in read_header(file).items()}


def values(tensors: dict[str, SourceTensor]) -> dict[str, Tensor]:
    return {name: read(tensor) for name, tensor in tensors.items()}


def with_own_experts(model: Any) -> dict[str, Tensor]:
    """The tensors of a model, with those of experts as each expert's forward pass uses them: `[out, in]`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        path, _, stack = name.rpartition(".")
        if not path.endswith(".experts"):
            tensors[name] = tensor
            continue
        bias = stack.endswith("_bias")
        if not bias and model.config.model_type in ("gpt_oss", "llama4_text"):
            tensor = tensor.transpose(1, 2)  # they multiply `x @ weight`
        part = "bias" if bias else "weight"
        for number, own in enumerate(tensor):
            if not stack.startswith("gate_up_proj"):
                tensors[f"{path}.{number}.{stack.removesuffix('_bias')}.{part}"] = own
            elif model.config.model_type == "gpt_oss":  # gate, up = gate_up[..., ::2], gate_up[..., 1::2]
                tensors[f"{path}.{number}.gate_proj.{part}"] = own[::2]
                tensors[f"{path}.{number}.up_proj.{part}"] = own[1::2]
            else:  # gate, up = gate_up.chunk(2)
                tensors[f"{path}.{number}.gate_proj.{part}"], tensors[f"{path}.{number}.up_proj.{part}"] = own.chunk(2)
    return tensors


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], besides: Iterable[str] = ()) -> None:
    assert actual.keys() == expected.keys() - set(besides)
    for name, tensor in actual.items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("model_type", TYPES)
def test_what_transformers_wrote_is_read_as_the_models_own_tensors(model_type: str, tmp_path: Path) -> None:
    model = random_model(model_type)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    found = names_of(model).in_model(headers(tmp_path))
    tied = [name for name in model.all_tied_weights_keys if name not in found]
    assert_equal(values(found), with_own_experts(model), tied)
    for name, tensor in found.items():
        assert tensor.stored.shape == read(tensor).shape, name


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in STACKED])
def test_what_is_written_under_names_on_disk_is_what_transformers_loads(model_type: str, tmp_path: Path) -> None:
    model = random_model(model_type)
    model.save_pretrained(tmp_path / "hub")
    names = names_of(model)
    found = values(names.in_model(headers(tmp_path / "hub")))
    written = {names.on_disk(name): tensor for name, tensor in found.items()}
    if model_type != "olmo_hybrid":  # stores three tensors where the model has one
        assert written.keys() == headers(tmp_path / "hub").keys()
    (tmp_path / "ours").mkdir()
    save_file(written, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path / "ours")
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))


def test_experts_of_the_hub_have_their_own_names_back(tmp_path: Path) -> None:
    names = names_of(random_model("mixtral"))
    expert = "model.layers.1.mlp.experts.2"
    hub = "model.layers.1.block_sparse_moe.experts.2"
    for projection, on_disk in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        for part in ("weight", "bias", "weight_packed", "weight_scale"):
            assert names.on_disk(f"{expert}.{projection}.{part}") == f"{hub}.{on_disk}.{part}"
            assert names.name_in_model(f"{hub}.{on_disk}.{part}") == f"{expert}.{projection}.{part}"


@pytest.mark.parametrize(("model_type", "name"), [("gpt_oss", "mlp"), ("llama4_text", "feed_forward")])
def test_experts_that_the_hub_stores_together_keep_their_names(model_type: str, name: str) -> None:
    names = names_of(random_model(model_type))
    expert = f"model.layers.1.{name}.experts.2.gate_proj.weight_packed"
    assert names.on_disk(expert) == names.name_in_model(expert) == expert


@pytest.mark.parametrize("model_type", STACKED)
def test_stacks_are_put_together_as_transformers_stores_them(model_type: str, tmp_path: Path) -> None:
    model = random_model(model_type)
    model.save_pretrained(tmp_path)
    names = names_of(model)
    found = names.in_model(headers(tmp_path))
    written: dict[str, Tensor] = {}
    for name in found:
        if (stack := names.stack_of(name)) is None:
            written[names.on_disk(name)] = read(found[name])
        elif name == names.members(stack)[0]:
            written[names.on_disk(stack)] = names.stacked(stack, lambda own: read(found[own]))
    assert_equal(written, load_file(tmp_path / "model.safetensors"))


def test_experts_with_names_of_their_own_are_no_stacks() -> None:
    names = names_of(random_model("mixtral"))
    assert names.stack_of("model.layers.1.mlp.experts.2.gate_proj.weight") is None


def test_one_expert_is_read_without_the_others(tmp_path: Path) -> None:
    model = random_model("llama4_text")
    model.save_pretrained(tmp_path)
    found = names_of(model).in_model(headers(tmp_path))
    gate = found["model.layers.0.feed_forward.experts.1.gate_proj.weight"]
    assert isinstance(gate, Derived)
    whole = headers(tmp_path)["model.layers.0.feed_forward.experts.gate_up_proj"]
    [origin] = gate.origins
    assert (origin.start, origin.bytes) == (whole.start + whole.bytes // 3, whole.bytes // 3)
    assert gate.bytes == whole.bytes // 6
    assert gate.stored_as == "F32"


def test_rows_that_lie_together_in_the_file_stay_stored_tensors(tmp_path: Path) -> None:
    model = random_model("granitemoe")
    model.save_pretrained(tmp_path)
    found = names_of(model).in_model(headers(tmp_path))
    assert all(isinstance(tensor, Extent) for tensor in found.values())


def test_a_stack_that_is_turned_on_disk_is_turned_expert_by_expert(tmp_path: Path) -> None:
    model = vision_model()
    model.save_pretrained(tmp_path)
    found = names_of(model).in_model(headers(tmp_path))
    expected = with_own_experts(model)
    path = "model.language_model.layers.0.mlp.experts.1.up_proj.weight"
    assert torch.equal(read(found[path]), expected[path])
    turned = load_file(tmp_path / "model.safetensors")
    for name in turned:
        if name.endswith(("gate_up_proj", "down_proj")) and turned[name].ndim == 3:
            turned[name] = turned[name].transpose(1, 2).contiguous()  # as the hub has them
    save_file(turned, tmp_path / "model.safetensors", {"format": "pt"})
    from_hub = names_of(model).in_model(headers(tmp_path))[path]
    assert torch.equal(read(from_hub), expected[path])
    assert isinstance(from_hub, Derived)
    assert from_hub.bytes == 24 * 16 * 4


def vision_model() -> Any:
    """A Qwen3-VL-MoE model, whose stacks of experts on the hub are turned."""
    from transformers import AutoModelForImageTextToText

    vision: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_vl_moe", text_config={**SMALL, "num_experts": 3}, vision_config=vision)
    image_text: Any = AutoModelForImageTextToText
    return image_text.from_config(config)


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    model = random_model("mixtral")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.gate.weight"] = stored["model.layers.0.block_sparse_moe.gate.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"holds model.layers.0.mlp.gate.weight twice, under an old and a new name"):
        names_of(model).in_model(headers(tmp_path))


def test_an_expert_that_is_missing_is_missed(tmp_path: Path) -> None:
    model = random_model("mixtral")
    model.save_pretrained(tmp_path)
    stored = headers(tmp_path)
    del stored["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    found = names_of(model).in_model(stored)
    assert "model.layers.0.mlp.experts.1.up_proj.weight" not in found
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in found


def test_what_transformers_does_not_load_is_ignored(tmp_path: Path) -> None:
    model = random_model("mixtral")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["mtp.layers.0.weight"] = torch.zeros(2, 2)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    skeleton._keys_to_ignore_on_load_unexpected = [r"^mtp\."]
    names = Names(skeleton)
    assert "mtp.layers.0.weight" not in names.in_model(headers(tmp_path))
    assert names.ignored == ["mtp.layers.0.weight"]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixtral"
