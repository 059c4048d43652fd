"""What configs of models that see images need to be small and consistent, by model type of each part."""

from __future__ import annotations

from typing import Any

_HIDDEN = 64  # of language models


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary positions with parts for time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections], **more}}


_GLM_VISION = {"depth": 2, "out_hidden_size": _HIDDEN}
_KOSMOS_TEXT = {"embed_dim": 64, "layers": 4, "ffn_dim": 128, "attention_heads": 4}
_QUANTIZER = {"embed_dim": 4, "base_channels": 32, "num_res_blocks": 1}
_SPARK = {"out_hidden_size": 64, "projector_hidden_size": 64}
PARTS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 3, "IMGIMGA": 4}},
    "chameleon_vqgan": _QUANTIZER | {"embed_dim": 32, "latent_channels": 32, "num_embeddings": 16},
    "cosmos3_edge_text": _rope(4, 2, 2),
    "deepseek_ocr2_encoder": {"hidden_size": 64},
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": _HIDDEN},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": _HIDDEN},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 5, "<|visual token 000000|>": 4}},
    "emu3_vqgan": _QUANTIZER | {"codebook_size": 16, "hidden_size": 32},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [64, 64]}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}},
    "ernie4_5_vl_moe_vision": {"depth": 2},
    "glm4v_moe_text": _rope(2, 1, 1),
    "glm4v_moe_vision": _GLM_VISION,
    "glm4v_text": _rope(2, 3, 3),
    "glm4v_vision": _GLM_VISION,
    "glm5_next_vision": _GLM_VISION,
    "glm_ocr_text": _rope(2, 3, 3),
    "glm_ocr_vision": _GLM_VISION,
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "granite_docling_vision": {"out_hidden_size": _HIDDEN, "deepstack_visual_indexes": [0, 1]},
    "hunyuan_vl_text": {"head_dim": 16, "num_key_value_heads": 4}
    | {
        "rope_parameters": {
            "rope_type": "dynamic",
            "factor": 1.0,
            "rope_theta": 10000.0,
            "alpha": 1.0,
            "xdrope_section": [2, 2, 2, 2],
        }
    },
    "hunyuan_vl_vision": {"out_hidden_size": _HIDDEN, "text_hidden_size": _HIDDEN},
    "inkling2_vision": {"text_hidden_size": _HIDDEN, "projection_hidden_dim": 64},
    "kosmos_2_5_text_model": _KOSMOS_TEXT,
    "kosmos_2_text_model": _KOSMOS_TEXT,
    "kosmos_2_vision_model": {"num_hidden_layers": 2},
    "mistral4": {"qk_head_dim": 32, "head_dim": 32, "first_k_dense_replace": 1},
    "molmo2_adapter": {"vision_feature_layer": [3, 1], "text_hidden_size": _HIDDEN, "hidden_size": 64},
    "molmo2_text": {"rope_scaling_layers": [0, 1, 2, 3], "additional_vocab_size": 8},
    "muse_glimmer": _SPARK,
    "muse_spark": _SPARK,
    "muse_spark_audio": {"out_hidden_size": _HIDDEN, "hidden_sizes": (8, 16, 32, 64), "depths": (1, 1, 1, 1)},
    "nemotron_h_omni": {"video_temporal_patch_size": 2, "vision_hidden_size": 64, "projector_hidden_size": 64},
    "paddleocr_vl_text": _rope(2, 3, 3),
    "qwen2_5_omni_text": _rope(2, 3, 3),
    "qwen2_5_vl_text": _rope(2, 3, 3),
    "qwen2_5_vl_vision": {"depth": 2, "out_hidden_size": _HIDDEN, "fullatt_block_indexes": [1]},
    "qwen2_vl_text": _rope(2, 3, 3),
    "qwen2_vl_vision": {"depth": 2, "embed_dim": 64, "hidden_size": _HIDDEN},
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": 8},
}
