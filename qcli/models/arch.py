"""Model families as data: which linears a block has, who reads the same input, where their output goes.

A family is one row of `FAMILIES`; nothing else in qcli knows a model by name. The rows are proven by a tiny
model of each class: the streamed forward equals the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qcli.errors import UnsupportedError, UsageError


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input.

    Attributes:
        linears: module paths inside the block.
        residual: path of the module whose input is the residual stream that these linears' outputs are added
            to; None when the outputs pass a norm first, or that point of the stream is nobody's input.
        leads_out: whether the outputs leave the attention or the MLP; the groups before, whose outputs stay
            inside, come to nothing else than these groups' inputs.
    """

    linears: tuple[str, ...]
    residual: str | None = None
    leads_out: bool = False


@dataclass(frozen=True)
class Variant:
    """The groups of models whose config has these settings."""

    when: Mapping[str, Any]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Family:
    """What qcli knows of one `model_type`.

    Attributes:
        model_type: as in `config.json`.
        blocks: path of the list of blocks in the causal LM.
        groups: in order of computation; together they are every 2-D weight of a block.
        tuple_output: blocks return a tuple that starts with the hidden states.
        conv1d: weights are stored `[in, out]`.
        variants: other groups, by settings of the config; the first that matches counts.
        defaults: what a config means that does not mention a setting of `variants`.
        renames: prefixes of tensor names in older checkpoints, and today's.
    """

    model_type: str
    blocks: str
    groups: tuple[Group, ...]
    tuple_output: bool = False
    conv1d: bool = False
    variants: tuple[Variant, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Linear:
    """One quantizable layer.

    Attributes:
        name: module name in the causal LM, `model.layers.0.self_attn.q_proj`.
        block: index of its block.
        group: index of its group in the family's row.
        shape: `(out_features, in_features)`, whatever the storage order.
    """

    name: str
    block: int
    group: int
    shape: tuple[int, int]


def _out(linear: str, residual: str | None = None) -> Group:
    return Group((linear,), residual, leads_out=True)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA = (
    Group(_QKV),
    _out("self_attn.o_proj", "input_layernorm"),
    Group(_GATE_UP),
    _out("mlp.down_proj", "post_attention_layernorm"),
)
_POST_NORM = (Group(_QKV), _out("self_attn.o_proj"), Group(_GATE_UP), _out("mlp.down_proj"))
_STABLELM_PARALLEL = (
    Group((*_QKV, *_GATE_UP)),
    _out("self_attn.o_proj", "input_layernorm"),
    _out("mlp.down_proj"),
)
_PHI3 = (
    Group(("self_attn.qkv_proj",)),
    _out("self_attn.o_proj", "input_layernorm"),
    Group(("mlp.gate_up_proj",)),
    _out("mlp.down_proj", "post_attention_layernorm"),
)
_OPT = (
    Group(_QKV),
    _out("self_attn.out_proj", "self_attn_layer_norm"),
    Group(("fc1",)),
    _out("fc2", "final_layer_norm"),
)
_OPT_POST_NORM = (
    Group(_QKV),
    _out("self_attn.out_proj", "self_attn.q_proj"),
    Group(("fc1",)),
    _out("fc2", "fc1"),
)
_GPT2 = (
    Group(("attn.c_attn",)),
    _out("attn.c_proj", "ln_1"),
    Group(("mlp.c_fc",)),
    _out("mlp.c_proj", "ln_2"),
)


def _fused(attention: str, first_norm: str | None, second_norm: str | None) -> tuple[Group, ...]:
    """Groups of the fused-qkv families; a norm is where the stream that an output joins can be read."""
    return (
        Group((f"{attention}.query_key_value",)),
        _out(f"{attention}.dense", first_norm),
        Group(("mlp.dense_h_to_4h",)),
        _out("mlp.dense_4h_to_h", second_norm),
    )


def _shared_input(first_norm: str) -> tuple[Group, ...]:
    """Groups of Falcon's parallel blocks with one norm for attention and MLP."""
    return (
        Group(("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        _out("self_attention.dense", first_norm),
        _out("mlp.dense_4h_to_h"),
    )


_ROWS = (
    *(
        Family(model_type, "model.layers", _LLAMA)
        for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3")
    ),
    *(Family(model_type, "model.layers", _POST_NORM) for model_type in ("gemma2", "gemma3_text", "olmo2")),
    Family(
        "gemma3",
        "model.language_model.layers",
        _POST_NORM,
        renames=(
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model.language_model."),
            ("vision_tower.vision_model.", "model.vision_tower."),
            ("model.vision_tower.vision_model.", "model.vision_tower."),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ),
    ),
    Family("phi3", "model.layers", _PHI3),
    Family(
        "stablelm",
        "model.layers",
        _LLAMA,
        variants=(Variant({"use_parallel_residual": True}, _STABLELM_PARALLEL),),
        defaults={"use_parallel_residual": False},
    ),
    Family(
        "opt",
        "model.decoder.layers",
        _OPT,
        variants=(Variant({"do_layer_norm_before": False}, _OPT_POST_NORM),),
        defaults={"do_layer_norm_before": True},
    ),
    Family("gpt2", "transformer.h", _GPT2, conv1d=True),
    Family(
        "gpt_neox",
        "gpt_neox.layers",
        _fused("attention", "input_layernorm", "post_attention_layernorm"),
        variants=(Variant({"use_parallel_residual": True}, _fused("attention", "input_layernorm", None)),),
        defaults={"use_parallel_residual": True},
        renames=(("embed_out.", "lm_head."),),
    ),
    Family(
        "bloom",
        "transformer.h",
        _fused("self_attention", "input_layernorm", "post_attention_layernorm"),
        tuple_output=True,
        variants=(Variant({"apply_residual_connection_post_layernorm": True}, _fused("self_attention", None, None)),),
        defaults={"apply_residual_connection_post_layernorm": False},
    ),
    Family(
        "falcon",
        "transformer.h",
        _fused("self_attention", "input_layernorm", "post_attention_layernorm"),
        tuple_output=True,
        variants=(
            Variant(
                {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
                _shared_input("input_layernorm"),
            ),
            Variant({"new_decoder_architecture": True}, _fused("self_attention", "ln_attn", None)),
            Variant({"parallel_attn": True}, _shared_input("input_layernorm")),
        ),
        defaults={"new_decoder_architecture": False, "num_ln_in_parallel_attn": None, "parallel_attn": True},
    ),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family(config: Mapping[str, Any]) -> Family:
    """The row for a model, with the groups that its config implies.

    Args:
        config: `config.json` as a dict.

    Raises:
        UsageError: the config names no `model_type`.
        UnsupportedError: a model type without a row; mixtures of experts are named as such.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UsageError("config.json names no model_type", hint="is this the folder of a transformers model?")
    row = FAMILIES.get(model_type)
    if row is None:
        if any(config.get(key) for key in _EXPERT_KEYS):
            raise UnsupportedError(
                f"{model_type} is a mixture of experts, whose fused expert weights qcli does not quantize yet"
            )
        raise UnsupportedError(
            f"model type {model_type!r} is not supported", hint=f"supported: {', '.join(sorted(FAMILIES))}"
        )
    settings = {**row.defaults, **config}
    for variant in row.variants:
        if all(settings[key] == value for key, value in variant.when.items()):
            return replace(row, groups=variant.groups, variants=())
    return replace(row, variants=())


def block_count(config: Mapping[str, Any]) -> int:
    """Number of blocks a config announces; it may lie in the `text_config` of a multimodal model.

    Raises:
        UsageError: the config does not say.
    """
    text = config.get("text_config") or config
    count = text.get("num_hidden_layers", text.get("n_layer"))
    if not isinstance(count, int) or count < 1:
        raise UsageError("config.json does not say how many blocks the model has (num_hidden_layers)")
    return count
