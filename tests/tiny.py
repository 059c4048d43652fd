"""Tiny random models of every family, written to disk as transformers writes them."""

from __future__ import annotations

import json
import shutil
import tempfile
from atexit import register
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from qcli.models.families import FAMILIES

VOCAB = 320
HIDDEN = 64
SPECIAL = ("<s>", "</s>", "<pad>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.1,
}
_GQA = {"intermediate_size": 128, "num_key_value_heads": 2}
_HEAD_DIM = {"head_dim": 16}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "mistral": {**_GQA, "sliding_window": 8},
    "qwen2": _GQA,
    "qwen3": {**_GQA, **_HEAD_DIM},
    "gemma": {**_GQA, **_HEAD_DIM},
    "gemma2": {**_GQA, **_HEAD_DIM, **_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_GQA, **_HEAD_DIM, **_SLIDING, "query_pre_attn_scalar": 16},
    "phi3": _GQA,
    "smollm3": {**_GQA, "no_rope_layers": [1, 0]},
    "olmo2": _GQA,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 128},
    "bloom": {},
    "falcon": {},
    "stablelm": _GQA,
}
_EXPERTS = {**_GQA, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "num_key_value_heads": 4,
}
# Types without a row, whose structure is discovered: most used ones, and one of each kind of block.
WITHOUT_ROW: dict[str, dict[str, Any]] = {
    "granite": {**_GQA, "residual_multiplier": 0.5},
    "olmo3": {**_GQA, **_SLIDING},
    "glm4": {**_GQA, **_HEAD_DIM},
    "cohere2": {**_GQA, **_SLIDING},
    "ministral3": {**_GQA, **_HEAD_DIM},
    "phi": {"intermediate_size": 128},
    "nemotron": _GQA,
    "nemotron_h": {
        **_GQA,
        **_HEAD_DIM,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "lfm2": {**_GQA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": {**_GQA, **_HEAD_DIM, **_DELTA},
    "mixtral": _EXPERTS,
    "qwen3_moe": {**_EXPERTS, **_HEAD_DIM},
    "gpt_oss": {**_EXPERTS, **_HEAD_DIM, **_SLIDING},
    "llama4_text": {**_EXPERTS, **_HEAD_DIM, "intermediate_size_mlp": 128, "moe_layers": [1]},
    "deepseek_v3": {
        **_EXPERTS,
        **_MLA,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
WITHOUT_ROW["olmo_hybrid"] = {**_GQA, **_HEAD_DIM, **_DELTA}  # tensors that transformers joins
WITHOUT_ROW["longcat_flash"] = {  # experts without weights behind the others
    **_MLA,
    "ffn_hidden_size": 128,
    "expert_ffn_hidden_size": 64,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "num_hidden_layers": 4,
}
# Of blocks that are given more than hidden states, or share parts.
WITHOUT_ROW |= {
    "gemma4_text": {  # inputs of every layer by token, keys and values of earlier layers
        **_GQA,
        **_HEAD_DIM,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCAB,
        "layer_types": ["full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
    },
    "zamba": {  # a block within blocks, and the embedding
        "intermediate_size": 128,
        "layers_block_type": ["hybrid", "hybrid"],
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 8,
        "mamba_d_state": 16,
    },
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "deepseek_v4": {  # several streams of hidden states, experts by token
        **_EXPERTS,
        **_HEAD_DIM,
        "num_key_value_heads": 1,
        "q_lora_rank": 32,
        "o_lora_rank": 32,
        "o_groups": 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 16,
        "sliding_window": 32,
    },
}
# Mixtures of experts that llama.cpp computes, besides those above.
_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True}
MIXTURES: dict[str, dict[str, Any]] = {
    "glm4_moe": {**_EXPERTS, **_HEAD_DIM, **_SHARED, "routed_scaling_factor": 1.5, "use_qk_norm": True},
    "dots1": {**_EXPERTS, **_HEAD_DIM, **_SHARED, "routed_scaling_factor": 1.5, "num_key_value_heads": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 96},
    "olmoe": {**_EXPERTS, "num_key_value_heads": 4},
}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "out_hidden_size": HIDDEN}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGE = {"image_size": 28, "patch_size": 14}
_LARGER = {"image_size": 56, "patch_size": 14}  # four patches are merged to one
# Types that see images too, without a row: settings of their language models and of their vision towers.
WITH_IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": ({"model_type": "llama", **_GQA}, {"model_type": "clip_vision_model", **_VISION, **_IMAGE}),
    "mllama": (
        {**_GQA, "cross_attention_layers": [1]},
        {**_VISION, **_IMAGE, "attention_heads": 2, "num_global_layers": 1, "max_num_tiles": 1}
        | {"intermediate_layers_indices": [0], "vision_output_dim": 64, "supported_aspect_ratios": [[1, 1]]},
    ),
    "qwen2_5_vl": (
        {**_GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 32, "fullatt_block_indexes": [0]},
    ),
    "qwen3_5": (
        {**_GQA, **_HEAD_DIM, **_DELTA},
        {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 32, "deepstack_visual_indexes": []},
    ),
    "qwen3_vl_moe": (
        {
            **_EXPERTS,
            **_HEAD_DIM,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 32, "deepstack_visual_indexes": [0]},
    ),
    "idefics3": ({"model_type": "llama", **_GQA}, {**_VISION, **_LARGER}),
    "mistral3": ({"model_type": "mistral", **_GQA, **_HEAD_DIM}, {"model_type": "pixtral", **_VISION, **_LARGER}),
    "gemma4": (
        WITHOUT_ROW["gemma4_text"],
        {**_VISION, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}
        | {"patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64, "default_output_length": 4},
    ),
    "internvl": (
        {"model_type": "qwen2", **_GQA},
        {"model_type": "internvl_vision", **_VISION, "image_size": [56, 56], "patch_size": [14, 14]},
    ),
}
# Where images are, and what is merged to one token of theirs.
_PLACES: dict[str, dict[str, Any]] = {
    "llava": {"image_token_index": 3},
    "mllama": {"image_token_index": 3},
    "idefics3": {"image_token_id": 3, "scale_factor": 2},
    "mistral3": {"image_token_index": 3},
    "internvl": {"image_token_id": 3},
    "gemma4": {
        "image_token_id": 3,
        "video_token_id": 4,
        "audio_token_id": 5,
        "boi_token_id": 6,
        "eoi_token_id": 7,
    },
}
# Settings that change the structure of a family's blocks.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("stablelm", {"use_parallel_residual": True}),
    ("opt", {"do_layer_norm_before": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"parallel_attn": False, "alibi": True}),
]


def tiny_model(model_type: str, tmp_path: Path, **config_overrides: Any) -> Path:
    """Create a random float32 model of two blocks and a byte-level tokenizer in a folder under `tmp_path`.

    Equal arguments give equal bytes. Models are built once per session and copied: the caller may change the folder.

    Args:
        model_type: a key of `CONFIGS`, `WITHOUT_ROW`, `MIXTURES` or `WITH_IMAGES`, or `gemma3`.
        tmp_path: parent of the folder.
        config_overrides: fields of the model's config.
    """
    built = _build(model_type, tuple(sorted((key, repr(value)) for key, value in config_overrides.items())))
    if not (built / "config.json").exists():
        _write(model_type, built, config_overrides)
    number = sum(1 for _ in tmp_path.iterdir())
    return Path(shutil.copytree(built, tmp_path / f"{model_type}-{number}"))


def tiny_config(model_type: str, **config_overrides: Any) -> Any:
    """The transformers config of `tiny_model`."""
    if model_type == "gemma3":
        text = {**_COMMON, **CONFIGS["gemma3_text"], **config_overrides}
        return AutoConfig.for_model(
            "gemma3",
            text_config=text,
            vision_config={**_VISION, **_IMAGE},
            mm_tokens_per_image=4,
            image_token_index=3,
            tie_word_embeddings=config_overrides.get("tie_word_embeddings", True),
        )
    if model_type in WITH_IMAGES:
        text, vision = WITH_IMAGES[model_type]
        places = _PLACES.get(model_type, {"image_token_id": 3, "video_token_id": 4})
        text = {**_COMMON, **text, **config_overrides}
        return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **places)
    own = (CONFIGS | WITHOUT_ROW | MIXTURES)[model_type]
    return AutoConfig.for_model(model_type, **{**_COMMON, **own, **config_overrides})


def with_merge(folder: Path) -> Path:
    """Add a merge of "a" and "b" (token 259) to a model's tokenizer: llama.cpp loads none without merges."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["vocab"]["ab"] = 259
    described["model"]["merges"] = [["a", "b"]]
    file.write_text(json.dumps(described))
    return folder


def tiny_tokenizer() -> Any:
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast_tokenizer: Any = PreTrainedTokenizerFast
    fast = fast_tokenizer(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def with_bos(folder: Path) -> Path:
    """Let a model's tokenizer put its begin token (0) before every text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)
    return folder


@cache
def _build(model_type: str, key: tuple[tuple[str, str], ...]) -> Path:
    assert model_type in {*FAMILIES, *WITHOUT_ROW, *MIXTURES, *WITH_IMAGES}
    folder = Path(tempfile.mkdtemp(prefix="qcli-tiny-"))
    register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _write(model_type: str, folder: Path, config_overrides: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto: Any = AutoModelForImageTextToText if model_type in WITH_IMAGES else AutoModelForCausalLM
        model = auto.from_config(tiny_config(model_type, **config_overrides), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):  # of experts' scores
                    buffer += 0.1 * torch.randn_like(buffer)
    tiny_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
