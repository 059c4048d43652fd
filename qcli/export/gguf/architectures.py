"""The model families that llama.cpp's graphs compute, one row each; nothing else in the GGUF writer knows them by name.

Facts from llama.cpp (src/models/*.cpp and conversion/, autumn 2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a family.

    Attributes:
        name: `general.architecture`.
        permuted: rows of q and k are stored in the order of Meta's rotary embedding.
        rope_factors: the graph divides rotary frequencies by the tensor `rope_freqs`, as Llama 3.1's scaling needs.
        activation: of the MLP, as transformers names it.
        windows: what becomes of sliding-window attention. `per layer`: the graph has it; `context`: it has not, so the
            context is limited to the window, up to which nothing differs; None: it has not, and such models are
            refused.
        soft_caps: the graph caps attention and logits, by 50 and 30 where the file says nothing.
        wide_blocks: number of blocks of the one size whose attention is scaled by the width per head in place of the
            head's size.
        partial_rotary: the file says how much of a head is rotated.
        fewer_kv_heads: keys and values may have fewer heads than queries.
        fixed: settings of the model, as its config has them, for which the graph has no other value.
        settings: keys of the file besides those that every model has, and the config's field for each.
        sigmoid: scores of experts are sigmoids, not parts of a softmax, and the file says so.
    """

    name: str
    permuted: bool = False
    rope_factors: bool = False
    activation: str = "silu"
    windows: Literal["per layer", "context"] | None = None
    soft_caps: bool = False
    wide_blocks: int | None = None
    partial_rotary: bool = False
    fewer_kv_heads: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    sigmoid: bool = False


_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_QWEN_EXPERTS = {**_EXPERTS, "expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"}
_EVERY_BLOCK = {"decoder_sparse_step": 1, "mlp_only_layers": []}  # has experts
_OWN_HEAD = {"tie_word_embeddings": False}
_DEEPSEEK_EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "leading_dense_block_count": "first_k_dense_replace",
}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}  # of experts
_NO_BIAS = {"attention_bias": False}  # llama.cpp loads none of the output projection
_PLAIN_HEADS = {"head_dim": None}  # of the model's width by their number

ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True, rope_factors=True),
    "mistral": Architecture("llama", permuted=True, rope_factors=True, windows="context"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", fixed=_NO_BIAS),
    "gemma": Architecture("gemma", activation=GELU, fixed=_NO_BIAS),
    "gemma2": Architecture(
        "gemma2", activation=GELU, windows="per layer", soft_caps=True, wide_blocks=46, fixed=_NO_BIAS
    ),
    "gemma3_text": Architecture("gemma3", activation=GELU, windows="per layer", wide_blocks=62, fixed=_NO_BIAS),
    "mixtral": Architecture("llama", permuted=True, rope_factors=True, windows="context", settings=_EXPERTS),
    "qwen2_moe": Architecture(
        "qwen2moe",
        fixed={"norm_topk_prob": False, **_EVERY_BLOCK, **_OWN_HEAD, **_PLAIN_HEADS},
        settings={**_QWEN_EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "qwen3_moe": Architecture(
        "qwen3moe",
        fixed={"norm_topk_prob": True, **_NO_BIAS, **_EVERY_BLOCK},
        settings=_QWEN_EXPERTS,
    ),
    "olmoe": Architecture(
        "olmoe",
        fewer_kv_heads=False,
        fixed={"norm_topk_prob": False, "clip_qkv": None, **_NO_BIAS, **_OWN_HEAD, **_PLAIN_HEADS},
        settings={**_EXPERTS, "expert_count": "num_experts"},
    ),
    "glm4_moe": Architecture(
        "glm4moe", partial_rotary=True, fixed=_ONE_GROUP, settings=_DEEPSEEK_EXPERTS, sigmoid=True
    ),
    "dots1": Architecture(
        "dots1",
        fewer_kv_heads=False,
        fixed={**_ONE_GROUP, **_NO_BIAS, **_OWN_HEAD},
        settings=_DEEPSEEK_EXPERTS,
        sigmoid=True,
    ),
}
"""By `model_type`."""
