"""Model families as data: which linears a block has, who reads the same input, where their output goes, and which
channels between two modules may be scaled.

A family is one row of `FAMILIES`; nothing else in qcli knows a model by name. The rows are proven by a tiny
model of each class: the streamed forward equals the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qcli.utils.errors import UnsupportedError, UsageError


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


Rows = Literal["all", "second half", "stacked v", "interleaved v"]
"""Which output rows of a producer its readers see: all of them; the up half of a fused gate and up; the values of a
fused attention projection, with all queries, then all keys, then all values, or with each kv head's queries, key and
value together."""


@dataclass(frozen=True)
class Fold:
    """Channels that can be divided by any positive number in one module and multiplied by it in the next.

    Between the two a channel is only mixed with itself, linearly, and nothing else reads it. Values are averaged over
    tokens by attention, each query head reading the channels of its kv head; an up projection is multiplied by a gate,
    whatever that gate's activation; a ReLU commutes with positive numbers.

    Attributes:
        producer: path of a norm or linear in the block.
        readers: every linear that reads these channels.
        rows: which of the producer's outputs they are.
        when: settings of the config without which this is no equivalence.
    """

    producer: str
    readers: tuple[str, ...]
    rows: Rows = "all"
    when: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """The groups and folds of models whose config has these settings."""

    when: Mapping[str, Any]
    groups: tuple[Group, ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class Family:
    """What qcli knows of one `model_type`.

    Attributes:
        model_type: as in `config.json`.
        blocks: path of the list of blocks in the causal LM.
        groups: in order of computation; together they are every 2-D weight of a block.
        folds: what may be scaled; a linear that is no fold's reader has an input that cannot.
        norm_offset: what the family's norms add to their weight before they multiply with it.
        tuple_output: blocks return a tuple that starts with the hidden states.
        conv1d: weights are stored `[in, out]`.
        variants: other groups and folds, by settings of the config; the first that matches counts.
        defaults: what a config means that does not mention a setting of `variants` or `folds`.
        renames: prefixes of tensor names in older checkpoints, and today's.
    """

    model_type: str
    blocks: str
    groups: tuple[Group, ...]
    folds: tuple[Fold, ...]
    norm_offset: float = 0.0
    tuple_output: bool = False
    conv1d: bool = False
    variants: tuple[Variant, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()

    def unscaled(self, has_weight: Callable[[str], bool]) -> list[str]:
        """Paths of linears whose inputs no fold can scale, in order of computation.

        Args:
            has_weight: whether the module at a path has a weight; a norm without one has nothing to fold into.
        """
        scaled = {reader for fold in self.folds if has_weight(fold.producer) for reader in fold.readers}
        return [path for group in self.groups for path in group.linears if path not in scaled]


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

    @property
    def path(self) -> str:
        """Module path inside the block, `self_attn.q_proj`."""
        return self.name.partition(f".{self.block}.")[2]


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused(layers: Iterable[Linear]) -> list[list[Linear]]:
    """Layers that engines compute as one, which they can only in one format; every other layer alone."""
    found: dict[str, list[Linear]] = {}
    for layer in layers:
        parent, _, own = layer.name.rpartition(".")
        first = next((names[0] for names in _FUSED if own in names), own)
        found.setdefault(f"{parent}.{first}", []).append(layer)
    return list(found.values())


def _out(linear: str, residual: str | None = None) -> Group:
    return Group((linear,), residual, leads_out=True)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_INSIDE = (Fold("self_attn.v_proj", ("self_attn.o_proj",)), Fold("mlp.up_proj", ("mlp.down_proj",)))

_LLAMA = (
    Group(_QKV),
    _out("self_attn.o_proj", "input_layernorm"),
    Group(_GATE_UP),
    _out("mlp.down_proj", "post_attention_layernorm"),
)
_LLAMA_FOLDS = (Fold("input_layernorm", _QKV), Fold("post_attention_layernorm", _GATE_UP), *_INSIDE)

_POST_NORM = (Group(_QKV), _out("self_attn.o_proj"), Group(_GATE_UP), _out("mlp.down_proj"))
_SANDWICH_FOLDS = (Fold("input_layernorm", _QKV), Fold("pre_feedforward_layernorm", _GATE_UP), *_INSIDE)

_STABLELM_PARALLEL = Variant(
    {"use_parallel_residual": True},
    (
        Group((*_QKV, *_GATE_UP)),
        _out("self_attn.o_proj", "input_layernorm"),
        _out("mlp.down_proj"),
    ),
    (Fold("input_layernorm", (*_QKV, *_GATE_UP)), *_INSIDE),
)

_PHI3 = (
    Group(("self_attn.qkv_proj",)),
    _out("self_attn.o_proj", "input_layernorm"),
    Group(("mlp.gate_up_proj",)),
    _out("mlp.down_proj", "post_attention_layernorm"),
)
_PHI3_FOLDS = (
    Fold("input_layernorm", ("self_attn.qkv_proj",)),
    Fold("post_attention_layernorm", ("mlp.gate_up_proj",)),
    Fold("self_attn.qkv_proj", ("self_attn.o_proj",), rows="stacked v"),
    Fold("mlp.gate_up_proj", ("mlp.down_proj",), rows="second half"),
)

_OPT = (
    Group(_QKV),
    _out("self_attn.out_proj", "self_attn_layer_norm"),
    Group(("fc1",)),
    _out("fc2", "final_layer_norm"),
)
_OPT_INSIDE = (
    Fold("self_attn.v_proj", ("self_attn.out_proj",)),
    Fold("fc1", ("fc2",), when={"activation_function": "relu"}),
)
_OPT_FOLDS = (Fold("self_attn_layer_norm", _QKV), Fold("final_layer_norm", ("fc1",)), *_OPT_INSIDE)
_OPT_POST_NORM = Variant(
    {"do_layer_norm_before": False},
    (
        Group(_QKV),
        _out("self_attn.out_proj", "self_attn.q_proj"),
        Group(("fc1",)),
        _out("fc2", "fc1"),
    ),
    _OPT_INSIDE,
)

_GPT2 = (
    Group(("attn.c_attn",)),
    _out("attn.c_proj", "ln_1"),
    Group(("mlp.c_fc",)),
    _out("mlp.c_proj", "ln_2"),
)
_GPT2_FOLDS = (
    Fold("ln_1", ("attn.c_attn",)),
    Fold("ln_2", ("mlp.c_fc",)),
    Fold("attn.c_attn", ("attn.c_proj",), rows="stacked v"),
)


def _fused(attention: str, first_norm: str | None, second_norm: str | None) -> tuple[Group, ...]:
    """Groups of the fused-qkv families; a norm is where the stream that an output joins can be read."""
    return (
        Group((f"{attention}.query_key_value",)),
        _out(f"{attention}.dense", first_norm),
        Group(("mlp.dense_h_to_4h",)),
        _out("mlp.dense_4h_to_h", second_norm),
    )


def _fused_folds(
    attention: str, first_norm: str | None = "input_layernorm", second_norm: str | None = "post_attention_layernorm"
) -> tuple[Fold, ...]:
    """Folds of the fused-qkv families; None for a norm that something besides the linears reads."""
    attention_in, mlp_in = f"{attention}.query_key_value", "mlp.dense_h_to_4h"
    norms = ((first_norm, attention_in), (second_norm, mlp_in))
    return (
        *(Fold(norm, (reader,)) for norm, reader in norms if norm is not None),
        Fold(attention_in, (f"{attention}.dense",), rows="interleaved v"),
    )


def _falcon_one_norm(**when: Any) -> Variant:
    """Falcon's parallel blocks with one norm for attention and MLP."""
    readers = ("self_attention.query_key_value", "mlp.dense_h_to_4h")
    return Variant(
        when,
        (Group(readers), _out("self_attention.dense", "input_layernorm"), _out("mlp.dense_4h_to_h")),
        (Fold("input_layernorm", readers), *_fused_folds("self_attention", None, None)),
    )


