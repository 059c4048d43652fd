"""Text from a model, token by token, with a key-value cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from qcli.data.tokens import require_known_ids
from qcli.inference.prompt import TextStream
from qcli.models.kv_cache import empty_cache
from qcli.models.source import ModelSource
from qcli.utils.errors import UsageError, VerificationError

_ROOM = 1024  # new tokens that memory is reserved for at first
END, LENGTH, CONTEXT = "end", "length", "context"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many.

    Attributes:
        max_new_tokens: at most.
        temperature: of the softmax; 0: always the most probable token.
        top_p: draw from the most probable tokens that together have this probability.
        seed: of the generator, which is used for nothing else.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """What was generated, and how fast.

    Attributes:
        text: the new text.
        tokens: the new tokens, without the one that ended the text.
        prompt_tokens: number of tokens before.
        stopped: `end` (the model's end token), `length` (max_new_tokens) or `context` (the context is full).
        first_seconds: from the prompt's tokens to the first new token.
        tokens_per_second: of the tokens after the first; None: there are none.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    stopped: str
    first_seconds: float
    tokens_per_second: float | None


class Generator:
    """Continues token sequences. Keys and values stay from call to call: of a sequence that starts with the last one,
    only the rest is computed.

    Args:
        source: the model.
        model: `source`, as `load_model` returns it.
        ends: tokens that end a text.
    """

    def __init__(self, source: ModelSource, model: Any, tokenizer: Any, ends: Collection[int] = ()) -> None:
        self._source, self._model, self._tokenizer, self._ends = source, model, tokenizer, ends
        self._blocks = source.n_blocks
        self._cache, self._cached = empty_cache(self._blocks, 0), list[int]()
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], sampling: Sampling, emit: Callable[[str], object]) -> Generation:
        """Continue a prompt.

        Args:
            emit: takes each piece of text as soon as it is complete.

        Raises:
            UsageError: as `require_fit`.
            VerificationError: logits are not finite.
        """
        require_fit(prompt, self._source)
        room = len(prompt) + sampling.max_new_tokens
        if (context := self._source.context_length) is not None:
            room = min(room, context)
        generator = torch.Generator(self._model.device).manual_seed(sampling.seed)
        stream, tokens, text = TextStream(self._tokenizer, prompt), list[int](), list[str]()

        def give(piece: str) -> None:
            if piece:
                text.append(piece)
                emit(piece)

        started = time.perf_counter()
        token = _choose(self._advance(prompt[self._known(prompt, room) :]), sampling, generator)
        first = last = time.perf_counter()
        while token not in self._ends:
            tokens.append(token)
            give(stream.add(token))
            if len(prompt) + len(tokens) == room:
                break
            token = _choose(self._advance([token]), sampling, generator)
            last = time.perf_counter()
        give(stream.end())
        ended = token in self._ends
        after_first = len(tokens) - 1 + ended
        return Generation(
            text="".join(text),
            tokens=tokens,
            prompt_tokens=len(prompt),
            stopped=END if ended else LENGTH if len(tokens) == sampling.max_new_tokens else CONTEXT,
            first_seconds=first - started,
            tokens_per_second=after_first / (last - first) if after_first else None,
        )

    def _known(self, prompt: Sequence[int], room: int) -> int:
        """How many tokens of a prompt are in the cache, which is emptied if it holds others."""
        known = len(self._cached)
        if known >= len(prompt) or self._cached != prompt[:known]:
            self._cache, self._cached = empty_cache(self._blocks, min(room, len(prompt) + _ROOM)), []
        return len(self._cached)

    def _advance(self, tokens: Sequence[int]) -> Tensor:
        """Logits `[vocab]` behind further tokens, which go to the cache; float32."""
        ids = torch.tensor([tokens], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._last_only)
        self._cached.extend(tokens)
        logits: Tensor = output.logits[0, -1]
        return logits.float()


def require_fit(prompt: Sequence[int], source: ModelSource) -> None:
    """Check that a model can continue a prompt.

    Raises:
        UsageError: it has no tokens or fills the context, or a token is none of the model's.
    """
    if not prompt:
        raise UsageError("the prompt is empty: the tokenizer makes no tokens of it")
    context = source.context_length
    if context is not None and len(prompt) >= context:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens, the model's context {context}", hint="shorten the prompt"
        )
    require_known_ids(source, max(prompt))


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token, from float32 logits `[vocab]`."""
    best, token = logits.max(-1)
    if sampling.temperature > 0:
        probabilities = ((logits - best) / sampling.temperature).softmax(-1)
        if sampling.top_p < 1:
            sorted_, order = probabilities.sort(descending=True)
            kept = sorted_.cumsum(-1) - sorted_ < sampling.top_p
            probabilities = torch.zeros_like(probabilities).index_copy(0, order, sorted_ * kept)
        token = probabilities.nan_to_num(1.0).multinomial(1, generator=generator)[0]
    chosen = int(torch.where(best.isfinite(), token, -1))
    if chosen < 0:
        raise VerificationError("the model's logits are not finite", hint="--dtype float32, or `qcli verify` on it")
    return chosen
