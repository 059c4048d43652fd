"""The tokens that a text begins with: those that the model's tokenizer puts before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from qcli.utils.errors import UsageError

if TYPE_CHECKING:
    from qcli.models.source import ModelSource

Bos = Literal["auto", True, False]
"""Whether windows of text begin with a begin token: as the tokenizer does, always, or never."""

_TEXT = "a"  # what any tokenizer knows


def begin_tokens(source: ModelSource, bos: Bos) -> list[int]:
    """The ids before the text of every window: what the tokenizer puts there, or where it adds nothing and `bos` is
    true, its begin token. Most tokenizers have one or none, some (GLM) two.

    Raises:
        UsageError: `bos` is true, and the tokenizer has no begin token.
    """
    if bos is False:
        return []
    tokenizer: Any = source.tokenizer()
    own = _own_begin(source)
    if own or bos == "auto":
        return own
    if tokenizer.bos_token_id is None:
        raise UsageError(
            f"{source.path}: bos is true, but its tokenizer has no begin token",
            hint="bos: auto does as the tokenizer does; or name its `bos_token` in tokenizer_config.json",
        )
    return [int(tokenizer.bos_token_id)]


def _own_begin(source: ModelSource) -> list[int]:
    """What the tokenizer itself puts before plain text."""
    from qcli.models.source import reported

    tokenizer: Any = source.tokenizer()
    with reported(f"{source.path}: its tokenizer fails"):
        whole: list[int] = tokenizer(_TEXT, verbose=False)["input_ids"]
        text: list[int] = tokenizer(_TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if text and whole[start : start + len(text)] == text:
            return [int(token) for token in whole[:start]]
    return [int(token) for token in whole[:1] if token == tokenizer.bos_token_id]