_ROWS = (
    *(
        Family(model_type, "model.layers", _LLAMA, _LLAMA_FOLDS)
        for model_type in ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    ),
    Family("gemma", "model.layers", _LLAMA, _LLAMA_FOLDS, norm_offset=1.0),
    *(
        Family(model_type, "model.layers", _POST_NORM, _SANDWICH_FOLDS, norm_offset=1.0)
        for model_type in ("gemma2", "gemma3_text")
    ),
    Family("olmo2", "model.layers", _POST_NORM, _INSIDE),
    Family(
        "gemma3",
        "model.language_model.layers",
        _POST_NORM,
        _SANDWICH_FOLDS,
        norm_offset=1.0,
        renames=(
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model.language_model."),
            ("vision_tower.vision_model.", "model.vision_tower."),
            ("model.vision_tower.vision_model.", "model.vision_tower."),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ),
    ),
    Family("phi3", "model.layers", _PHI3, _PHI3_FOLDS),
    Family(
        "stablelm",
        "model.layers",
        _LLAMA,
        _LLAMA_FOLDS,
        variants=(_STABLELM_PARALLEL,),
        defaults={"use_parallel_residual": False},
    ),
    Family(
        "opt",
        "model.decoder.layers",
        _OPT,
        _OPT_FOLDS,
        variants=(_OPT_POST_NORM,),
        defaults={"do_layer_norm_before": True, "activation_function": "relu"},
    ),
    Family("gpt2", "transformer.h", _GPT2, _GPT2_FOLDS, conv1d=True),
    Family(
        "gpt_neox",
        "gpt_neox.layers",
        _fused("attention", "input_layernorm", "post_attention_layernorm"),
        _fused_folds("attention"),
        variants=(
            Variant(
                {"use_parallel_residual": True},
                _fused("attention", "input_layernorm", None),
                _fused_folds("attention"),
            ),
        ),
        defaults={"use_parallel_residual": True},
        renames=(("embed_out.", "lm_head."),),
    ),
    Family(
        "bloom",
        "transformer.h",
        _fused("self_attention", "input_layernorm", "post_attention_layernorm"),
        _fused_folds("self_attention"),
        tuple_output=True,
        variants=(
            Variant(
                {"apply_residual_connection_post_layernorm": True},
                _fused("self_attention", None, None),
                _fused_folds("self_attention", None, None),
            ),
        ),
        defaults={"apply_residual_connection_post_layernorm": False},
    ),
    Family(
        "falcon",
        "transformer.h",
        _fused("self_attention", "input_layernorm", "post_attention_layernorm"),
        _fused_folds("self_attention"),
        tuple_output=True,
        variants=(
            _falcon_one_norm(new_decoder_architecture=True, num_ln_in_parallel_attn=1),
            Variant(
                {"new_decoder_architecture": True},
                _fused("self_attention", "ln_attn", None),
                _fused_folds("self_attention", "ln_attn", "ln_mlp"),
            ),
            _falcon_one_norm(parallel_attn=True),
        ),
        defaults={"new_decoder_architecture": False, "num_ln_in_parallel_attn": None, "parallel_attn": True},
    ),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family(config: Mapping[str, Any]) -> Family:
    """The row for a model, with the groups and folds that its config implies.

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
    chosen = next((variant for variant in row.variants if _holds(variant.when, settings)), row)
    folds = tuple(fold for fold in chosen.folds if _holds(fold.when, settings))
    return replace(row, groups=chosen.groups, folds=folds, variants=())


def _holds(when: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    return all(settings[key] == value for key, value in when.items())


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
