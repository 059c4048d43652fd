"""The config of a model in a GGUF file: what transformers' reader drops is added, or the file is refused by its key.

Every setting of the architecture must be read by someone: by transformers, here, or be known to have no effect.
Meanings and defaults are llama.cpp's (src/llama-model.cpp, src/models/*.cpp, ggml's `rope_yarn`; autumn 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose, pi
from typing import TYPE_CHECKING, Any

from qcli.utils.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that belong to the config: divisors of the rotary frequencies."""

_OTHER_FILES = "use the model's safetensors folder"
_GEMMA = {"gemma2": 2, "gemma3_text": 6}  # every how many layers one is without a window
_WIDE_BLOCKS = {"gemma2": 46, "gemma3_text": 62}  # of the one size whose attention is scaled by the width per head
_HEAD_DIM = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", *_GEMMA})  # heads of any size
_PARTIAL_ROTARY = frozenset({"phi3", "stablelm"})
_WINDOWED = frozenset({"mistral", "phi3"})  # all layers have the window
_SCALINGS = {"phi3": ("none",), "gemma3_text": ("none", "linear")}  # without divisors; others: yarn too
_FACTORED = {"llama": ("llama3", "longrope"), "mistral": ("llama3", "longrope"), "phi3": ("longrope",)}
_EXPERT_WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
MIXTURES = {
    "qwen2_moe": _EXPERT_WIDTH | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    "qwen3_moe": _EXPERT_WIDTH,
}
"""Types with experts whose files are read: the config's fields for their keys."""

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_LLAMA3 = (1.0, 4.0)  # low_freq_factor and high_freq_factor of every Llama 3

