"""GGUF files of mixtures of experts: transformers and qcli read what was written, or it is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from qcli.export.gguf import metadata
from qcli.export.pack import pack
from qcli.export.result import PackResult
from qcli.models.open import open_source
from qcli.utils.errors import UnsupportedError, UsageError
from tests.quantizing import TOKENS, run, streamed
from tests.tiny import tiny_config, tiny_model, with_merge

# As llama.cpp routes, and with the sizes that transformers expects of a file, which it does not read there.
AS_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "dots1": {},
    "glm4_moe": {},
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 768},
}
SMALL = {"norm_topk_prob": True}


def packed(folder: Path, model: Path, requantize: str | None = None, **flags: Any) -> PackResult:
    run(with_merge(model), folder / "native", **{"method__name": "rtn", **flags})
    return pack(folder / "native", folder / "packed", format="gguf", shard_size=10**9, requantize=requantize)


def in_file(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", AS_LLAMA_CPP)
def test_experts_are_read_back(model_type: str, tmp_path: Path) -> None:
    result = packed(tmp_path, tiny_model(model_type, tmp_path, **AS_LLAMA_CPP[model_type]), method__symmetric=True)
    assert result.max_logit_difference == 0
    assert (result.bits_per_weight, result.rounded) == (4.5, 0)
    stored = in_file(tmp_path / "packed")
    for projection in ("gate", "up", "down"):
        experts = stored[f"blk.1.ffn_{projection}_exps.weight"]
        assert experts.tensor_type.name == "Q4_0" and experts.shape[2] == 4
    assert stored["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_transformers_and_qcli_compute_the_same_from_the_file_alone(model_type: str, tmp_path: Path) -> None:
    packed(tmp_path, tiny_model(model_type, tmp_path, **AS_LLAMA_CPP[model_type]))
    expected = streamed(tmp_path / "native")
    (tmp_path / "alone").mkdir()
    file = (tmp_path / "packed" / "model.gguf").rename(tmp_path / "alone" / "model.gguf")
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, expected, atol=1e-4)
    assert torch.equal(streamed(file), expected)
    source = open_source(str(file))
    assert source.hf_config().moe_intermediate_size == AS_LLAMA_CPP[model_type]["moe_intermediate_size"]


def test_a_file_can_be_quantized(tmp_path: Path) -> None:
    packed(tmp_path, tiny_model("qwen3_moe", tmp_path, **SMALL))
    file = (tmp_path / "packed" / "model.gguf").rename(tmp_path / "model.gguf")
    again = run(file, tmp_path / "again", method__name="rtn", method__bits=8)
    assert len(again.layers) == 2 * (4 + 4 * 3)
    difference = (streamed(tmp_path / "again") - streamed(tmp_path / "native")).abs()
    assert 0 < difference.median() < 0.02  # a token in a thousand gets another expert


def test_experts_in_several_formats_share_the_type_that_holds_all(tmp_path: Path) -> None:
    overrides = [{"match": "*.experts.2.up_proj", "method": {"name": "rtn", "bits": 8, "symmetric": True}}]
    result = packed(tmp_path, tiny_model("qwen3_moe", tmp_path, **SMALL), method__symmetric=True, overrides=overrides)
    assert result.rounded == 0
    types = {name: tensor.tensor_type.name for name, tensor in in_file(tmp_path / "packed").items()}
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate_exps.weight"] == "Q4_0"


def test_a_dense_expert_beside_quantized_ones_is_refused_or_rounded(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tmp_path, **SMALL)
    overrides = [{"match": "*.0.mlp.experts.2.up_proj", "dense": True}]
    with pytest.raises(UnsupportedError, match=r"0\.mlp\.experts\.2\.up_proj is dense, other experts") as raised:
        packed(tmp_path, model, overrides=overrides)
    assert raised.value.hint is not None and raised.value.hint.endswith("--requantize Q8_0")
    result = pack(tmp_path / "native", tmp_path / "packed", format="gguf", shard_size=10**9, requantize="Q8_0")
    assert result.rounded == 4


def test_dense_experts_keep_their_dtype(tmp_path: Path) -> None:
    overrides = [{"match": "*.experts.*", "dense": True}]
    result = packed(tmp_path, tiny_model("qwen3_moe", tmp_path, **SMALL), overrides=overrides)
    assert result.max_logit_difference == 0
    assert in_file(tmp_path / "packed")["blk.0.ffn_up_exps.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("qwen3_moe", {}, "norm_topk_prob False of qwen3_moe"),
        ("qwen3_moe", {**SMALL, "mlp_only_layers": [0]}, r"mlp_only_layers \[0\] of qwen3_moe"),
        ("qwen3_moe", {**SMALL, "attention_bias": True}, "attention_bias True of qwen3_moe"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True of qwen2_moe"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "tie_word_embeddings True of qwen2_moe"),
        ("glm4_moe", {"n_group": 2}, "n_group 2 of glm4_moe"),
        ("dots1", {"num_key_value_heads": 2}, "dots1 with fewer heads of keys than of queries"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "part",
        ),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 of olmoe"),
        ("olmoe", {"num_key_value_heads": 2}, "olmoe with fewer heads of keys than of queries"),
        ("mixtral", {"hidden_act": "gelu"}, "gelu as the MLP's activation"),
        ("gpt_oss", {}, "gpt_oss is not among"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(model_type: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        metadata.architecture(tiny_config(model_type, **config))


def test_a_package_that_does_not_know_the_architecture_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {key: name for key, name in gguf.MODEL_ARCH_NAMES.items() if name != "qwen3moe"}
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", names)
    with pytest.raises(UnsupportedError, match="the installed package gguf does not know llama.cpp's qwen3moe"):
        packed(tmp_path, tiny_model("qwen3_moe", tmp_path, **SMALL))


def test_mixtrals_window_limits_the_context() -> None:
    config = tiny_config("mixtral", sliding_window=48)
    assert metadata._context(config, metadata.architecture(config)) == 48


def test_a_file_with_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    packed(tmp_path, tiny_model("qwen3_moe", tmp_path, **SMALL))
    file = tmp_path / "packed" / "model.gguf"
    data = file.read_bytes()
    key = b"qwen3moe.expert_count\x04\x00\x00\x00"
    at = data.index(key) + len(key)
    file.write_bytes(data[:at] + b"\x03" + data[at + 1 :])
    alone = file.rename(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match=r"blk\.0\.ffn_gate_exps\.weight is not of 3 experts"):
        open_source(str(alone))
