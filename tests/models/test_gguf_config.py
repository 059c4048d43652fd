"""Settings in GGUF files: what transformers' reader drops is read, and what the model cannot compute is refused.

Files are written as llama.cpp's converter writes them. Where transformers reads all of a file, its logits are the
reference; elsewhere those of the model that the file was made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qcli.evaluation.tasks import _load
from qcli.models import gguf_config
from qcli.models.open import open_source
from qcli.models.source import ModelSource
from qcli.models.stream import ModelStream
from qcli.utils.errors import QcliError, UnsupportedError, UsageError
from tests.quantizing import run
from tests.tiny import tiny_model

TOKENS = torch.randint(3, 250, (2, 48), generator=torch.Generator().manual_seed(1))
THETA = {"rope_theta": 10000.0}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.5 + i for i in range(8)]


def logits(source: ModelSource) -> torch.Tensor:
    with torch.no_grad():
        return ModelStream(source, device=torch.device("cpu"), dtype=torch.float32).logits_of(TOKENS)


def write(
    folder: Path,
    model_type: str,
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> tuple[Path, Path]:
    """A tiny model as a folder, and as a GGUF file with the settings that every converter writes, and these."""
    model = tiny_model(model_type, folder, **(config or {}))
    source = open_source(str(model))
    hf: Any = source.hf_config()
    architecture = ARCHITECTURES.get(model_type, model_type)
    file = folder / "model.gguf"
    writer: Any = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(hf.max_position_embeddings)
    writer.add_embedding_length(hf.hidden_size)
    writer.add_block_count(hf.num_hidden_layers)
    writer.add_feed_forward_length(hf.intermediate_size)
    writer.add_head_count(hf.num_attention_heads)
    writer.add_head_count_kv(hf.num_key_value_heads)
    if model_type == "stablelm":
        writer.add_layer_norm_eps(hf.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
    given = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    for key, value in (given | {f"{architecture}.{k}": v for k, v in (settings or {}).items() if ":" not in k}).items():
        add(writer, key, value)
    for key, value in (settings or {}).items():
        if key.startswith(":"):
            add(writer, key[1:], value)
    vocabulary(writer)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], 8)
    for name, tensor in source.read(source.tensors()).items():
        weight = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = hf.num_attention_heads if "q_proj" in name else hf.num_key_value_heads
            halves = weight.reshape(heads, 2, -1, weight.shape[1])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        if "gemma" in model_type and name.endswith("norm.weight"):
            weight = weight + 1
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, file


def add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def vocabulary(writer: Any) -> None:
    tokens = ["<s>", "</s>", "<pad>", "t", "1", *(f"t{i}" for i in range(315))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges(["t 1"])


def llama3(**rope: Any) -> dict[str, Any]:
    """The tensor that llama.cpp divides rotary frequencies by."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={**THETA, "rope_type": "llama3", **rope}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    return {"rope_freqs.weight": (plain / scaled).tolist()}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 8.0, "attention_factor": 1.2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