_BASIC = frozenset(  # read by transformers
    {"context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size"}
    | {"attention.head_count", "attention.head_count_kv"}
)
_NO_EFFECT = frozenset(  # on the model's logits; transformers takes the last from the tensors
    {"rope.scaling.finetuned", "pooling_type", "tensor_data_layout", "use_parallel_residual"}
)
_NEUTRAL: dict[str, tuple[float, ...]] = {  # values that change nothing
    "attention.causal": (1,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.shared_kv_layers": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
_OTHER_MODELS = ("adapter.", "clip.", "diffusion.", "xielu.")  # sections of files that are no plain language models


def complete(
    config: PreTrainedConfig, settings: Mapping[str, Any], factors: Mapping[str, Sequence[float]], vocabulary: int
) -> PreTrainedConfig:
    """The config with everything that the file says.

    Args:
        config: as transformers reads it from the file.
        settings: the file's keys and values, without the long arrays of the tokenizer.
        factors: tensors named in `FACTORS`, as far as the file has them.
        vocabulary: rows of the embedding.

    Raises:
        UnsupportedError: the model of transformers does not compute what a key says, or the key is unknown.
    """
    file = _File(config, settings)
    fields: dict[str, Any] = {"vocab_size": vocabulary}
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        name = next((name for name in _EPSILONS if hasattr(config, name)), None)
        if name is not None and (epsilon := file.take(key)) is not None:
            fields[name] = epsilon
    fields |= _experts(file) | _heads(file) | _attention(file) | _rope(file, factors)
    if config.model_type == "gpt2":
        fields["n_positions"] = file.settings["context_length"]
    if config.model_type == "bloom" and file.left.get("attention.max_alibi_bias") == 8:
        file.take("attention.max_alibi_bias")
    for field, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{field}_token_id"] = settings.get(f"tokenizer.ggml.{key}_token_id")
    file.refuse_leftovers()
    return type(config).from_dict(config.to_dict() | fields)


def end_tokens(settings: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end a generated text: of the text, of a turn, of a message."""
    ids = (settings.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom"))
    return list(dict.fromkeys(id for id in ids if isinstance(id, int)))


class _File:
    """A file's settings, without the prefix of the architecture; those that nobody has taken are refused."""

    def __init__(self, config: PreTrainedConfig, settings: Mapping[str, Any]) -> None:
        self.config, self.model_type = config, str(config.model_type)
        self.architecture = str(settings["general.architecture"])
        prefix = f"{self.architecture}."
        self.settings = {key.removeprefix(prefix): _short(value) for key, value in settings.items()}
        self.left = {key: self.settings[key] for key in self.settings if prefix + key in settings}
        self.left |= {key: value for key, value in settings.items() if key.startswith(_OTHER_MODELS)}

    def take(self, key: str, default: Any = None) -> Any:
        return self.left.pop(key, default)

    def refuse(self, key: str, why: str) -> UnsupportedError:
        value = self.settings.get(key)
        said = f"{self.architecture}.{key}" + (f" is {value}" if isinstance(value, int | float | str) else "")
        return UnsupportedError(f"{said}: {why}", hint=_OTHER_FILES)

    def refuse_leftovers(self) -> None:
        for key, value in self.left.items():
            if key not in _BASIC | _NO_EFFECT and not (key in _NEUTRAL and value in _NEUTRAL[key]):
                raise self.refuse(key, f"a setting that qcli does not know in a {self.model_type}")


def _experts(file: _File) -> dict[str, Any]:
    """Widths of experts; transformers reads their number and that of a token's."""
    if file.model_type not in MIXTURES:
        return {}
    for key in ("expert_count", "expert_used_count"):
        file.take(key)
    widths = {field: file.take(key) for key, field in MIXTURES[file.model_type].items()}
    return {field: width for field, width in widths.items() if width is not None}


def _heads(file: _File) -> dict[str, Any]:
    config = file.config
    plain = int(config.hidden_size // config.num_attention_heads)
    size = file.take("attention.key_length", plain)
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        if file.take(key, size if key.endswith("_swa") else plain) != size:
            raise file.refuse("attention.key_length" if key not in file.settings else key, "heads of different sizes")
    if size != plain and file.model_type not in _HEAD_DIM:
        raise file.refuse("attention.key_length", f"{file.model_type} has heads of {plain}")
    return {"head_dim": size} if size != plain or "head_dim" in config.to_dict() else {}


def _head_size(file: _File) -> int:
    return int(file.settings.get("attention.key_length", file.config.hidden_size // file.config.num_attention_heads))


def _attention(file: _File) -> dict[str, Any]:
    """Scale, windows and soft caps."""
    config, size, fields = file.config, _head_size(file), dict[str, Any]()
    scale = file.take("attention.scale", 0)
    if file.model_type in _GEMMA:
        wide = config.num_hidden_layers == _WIDE_BLOCKS[file.model_type]
        scalar = config.hidden_size // config.num_attention_heads if wide else size
        fields["query_pre_attn_scalar"] = round(scale**-2) if scale else scalar
        if scale and not isclose(scale, fields["query_pre_attn_scalar"] ** -0.5, rel_tol=1e-4):
            raise file.refuse("attention.scale", "not one over the root of a whole number")
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if (cap := file.take(key)) is not None:
                fields[key] = cap or None
    elif scale and not isclose(scale, size**-0.5, rel_tol=1e-4):
        raise file.refuse("attention.scale", f"{file.model_type} has no attention scale of its own")
    window, pattern = file.take("attention.sliding_window"), file.take("attention.sliding_window_pattern")
    if file.model_type in _GEMMA:
        if window is not None:
            fields["sliding_window"] = window
        every = _GEMMA[file.model_type] if pattern is None else pattern
        layers = range(config.num_hidden_layers)
        slides = every if isinstance(every, list) else [index % every < every - 1 for index in layers]
        if len(slides) != len(layers):
            raise file.refuse("attention.sliding_window_pattern", "not one value for each layer")
        fields["layer_types"] = [f"{'sliding' if slide else 'full'}_attention" for slide in slides]
    elif pattern is not None and window:
        raise file.refuse("attention.sliding_window_pattern", f"{file.model_type} has one kind of layer")
    elif file.model_type in _WINDOWED:
        fields["sliding_window"] = window or None
    elif window and window < file.settings["context_length"]:
        raise file.refuse("attention.sliding_window", f"{file.model_type} has no sliding window, or none of all layers")
    return fields


def _rope(file: _File, factors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Rotary embedding: base, scaling, part of the head."""
    if getattr(file.config, "rope_parameters", None) is None:
        if factors:
            raise UnsupportedError(f"{min(factors)}: {file.model_type} has no rotary embedding", hint=_OTHER_FILES)
        return {}
    size = _head_size(file)
    rotary = file.take("rope.dimension_count", size)
    if (rotary != size and file.model_type not in _PARTIAL_ROTARY) or file.take(
        "rope.dimension_count_swa", rotary
    ) != rotary:
        raise file.refuse("rope.dimension_count", f"{file.model_type} rotates whole heads, of {size}")
    rope: dict[str, Any] = {"rope_theta": file.take("rope.freq_base", 10000.0)}
    if file.model_type in _PARTIAL_ROTARY:
        rope["partial_rotary_factor"] = rotary / size
    rope |= _scaling(file, factors, rope["rope_theta"], rotary)
    fields: dict[str, Any] = {"rope_parameters": rope}
    sliding = {"rope_type": "default", "rope_theta": file.take("rope.freq_base_swa", 10000.0)}
    if file.model_type == "gemma3_text":
        fields["rope_parameters"] = {"full_attention": rope, "sliding_attention": sliding}
    elif file.settings.get("rope.freq_base_swa", rope["rope_theta"]) != rope["rope_theta"]:
        raise file.refuse("rope.freq_base_swa", f"layers of {file.model_type} share one base")
    if file.model_type == "phi3" and "original_max_position_embeddings" in rope:
        fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return fields


def _scaling(file: _File, factors: Mapping[str, Sequence[float]], theta: float, rotary: int) -> dict[str, Any]:
    context = file.settings["context_length"]
    factor = file.take("rope.scaling.factor", file.take("rope.scale_linear", 0)) or 1
    kind = file.take("rope.scaling.type", "linear" if factor != 1 else "none")
    trained = file.take("rope.scaling.original_context_length", 0) or context
    if kind == "linear" and factor == 1:
        kind = "none"
    if factors:
        found = "llama3" if factors.keys() == {FACTORS[0]} else "longrope"
        if found not in _FACTORED.get(file.model_type, ()) or kind not in ("none", found):
            beside = f" beside rope.scaling.type {kind}" if kind != "none" else ""
            raise UnsupportedError(
                f"{min(factors)}: {file.model_type} has no {found} scaling{beside}", hint=_OTHER_FILES
            )
        kind = found
    elif kind not in _SCALINGS.get(file.model_type, ("none", "linear", "yarn")):
        why = "its factors are missing" if kind == "longrope" else f"{file.model_type} has no such scaling"
        raise file.refuse("rope.scaling.type" if "rope.scaling.type" in file.settings else "rope.scaling.factor", why)
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        betas = {beta: file.take(f"rope.scaling.yarn_{beta}") for beta in ("beta_fast", "beta_slow")}
        given = {beta: value for beta, value in betas.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained} | given
    if kind == "longrope":
        lists = {f"{name}_factor": factors.get(f"rope_factors_{name}.weight", ()) for name in ("short", "long")}
        if len(factors) != 2 or any(len(values) != rotary // 2 for values in lists.values()):
            raise UnsupportedError(f"{min(factors)}: not {rotary // 2} factors, long and short", hint=_OTHER_FILES)
        return {
            "rope_type": "longrope",
            **{name: [_short(value) for value in values] for name, values in lists.items()},
            "factor": context / trained,
            "original_max_position_embeddings": trained,
            "attention_factor": file.take("rope.scaling.attn_factor", 1.0),
        }
    return _llama3(factors[FACTORS[0]], theta, rotary, (trained, 8192))


def _llama3(divisors: Sequence[float], theta: float, rotary: int, lengths: Sequence[int]) -> dict[str, Any]:
    """The settings of Llama 3's scaling that give these divisors.

    Waves longer than the training length are stretched by the factor, those shorter than a quarter of it are not, and
    those between are interpolated: any of these tells the length, which is otherwise one of `lengths`, or any.
    """
    factor, (low, high) = float(_short(max(divisors))), _LLAMA3
    waves = [2 * pi * theta ** (2 * index / rotary) for index in range(rotary // 2)]
    if len(divisors) == len(waves) and all(isclose(divisor, 1, rel_tol=1e-6) for divisor in divisors):
        return {"rope_type": "default"}

    def divisor(wave: float, trained: int) -> float:
        smooth = min(1.0, max(0.0, (trained / wave - low) / (high - low)))
        return 1 / ((1 - smooth) / factor + smooth)

    between = [
        round(wave * (low + (high - low) * (1 / value - 1 / factor) / (1 - 1 / factor)))
        for wave, value in zip(waves, divisors, strict=False)
        if 1.001 < value < factor * 0.999
    ]
    for trained in (*between, *lengths):
        expected = [divisor(wave, trained) for wave in waves]
        if len(divisors) == len(waves) and all(
            isclose(value, wanted, rel_tol=1e-5) for value, wanted in zip(divisors, expected, strict=True)
        ):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
    raise UnsupportedError("rope_freqs.weight: not the divisors of Llama 3's rotary scaling", hint=_OTHER_FILES)


def _short(value: Any) -> Any:
    """A float32 as the shortest decimal that means it, such as 1e-06 for 9.999999974752427e-07; others as they are."""
    if not isinstance(value, float):
        return value
    import numpy as np

    return float(str(np.float32(value))) if float(np.float32(value)) == value else value
