"""A tokenizer as a GGUF file stores it: tokens, their types, merges or scores, and the pre-tokenizer.

Byte-level BPE becomes llama.cpp's `gpt2`, with the name that llama.cpp has for the pre-tokenizer's pattern. BPE with
byte fallback, which is what tokenizers makes of a SentencePiece model, becomes `llama`, where the score of a token is
the negative rank of the merge that makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcli.utils.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Patterns of pre-tokenizers in Hugging Face's tokenizers, and llama.cpp's names for them (src/llama-vocab.cpp, 2026).
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    _CASELESS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CASELESS + r"\p{N}" + _REST: "qwen2",
    _TEKKEN: "tekken",
}
_NO_MERGE = -1e6  # score of a token that no merge makes
_SPECIAL = ("bos", "eos", "unk", "pad")


def write(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Write a tokenizer into a GGUF file.

    Args:
        writer: gguf.GGUFWriter.
        size: number of rows of the embedding, at least that of the tokens.

    Raises:
        UnsupportedError: it is not one of these kinds of BPE, or llama.cpp has no name for its pre-tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported("has no tokenizer.json")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"is {model['type']}, not BPE")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise _unsupported("has no merges, which llama.cpp requires")
    tokens, types = _tokens(tokenizer, described, size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(described))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in _SPECIAL:
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(tokenizer.bos_token_id in tokenizer("a").input_ids[:1])
    _write_chat_templates(writer, tokenizer.chat_template)


def _write_chat_templates(writer: Any, templates: Any) -> None:
    """One template, or several by name, of which the writer of gguf would list the names in an order of chance."""
    import gguf

    keys = gguf.Keys.Tokenizer
    named = {"default": templates} if isinstance(templates, str) else dict(templates or {})
    if (default := named.pop("default", None)) is not None:
        writer.add_string(keys.CHAT_TEMPLATE, default)
    names = {name: re.sub(r"\W", "_", name, flags=re.ASCII) for name in sorted(named)}
    for name, key in names.items():
        writer.add_string(keys.CHAT_TEMPLATE_N.format(name=key), named[name])
    if names:
        writer.add_array(keys.CHAT_TEMPLATES, list(names.values()))


def _tokens(tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of each row of the embedding."""
    from gguf import TokenType

    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in described["added_tokens"]}
    unknown = described["model"].get("unk_token")
    if max(names) >= size:
        raise _unsupported(f"has {max(names) + 1} tokens, the embedding {size} rows")
    tokens, types = [], []
    for index in range(size):
        text = names.get(index, f"[PAD{index}]")
        if index not in names:
            type = TokenType.UNUSED
        elif text == unknown:
            type = TokenType.UNKNOWN
        elif index in added:
            type = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        elif described["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            type = TokenType.BYTE
        else:
            type = TokenType.NORMAL
        tokens.append(text)
        types.append(int(type))
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores by merge rank: llama.cpp merges the pair with the highest score, tokenizers that with the first rank."""
    first: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", "", 1), -float(rank))
    return [first.get(token, _NO_MERGE) for token in tokens]


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether the normalizer or the pre-tokenizer prepends a space to the text."""
    parts = [*_parts(described["normalizer"], "normalizers"), *_parts(described["pre_tokenizer"], "pretokenizers")]
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _pre_tokenizer(described: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer."""
    if described["normalizer"] is not None and described["normalizer"]["type"] != "NFC":
        raise _unsupported(f"normalizes text ({described['normalizer']['type']})")
    *before, last = _parts(described["pre_tokenizer"], "pretokenizers") or [{"type": None}]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if last["use_regex"] and not before:
            return "gpt-2"
        if last["use_regex"] and [part["type"] for part in before] == ["Digits"] and before[0]["individual_digits"]:
            return "smollm"
        if not last["use_regex"] and [part["type"] for part in before] == ["Split"]:
            name = _PATTERNS.get(before[0]["pattern"].get("Regex", ""))
            if name is not None:
                return name
    raise _unsupported("has a pre-tokenizer that llama.cpp does not know")


def _parts(component: Mapping[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """The members of a `Sequence`; otherwise the component itself."""
    if component is None:
        return []
    return list(component[members]) if component["type"] == "Sequence" else [dict(component)]


def _unsupported(reason: str) -> UnsupportedError:
    return UnsupportedError(f"gguf: the model's tokenizer {reason}", hint="pack it as qcli or dense")
