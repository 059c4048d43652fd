"""Model families as data: the linears of a block, which of them share an input, where their outputs go, and which
channels between two modules can be scaled.

A family is one row of `FAMILIES`; only the GGUF writer has a table of its own (llama.cpp's architectures). Tests check
each row on a tiny model of its class: the streamed forward pass must equal the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from qcli.utils.errors import UnsupportedError, UsageError


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input.

    Attributes:
        linears: module paths inside the block.
        residual: path of the module whose input is the residual stream that the outputs are added to; None if the
            outputs pass a norm first, or no module reads the stream there.
        leads_out: whether the outputs leave the attention or the MLP, the module around the linear, which computes
            nothing afterwards that a later group needs.
        last_reader: index of the last group whose inputs the outputs of this one reach, if they reach nothing else;
            None: they leave attention or MLP, or it is not known what reads them.
        experts: the linears of each expert, all of which read one input: the tokens that are routed to the expert.
            Empty: all `linears` read one input.
    """

    linears: tuple[str, ...]
    residual: str | None = None
    leads_out: bool = False
    last_reader: int | None = None
    experts: tuple[tuple[str, ...], ...] = ()

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """The linears by what they read: those of one expert, or all."""
        return self.experts or (self.linears,)


Rows = Literal["all", "second half", "stacked v", "interleaved v"]
"""The output rows of a producer that its readers see: all; the up half of a fused gate and up projection; or the values
of a fused attention projection, which stacks all queries, keys and values, or interleaves them by kv head."""


@dataclass(frozen=True)
class Places:
    """Where the channels of a discovered fold are.

    Attributes:
        outputs: the channel of each output of the producer; -1: it is none of them.
        inputs: the same of each input of the readers.
    """

    outputs: Sequence[int]
    inputs: Sequence[int]


@dataclass(frozen=True)
class Fold:
    """Channels that can be divided by positive factors in one module and multiplied by them in the next.

    In between, each channel passes only operations that commute with a positive factor, and nothing else reads it:
    attention averages values over tokens (a query head reads the channels of its kv head), a gate multiplies the up
    projection, a ReLU is applied.

    Attributes:
        producer: path of a norm or linear in the block.
        readers: all linears that read these channels.
        rows: which outputs of the producer they are.
        when: settings of the config that the equivalence requires.
        norm_offset: number that a norm as the producer adds to its weight before it multiplies by it.
        dense: names of matrices `[out, in]` that read these channels too and stay dense, such as a router's.
        places: of a discovered fold, in place of `rows`.
    """

    producer: str
    readers: tuple[str, ...]
    rows: Rows = "all"
    when: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0
    dense: tuple[str, ...] = ()
    places: Places | None = None


TOKEN_CHANNELS = 3
"""Channels in which a token's number travels with the hidden states: its digits to the base of 256."""


@dataclass(frozen=True)
class Passing:
    """What a block of a discovered model is given, and hands on to the next.

    Attributes:
        tokens: whether blocks have arguments that depend on the tokens, besides the hidden states.
        before: sizes of dimensions of the hidden states before batch and length.
        after: the same between those two and the channels.
        shared: heads and channels of the keys and values that blocks leave for later ones, by kind of attention.
        obstacle: why blocks cannot run one by one; empty: they can.
        n_outputs: what a block returns, if that is a tuple: the hidden states and others, which nothing needs.
    """

    tokens: bool = False
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    shared: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    obstacle: str = ""
    n_outputs: int = 2

    @property
    def n_shared(self) -> int:
        """Channels of all those keys and values."""
        return sum(heads * size for states in self.shared.values() for heads, size in states)

    def width(self, hidden: int) -> int:
        """Channels that pass from block to block for each token, where hidden states have `hidden`."""
        return prod((*self.before, *self.after)) * hidden + self.n_shared + TOKEN_CHANNELS * self.tokens