LINEAR_KEYS = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
SIXTEEN = {"attention.key_length": 16, "attention.value_length": 16}
SIX = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "linear": ("llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}}, LINEAR_KEYS, {}),
    "linear without its type": (
        "qwen2",
        {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}},
        {"rope.scaling.factor": 4.0},
        {},
    ),
    "yarn": ("llama", {"rope_parameters": {**THETA, **YARN}}, YARN_KEYS, {}),
    "yarn with betas": (
        "qwen3",
        {"rope_parameters": {"rope_theta": 5e5, **YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
        {**SIXTEEN, **YARN_KEYS, "rope.freq_base": 5e5}
        | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        {},
    ),
    "llama3": ("llama", {"rope_parameters": {**THETA, "rope_type": "llama3", **LLAMA3}}, {}, llama3(**LLAMA3)),
    "longrope": (
        "phi3",
        {"rope_parameters": {**THETA, **LONGROPE, "original_max_position_embeddings": 32}}
        | {"original_max_position_embeddings": 32, "sliding_window": 20},
        {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.2}
        | {"rope.dimension_count": 16, "attention.sliding_window": 20},
        {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG},
    ),
    "part of the head": (
        "phi3",
        {"rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope.dimension_count": 8, "attention.sliding_window": 0},
        {},
    ),
    "stablelm": (
        "stablelm",
        {"rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.5}, "layer_norm_eps": 1e-3},
        {"rope.dimension_count": 8, "rope.freq_base": 10000.0, "use_parallel_residual": False},
        {},
    ),
    "large heads": (
        "llama",
        {"head_dim": 32},
        {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
        {},
    ),
    "qwen3 heads": ("qwen3", {}, SIXTEEN, {}),
    "gemma2": (
        "gemma2",
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
        {**SIXTEEN, "attention.sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
        | {"rope.freq_base": 10000.0, "rope.freq_base_swa": 10000.0},
        {},
    ),
    "gemma2 with a scale": (
        "gemma2",
        {"query_pre_attn_scalar": 64},
        {**SIXTEEN, "attention.sliding_window": 8, "attention.scale": 0.125},
        {},
    ),
    "gemma3": (
        "gemma3_text",
        SIX
        | {
            "final_logit_softcapping": 6.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            },
        },
        {**SIXTEEN, "attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.freq_base_swa": 20000.0}
        | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "final_logit_softcapping": 6.0},
        {},
    ),
    "gemma3 with a pattern": (
        "gemma3_text",
        {"layer_types": ["full_attention", "sliding_attention"]},
        {**SIXTEEN, "attention.sliding_window": 8, "rope.freq_base": 1e6}
        | {"attention.sliding_window_pattern": [False, True]},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_what_its_model_does(case: str, tmp_path: Path) -> None:
    model_type, config, settings, tensors = CASES[case]
    model, file = write(tmp_path, model_type, config, settings, tensors)
    plain = logits(open_source(str(tiny_model(model_type, tmp_path)))) if config else None
    expected = logits(open_source(str(model)))
    torch.testing.assert_close(logits(open_source(str(file))), expected, rtol=1e-4, atol=1e-4)
    assert plain is None or plain.shape != expected.shape or (plain - expected).abs().max() > 1e-2, "has no effect"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "config", "settings"),
    [
        ("llama", {}, {"rope.dimension_count": 16}),
        ("qwen2", {}, {}),
        ("qwen3", {"head_dim": 128}, {"attention.key_length": 128, "attention.value_length": 128}),
        (
            "gemma2",
            {"head_dim": 256, "query_pre_attn_scalar": 256},
            {"attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 8}
            | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        (
            "gemma3_text",
            {**SIX, "head_dim": 256, "query_pre_attn_scalar": 256},
            {"attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 8}
            | {"rope.freq_base": 1e6},
        ),
    ],
)
def test_transformers_reads_the_same_where_it_reads_all(
    model_type: str, config: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    _, file = write(tmp_path, model_type, config, settings)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
    torch.testing.assert_close(logits(open_source(str(file))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "rope.scaling.alpha", 1000.0),
        ("llama", "attention.sliding_window", 8),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.value_length", 32),
        ("llama", "rope.dimension_count", 8),
        ("llama", "expert_count", 8),
        ("llama", "logit_scale", 0.5),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "attention.causal", False),
        ("llama", "from_the_future", 1),
        ("llama", "rope.scaling.attn_factor", 0.7),
        ("qwen2", "rope.scaling.type", "longrope"),
        ("qwen2", "attention.sliding_window", 8),
        ("gemma3_text", "rope.scaling.type", "yarn"),
        ("gemma2", "attention.sliding_window_pattern", [True]),
        ("gemma2", "attention.scale", 0.3),
        ("gemma2", "rope.freq_base_swa", 5000.0),
        ("phi3", "rope.scaling.factor", 2.0),
        ("stablelm", "attention.key_length", 32),
    ],
)
def test_settings_that_the_model_cannot_compute_are_refused_by_name(
    model_type: str, key: str, value: Any, tmp_path: Path
) -> None:
    _, file = write(tmp_path, model_type, settings={key: value})
    with pytest.raises(UnsupportedError) as raised:
        open_source(str(file))
    assert f"{ARCHITECTURES.get(model_type, model_type)}.{key}" in raised.value.message
    assert str(file) in raised.value.message and raised.value.hint is not None


@pytest.mark.parametrize(
    ("model_type", "tensors"),
    [
        ("llama", {"rope_freqs.weight": [1.0, 2.0, 3.0, 5.0, 1.0, 2.0, 3.0, 8.0]}),
        ("llama", {"rope_freqs.weight": [1.0] * 7}),
        ("llama", {"rope_factors_long.weight": LONG}),
        ("qwen2", llama3(**LLAMA3)),
        ("phi3", {"rope_factors_short.weight": SHORT[:3], "rope_factors_long.weight": LONG[:3]}),
    ],
)
def test_rotary_divisors_of_another_kind_are_refused(model_type: str, tensors: Any, tmp_path: Path) -> None:
    _, file = write(tmp_path, model_type, tensors=tensors)
    with pytest.raises(UnsupportedError, match="rope_f"):
        open_source(str(file))


def test_heads_that_the_file_does_not_size_are_no_crash(tmp_path: Path) -> None:
    _, file = write(tmp_path, "qwen3", {"head_dim": 32})
    with pytest.raises(UsageError, match=r"blk\.0\.\w+\.weight has \d+ weights"):
        open_source(str(file))


def test_one_file_of_several_is_refused(tmp_path: Path) -> None:
    _, file = write(tmp_path, "llama", settings={":split.count": 2})
    with pytest.raises(UsageError, match=r"metadata say split\.count 2, there are 1"):
        open_source(str(file))


@pytest.mark.parametrize("trained", [16, 32, 64, 512, 8192])
@pytest.mark.parametrize("factor", [4.0, 32.0])
def test_llama_3s_settings_are_recovered_from_its_divisors(trained: int, factor: float, tmp_path: Path) -> None:
    given = LLAMA3 | {"factor": factor, "original_max_position_embeddings": trained}
    (divisors,) = llama3(**given).values()
    found = gguf_config._llama3(divisors, 10000.0, 16, (trained, 8192))
    (again,) = llama3(**{key: value for key, value in found.items() if key != "rope_type"}).values()
    assert again == pytest.approx(divisors, rel=1e-5)
    assert found == {"rope_type": "llama3", **given} or all(value in (1.0, factor) for value in divisors)


@pytest.mark.slow
def test_tokens_and_chat_templates_are_read_and_carried_over(tmp_path: Path) -> None:
    settings = {
        ":tokenizer.ggml.padding_token_id": 2,
        ":tokenizer.ggml.eot_token_id": 5,
        ":tokenizer.chat_template": "default",
        ":tokenizer.chat_template.tool_use": "tools",
        ":tokenizer.chat_templates": ["tool_use"],
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
    }
    _, file = write(tmp_path, "llama", settings=settings)
    source = open_source(str(file))
    hf: Any = source.hf_config()
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (0, 1, 2)
    tokenizer: Any = source.tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template == {"default": "default", "tool_use": "tools"}
    out = tmp_path / "out"
    run(file, out, method__name="rtn")
    auto: Any = AutoTokenizer
    assert auto.from_pretrained(out).chat_template == {"default": "default", "tool_use": "tools"}
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 5]
    assert json.loads((out / "config.json").read_text())["rope_parameters"]["rope_type"] == "yarn"


def test_tokens_that_the_file_has_not_are_none(tmp_path: Path) -> None:
    _, file = write(tmp_path, "llama")
    assert open_source(str(file)).hf_config().pad_token_id is None


def test_another_family_is_told_before_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer: Any = gguf.GGUFWriter(file, "starcoder2")
    writer.add_block_count(1)
    writer.add_uint32("starcoder2.from_the_future", 1)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(8, np.float32))
    vocabulary(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QcliError, match="starcoder2"):
        open_source(str(file))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama3", "qwen3 heads", "gemma2"])
def test_tasks_run_on_the_same_model(case: str, tmp_path: Path) -> None:
    model_type, config, settings, tensors = CASES[case]
    _, file = write(tmp_path, model_type, config, settings, tensors)
    source = open_source(str(file))
    model = _load(source, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits(source), rtol=1e-4, atol=1e-4)
