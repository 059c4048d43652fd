"""Text to token ids and back: prompts, chat templates, the tokens that end a turn, and text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcli.models.folder import read_json
from qcli.models.source import ModelSource, reported
from qcli.utils.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

_UNFINISHED = "\ufffd"  # what decoders make of bytes that are no whole character
_CONTEXT = 8  # tokens in which a character is found
_ANSWER = "Fortytwo"
_DEFAULT = "default"  # the name of a template that has none


class Prompts:
    """Makes token ids of prompts, as one model takes them.

    Args:
        source: the model.
        template: name of the chat template, where the model has several; None: its default.
    """

    def __init__(self, source: ModelSource, template: str | None = None) -> None:
        self._source, self._template = source, template
        self.tokenizer: PreTrainedTokenizerBase = source.tokenizer()

    def text(self, prompt: str) -> list[int]:
        """Token ids of a text to continue.

        Raises:
            UsageError: it is empty or no text.
        """
        _require_text(prompt)
        return self._encode(prompt, special=True)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the model's turn begins.

        Raises:
            UsageError: the last message is empty or no text, the model has no such template, or the template refuses
                the messages.
        """
        _require_text(messages[-1]["content"])
        return self._encode(self._render(messages, add_generation_prompt=True), special=False)

    def require_template(self) -> None:
        """Check that the model has the chat template.

        Raises:
            UsageError: it has none, none of this name, or several without a default.
        """
        templates: Any = getattr(self.tokenizer, "chat_template", None)
        if not templates:
            raise UsageError(f"{self._source.path} has no chat template", hint="without --chat it continues a text")
        names = sorted(templates) if isinstance(templates, dict) else [_DEFAULT]
        if (name := self._template or _DEFAULT) not in names:
            raise UsageError(
                f"{self._source.path} has no chat template {name!r}", hint=f"--chat-template {' or '.join(names)}"
            )

    def ends(self, *, chat: bool) -> frozenset[int]:
        """The tokens that end a text, by the generation config, the config and the tokenizer; of a chat also what the
        template puts behind the model's turns."""
        ends = {*_ids(self._source.config.get("eos_token_id")), *_ids(self.tokenizer.eos_token_id)}
        folder = self._source.tokenizer_path
        if folder.is_dir() and (folder / "generation_config.json").exists():
            ends |= {*_ids(read_json(folder / "generation_config.json").get("eos_token_id"))}
        return frozenset(ends | self._turn_ends() if chat else ends)

    def _turn_ends(self) -> set[int]:
        turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": _ANSWER}]
        _, _, tail = self._render(turns).rpartition(_ANSWER)
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return {token for token in self._encode(tail.lstrip(), special=False)[:1] if token in special}

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        self.require_template()
        templates: Any = self.tokenizer.chat_template
        text = templates[self._template or _DEFAULT] if isinstance(templates, dict) else templates
        with reported(f"{self._source.path}: the chat template fails"):
            rendered: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=text, tokenize=False, **options
            )
        return str(rendered)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        with reported(f"{self._source.path}: its tokenizer fails"):
            encoded: Any = self.tokenizer(text, add_special_tokens=special, verbose=False)
        return [int(token) for token in encoded["input_ids"]]


class TextStream:
    """Text of tokens that come one by one. A character is given out when all its tokens are there.

    Args:
        context: the tokens before, on which text depends in some vocabularies (the space before a word).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = self._last_character(list(context[-_CONTEXT:]))
        self._whole = len(self._tokens)  # after so many of them no character is unfinished
        self._given = len(self._decode(self._tokens))

    def add(self, token: int) -> str:
        """The text that a further token completes; it may be empty."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(_UNFINISHED):
            return self._give(text.rstrip(_UNFINISHED))
        given = self._give(text)
        if given:  # the tokens since the last whole character are context enough
            self._tokens = self._tokens[self._whole :]
            self._whole, self._given = len(self._tokens), len(self._decode(self._tokens))
        return given

    def end(self) -> str:
        """What is left, with replacement characters for unfinished ones."""
        return self._give(self._decode(self._tokens))

    def _give(self, text: str) -> str:
        given, self._given = text[self._given :], max(self._given, len(text))
        return given

    def _last_character(self, tokens: list[int]) -> list[int]:
        """As few of the last tokens as begin with a whole character; none if there are none such."""
        for start in reversed(range(len(tokens))):
            text = self._decode(tokens[start:])
            if text and not text.startswith(_UNFINISHED):
                return tokens[start:]
        return []

    def _decode(self, tokens: Sequence[int]) -> str:
        text: Any = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def _require_text(prompt: str) -> None:
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("the prompt is not valid UTF-8")


def _ids(value: Any) -> list[int]:
    """Token ids of a config's field: one, several, or none."""
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int)]