@dataclass(frozen=True)
class Variant:
    """Groups and folds of models whose config has these settings."""

    when: Mapping[str, Any]
    groups: tuple[Group, ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class Family:
    """A `model_type`.

    Attributes:
        model_type: as in `config.json`.
        blocks: path of the list of blocks in the causal LM.
        groups: all 2-D weights of a block, in order of computation.
        folds: channels that can be scaled; inputs of linears that no fold lists as readers cannot.
        norm_offset: of a row: number that the family's norms add to their weight before they multiply by it.
        tuple_output: whether blocks return a tuple, whose first element is the hidden states.
        conv1d: whether weights are stored `[in, out]`.
        variants: other groups and folds, by settings of the config; the first match applies.
        defaults: values of settings in `variants` and `folds` that a config may omit.
        renames: prefixes of tensor names on disk, and those in the causal LM; None: names are converted as transformers
            converts them (`qcli.models.names`), which takes the time to build its model.
        embedding_name: name of the token embedding, which is beside the list of blocks.
        tied: whether head and embedding are one matrix if a config does not have `tie_word_embeddings`.
        own_linear: whether linear layers are a class of the family's own, which reads the weight itself.
        dense_parts: paths of modules that text does not pass, such as vision towers: their layers stay dense.
        groups_by_block: of a discovered model: the groups of each block; a row has the same `groups` for all.
        folds_by_block: of a discovered model: the folds of each block; a row has the same `folds` for all.
        unfolded: of a discovered model: by path in a block why a norm's channels cannot be scaled.
        embedding_path: of a discovered model: path of the token embedding.
        text_path: path of the module that runs on text alone, with its head; empty: the model itself.
        discovered: whether this is no row, but was found in the model itself.
        passing: what blocks are given; a row's are given hidden states, and the same masks and tables for all tokens.
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
    renames: tuple[tuple[str, str], ...] | None = ()
    embedding_name: str = "embed_tokens"
    tied: bool = False
    own_linear: bool = False
    dense_parts: tuple[str, ...] = ()
    groups_by_block: tuple[tuple[Group, ...], ...] = ()
    folds_by_block: tuple[tuple[Fold, ...], ...] = ()
    unfolded: Mapping[str, str] = field(default_factory=dict)
    embedding_path: str = ""
    text_path: str = ""
    discovered: bool = False
    passing: Passing = field(default_factory=Passing)

    @property
    def n_blocks(self) -> int:
        """Number of blocks; 0: a row does not know it."""
        return len(self.groups_by_block)

    @property
    def embedding(self) -> str:
        """Path of the token embedding in the causal LM."""
        return self.embedding_path or f"{self.blocks.rpartition('.')[0]}.{self.embedding_name}"

    def paths_of(self, block: int) -> list[str]:
        """Paths of a block's quantizable linears, in order of computation."""
        return [path for group in self.groups_of(block) for path in group.linears]

    def groups_of(self, block: int) -> tuple[Group, ...]:
        """The groups of a block, in order of computation."""
        return self.groups_by_block[block] if self.groups_by_block else self.groups

    def folds_of(self, block: int) -> tuple[Fold, ...]:
        """The folds of a block."""
        if self.discovered:
            return self.folds_by_block[block]
        return tuple(replace(fold, norm_offset=self.norm_offset) for fold in self.folds)

    def unscaled(self, block: int, has_weight: Callable[[str], bool]) -> list[str]:
        """Paths of a block's linears whose inputs cannot be scaled, in order of computation.

        Args:
            has_weight: whether the module at a path has a weight; factors cannot be folded into a norm without one.
        """
        folds = self.folds_of(block)
        scaled = {reader for fold in folds if has_weight(fold.producer) for reader in fold.readers}
        return [path for path in self.paths_of(block) if path not in scaled]


@dataclass(frozen=True)
class Linear:
    """A quantizable layer.

    Attributes:
        name: module name in the causal LM, such as `model.layers.0.self_attn.q_proj`.
        block: index of its block.
        group: index of its group in the family's row.
        shape: `(out_features, in_features)`, also where weights are stored `[in, out]`.
    """

    name: str
    block: int
    group: int
    shape: tuple[int, int]

    @property
    def path(self) -> str:
        """Module path inside the block, such as `self_attn.q_proj`."""
        return self.name.partition(f".{self.block}.")[2]


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused(layers: Iterable[Linear]) -> list[list[Linear]]:
    """Sets of layers that engines fuse into one, and which therefore need the same format; other layers alone."""
    sets: dict[str, list[Linear]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        first = next((names[0] for names in _FUSED if leaf in names), leaf)
        sets.setdefault(f"{parent}.{first}", []).append(layer)
    return list(sets.values())


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
    """Groups of the fused-qkv families; a norm reads the residual stream that the output is added to."""
    return (
        Group((f"{attention}.query_key_value",)),
        _out(f"{attention}.dense", first_norm),
        Group(("mlp.dense_h_to_4h",)),
        _out("mlp.dense_4h_to_h", second_norm),
    )


def _fused_folds(
    attention: str, first_norm: str | None = "input_layernorm", second_norm: str | None = "post_attention_layernorm"
) -> tuple[Fold, ...]:
    """Folds of the fused-qkv families; None for a norm whose output is also read elsewhere."""
    attention_in, mlp_in = f"{attention}.query_key_value", "mlp.dense_h_to_4h"
    norms = ((first_norm, attention_in), (second_norm, mlp_in))
    return (
        *(Fold(norm, (reader,)) for norm, reader in norms if norm is not None),
        Fold(attention_in, (f"{attention}.dense",), rows="interleaved v"),
    )


def _falcon_one_norm(**when: Any) -> Variant:
    """Falcon's parallel blocks, with one norm for attention and MLP."""
    readers = ("self_attention.query_key_value", "mlp.dense_h_to_4h")
    return Variant(
        when,
        (Group(readers), _out("self_attention.dense", "input_layernorm"), _out("mlp.dense_4h_to_h")),
        (Fold("input_layernorm", readers), *_fused_folds("self_attention", None, None)),
    )


_ROWS = (
    *(
        Family(model_type, "model.layers", _LLAMA, _LLAMA_FOLDS)
        for model_type in ("llama", "mistral", "qwen2", "qwen3")
    ),
    Family("smollm3", "model.layers", _LLAMA, _LLAMA_FOLDS, tied=True),
    Family("gemma", "model.layers", _LLAMA, _LLAMA_FOLDS, norm_offset=1.0, tied=True),
    *(
        Family(model_type, "model.layers", _POST_NORM, _SANDWICH_FOLDS, norm_offset=1.0, tied=True)
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
        tied=True,
        dense_parts=("model.vision_tower", "model.multi_modal_projector"),
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
        tied=True,
    ),
    Family("gpt2", "transformer.h", _GPT2, _GPT2_FOLDS, conv1d=True, embedding_name="wte", tied=True),
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
        embedding_name="embed_in",
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
        embedding_name="word_embeddings",
        tied=True,
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
        embedding_name="word_embeddings",
        tied=True,
        own_linear=True,
    ),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}

_MOST_BLOCKS = 10_000


def has_row(config: Mapping[str, Any]) -> bool:
    """Whether the table has the model's type.

    Raises:
        UsageError: the config has no `model_type`.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UsageError("config.json has no model_type", hint="is this the folder of a transformers model?")
    return model_type in FAMILIES


def family(config: Mapping[str, Any]) -> Family:
    """The row of a model, with the groups and folds that its config implies.

    Args:
        config: `config.json` as a dict.

    Raises:
        UsageError: the config has no `model_type`.
        UnsupportedError: there is no row for it.
    """
    if not has_row(config):
        raise UnsupportedError(
            f"model type {config['model_type']!r} is not supported here",
            hint=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    row = FAMILIES[config["model_type"]]
    settings = {**row.defaults, **config}
    variant = next((variant for variant in row.variants if _matches(variant.when, settings)), row)
    folds = tuple(fold for fold in variant.folds if _matches(fold.when, settings))
    return replace(row, groups=_with_readers(variant.groups), folds=folds, variants=())


def _with_readers(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups of a row, where outputs that do not lead out reach the next groups up to the last that does."""
    known = []
    for at, group in enumerate(groups):
        last = at + 1
        while last + 1 < len(groups) and groups[last + 1].leads_out:
            last += 1
        known.append(group if group.leads_out else replace(group, last_reader=last))
    return tuple(known)


def _matches(when: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    return all(settings[key] == value for key, value in when.items())


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: `text_config` of a multimodal one, else all of it.

    Raises:
        UsageError: `text_config` is not a mapping.
    """
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise UsageError("config.json: text_config is not a mapping", hint="download the model again")
    return text


def block_count(config: Mapping[str, Any]) -> int:
    """Number of blocks, from the config or the `text_config` of a multimodal model.

    Raises:
        UsageError: the config does not have it.
    """
    text = text_config(config)
    count = text.get("num_hidden_layers", text.get("n_layer"))
    if not isinstance(count, int) or not 1 <= count <= _MOST_BLOCKS:
        raise UsageError("config.json does not have the number of blocks (num_hidden_layers)")
    return count
