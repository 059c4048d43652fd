"""The settings of a model in a GGUF file, under llama.cpp's names.

What llama.cpp's graph for a family does not compute is refused: llama.cpp would load the file and be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import TYPE_CHECKING, Any

from qcli.export.gguf.architectures import ARCHITECTURES, Architecture
from qcli.utils.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def architecture(config: PreTrainedConfig) -> Architecture:
    """llama.cpp's architecture for a model.

    Raises:
        UnsupportedError: llama.cpp has no graph for the family, or it does not compute one of the model's settings.
    """
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise _unsupported(f"{config.model_type} is not among {', '.join(ARCHITECTURES)}")
    for kind, rope in ropes(config).items():
        if rope["rope_type"] not in ("default", "linear", "llama3"):
            raise _unsupported(f"{rope['rope_type']} rotary embedding")
        if rope["rope_type"] == "llama3" and not known.rope_factors:
            raise _unsupported(f"llama3 rotary embedding of {config.model_type}")
        if kind == "sliding_attention" and rope["rope_type"] != "default":
            raise _unsupported(f"{rope['rope_type']} rotary embedding of sliding layers")
        if rope.get("partial_rotary_factor", 1.0) != 1.0 and not known.partial_rotary:
            raise _unsupported("rotary embedding of part of a head")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != _attention_scalar(config, known):
        raise _unsupported(f"query_pre_attn_scalar {scalar}, llama.cpp takes {_attention_scalar(config, known)}")
    if known.windows is None and _has_sliding_layers(config):
        raise _unsupported(f"sliding windows of {config.model_type}")
    for key in _SOFT_CAPS:
        if known.soft_caps and getattr(config, key, None) is None:
            raise _unsupported(f"{config.model_type} without {key}")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != known.activation:
        raise _unsupported(f"{activation} as the MLP's activation")
    if not known.fewer_kv_heads and config.num_key_value_heads != config.num_attention_heads:
        raise _unsupported(f"{config.model_type} with fewer heads of keys than of queries")
    for key, value in known.fixed.items():
        if ((actual := getattr(config, key, None)) or None) != (value or None):  # [], False and None mean the same
            raise _unsupported(f"{key} {actual} of {config.model_type}")
    return known


def write(writer: Any, config: PreTrainedConfig, name: str) -> None:
    """Write the settings of a model that `architecture` accepts.

    Args:
        writer: gguf.GGUFWriter.
        name: of the model.
    """
    known, heads = ARCHITECTURES[config.model_type], config.num_attention_heads
    writer.add_name(name)
    writer.add_context_length(_context(config, known))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = ropes(config)
    main = rope.get("full_attention") or next(iter(rope.values()))
    writer.add_rope_dimension_count(int(head_size(config) * main.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(main["rope_theta"])
    if main["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(main["factor"])
    if known.windows == "per layer" and _has_sliding_layers(config):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(rope.get("sliding_attention", main)["rope_theta"])
    for key in _SOFT_CAPS:
        if (cap := getattr(config, key, None)) is not None:
            getattr(writer, f"add_{key}")(cap)
    for key, setting in known.settings.items():
        getattr(writer, f"add_{key}")(getattr(config, setting))
    if known.sigmoid:
        from gguf import ExpertGatingFuncType

        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """The tensor `rope_freqs`, by which llama.cpp divides rotary frequencies: float32 `[head / 2]`; None: not needed.

    Llama 3.1's scaling as in its reference code: long waves are stretched by `factor`, short ones are not, and those
    between are interpolated.
    """
    import torch

    (rope, *_) = ropes(config).values()
    if rope["rope_type"] != "llama3":
        return None
    size, trained = head_size(config), rope["original_max_position_embeddings"]
    wave = 2 * pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((trained / wave - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()


def ropes(config: PreTrainedConfig) -> dict[str, Mapping[str, Any]]:
    """Rotary embeddings by kind of layer; a model with one kind has `full_attention`."""
    parameters: dict[str, Any] = config.rope_parameters
    return {"full_attention": parameters} if "rope_type" in parameters else parameters


def head_size(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(config: PreTrainedConfig, known: Architecture) -> int:
    """Positions that the file allows."""
    positions = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None) if known.windows == "context" else None
    return positions if window is None else min(positions, window)


def _has_sliding_layers(config: PreTrainedConfig) -> bool:
    """Whether the attention of some layers is limited to a window."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


def _attention_scalar(config: PreTrainedConfig, known: Architecture) -> int:
    """What llama.cpp takes for `query_pre_attn_scalar`."""
    if known.wide_blocks == config.num_hidden_layers:
        return int(config.hidden_size // config.num_attention_heads)
    return head_size(config)


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(f"gguf: {what}: llama.cpp does not compute it", hint="pack it as qcli or dense")
