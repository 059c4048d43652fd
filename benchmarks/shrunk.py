"""Tiny configs of any model type that transformers registers: its defaults, with every size made small."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from benchmarks.shrunk_images import PARTS

LAYERS = 4
VOCABULARY = 320
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "embedding_size": 64,
    "model_dim": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "dense_intermediate_size": 128,
    "expert_ffn_hidden_size": 64,
    "ffn_hidden_size": 128,
    "ffn_dim": 128,
    "n_inner": 128,
    "dim_ff": 128,
    "dff": 128,
    "decoder_ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "shared_expert_size": 64,
    "mlp_dim": 128,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": 2,
    "num_blocks": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "swa_v_head_dim": 16,
    "global_head_dim": 32,
    "attention_head_dim": 16,
    "kv_channels": 16,
    "rotary_dim": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "sliding_window": 32,
    "sliding_window_size": 32,
    "window_size": 32,
    "local_attention": 32,
    "attention_window_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "o_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "qk_head_dim": 32,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_top_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "zero_expert_num": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_headdim": 16,
    "mamba_dt_rank": 8,
    "mamba_d_ssm": 128,
    "n_mamba_heads": 2,
    "ssm_state_size": 16,
    "state_size": 16,
    "chunk_size": 16,
    "time_step_rank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lru_width": 64,
    "conv_dim": 64,
    "conv_dim_out": 64,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 1,
    "laurel_rank": 8,
    "adapter_rank": 8,
    "attention_rank": 8,
    "lora_rank": 8,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What single types need to be consistent.
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4}
_SHARED_KV = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": {"gated_norm_rank": 32},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _MOE,
    "dots1": _MOE,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": _SHARED_KV | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": _SHARED_KV,
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"chunk_size": 16, "qk_dim_factor": 0.5, "num_heads": 4},
    "zamba": {
        "layers_block_type": _HYBRID,
        "mamba_dt_rank": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": _HYBRID, "n_mamba_heads": 8, "num_key_value_heads": 4},
}
_NEEDED = ("head_dim", "num_key_value_heads")  # without defaults, although the model cannot do without


def shrunk(model_type: str) -> PreTrainedConfig:
    """The default config of a model type with every known size made small, parts of a multimodal one included."""
    return _shrunk(CONFIG_MAPPING[model_type])


def _shrunk(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = kind()
    values = default.to_dict()
    known = {*inspect.signature(kind.__init__).parameters, *values}
    settings: dict[str, Any] = {}
    for name in sorted(known):
        value = values.get(name, default.__dict__.get(name))
        if isinstance(part := default.__dict__.get(name), PreTrainedConfig):
            settings[name] = _shrunk(type(part)).to_dict()
        elif isinstance(value, int) and not isinstance(value, bool) and name in _SIZES:
            settings[name] = min(value, _SIZES[name]) if value > 0 else value
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCABULARY:
            settings[name] = VOCABULARY - 1
        elif name.endswith("token_id") and isinstance(value, list):
            settings[name] = _SIZES.get(name, VOCABULARY - 1)
        elif value is None and name in _NEEDED:
            settings[name] = _SIZES[name]
        elif isinstance(value, list) and len(value) == _depth(values):
            settings[name] = [_SIZES[name]] * LAYERS if name in _SIZES else _short(value)
    if "kv_lora_rank" in values:  # latent attention: every head has keys and values of its own
        settings |= {"num_key_value_heads": 4} if "num_key_value_heads" in known else {}
    return kind(**{**settings, **(_OVERRIDES | PARTS).get(kind.model_type, {})})


def _depth(values: dict[str, Any]) -> int:
    return next((v for n in ("num_hidden_layers", "n_layer", "num_layers") if (v := values.get(n))), -1)


def _short(values: list[Any]) -> list[Any]:
    """As many entries as layers, with each value that occurs, in the order of its first occurrence."""
    distinct = (
        list(dict.fromkeys(values))[:LAYERS] if all(isinstance(v, str | int | float | bool) for v in values) else []
    )
    return (
        sorted([*distinct, *values[: LAYERS - len(distinct)]], key=lambda v: distinct.index(v))
        if distinct
        else values[:LAYERS]
    )
