"""A loaded model as lm-eval sees it: its own `HFLM`, with checked token ids and without noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qcli.data.begin import Bos, begin_tokens
from qcli.data.tokens import require_known_ids
from qcli.utils.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qcli.models.source import ModelSource

BATCH_SIZE = 8  # questions that run together

_BARS = ("lm_eval.api.model", "lm_eval.api.task", "lm_eval.models.huggingface")  # modules that draw them


def wrapped(loaded: Any, source: ModelSource, bos: Bos = "auto", batch_size: int = BATCH_SIZE) -> Any:
    """The model for `simple_evaluate`.

    Args:
        bos: whether prompts begin with a begin token.
        batch_size: prompts that run together.

    Raises:
        UnsupportedError: the tokenizer adds no begin token and cannot be made to.
        UsageError: the tokenizer has neither a begin nor an end token. Later: it gives an id that the model has no
            embedding for, as for texts.
    """
    from lm_eval.models.huggingface import HFLM

    class Checked(HFLM):  # type: ignore[misc]
        def tok_encode(self, *arguments: Any, **options: Any) -> Any:
            ids = super().tok_encode(*arguments, **options)
            flat = ids if not ids or isinstance(ids[0], int) else [each for inner in ids for each in inner]
            require_known_ids(source, max(flat, default=0))
            return ids

        def tok_batch_encode(self, *arguments: Any, **options: Any) -> Any:
            ids, mask = super().tok_batch_encode(*arguments, **options)
            require_known_ids(source, int(ids.max()) if ids.numel() else 0)
            return ids, mask

        def tok_decode(self, tokens: Any, *arguments: Any, **options: Any) -> Any:
            # lm-eval decodes the end token to stop at it. Where there is none, there is no such text.
            return None if tokens is None else super().tok_decode(tokens, *arguments, **options)

    tokenizer = deepcopy(source.tokenizer())  # what is changed here concerns tasks alone
    _require_padding(source, tokenizer)
    if bos is True:
        _require_begin(source, tokenizer)
    begin = None if bos == "auto" else bos
    return Checked(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=begin)


def _require_begin(source: ModelSource, tokenizer: Any) -> None:
    """Let the tokenizer begin texts with its begin token."""
    begin = begin_tokens(source, True)
    if begin != begin_tokens(source, "auto"):
        tokenizer.add_bos_token = True
    if tokenizer("a", verbose=False)["input_ids"][: len(begin)] != begin:
        raise UnsupportedError(
            f"{source.path}: bos is true, but its tokenizer cannot be made to begin the prompts of tasks",
            hint="bos: auto does as the tokenizer does",
        )


def _require_padding(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer pad with a token that the model has: lm-eval would add a new one, for which there is no row.

    What is padded is masked, so any token gives the same results.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UsageError(
            f"{source.path}: the tokenizer has neither a begin nor an end token, which tasks need in place of an empty "
            "context",
            hint="evaluate it without --tasks, or name its `bos_token` in tokenizer_config.json",
        )
    vocabulary = source.hf_config().get_text_config().vocab_size
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
        tokenizer.pad_token_id = next(token for token in ends if token is not None)


@contextmanager
def hushed(*, bars: bool) -> Iterator[None]:
    """Within: lm-eval does not ask git about the current folder, which complains where it is no repository, `datasets`
    does not log an error that is reported, and no bars are drawn, unless `bars`."""
    import logging

    def without_bar(tqdm: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: tqdm(*arguments, **{**options, "disable": True})

    replacements: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (import_module("lm_eval.evaluator"), "get_git_commit_hash", lambda _: lambda: None)
    ]
    if not bars:
        replacements += [(import_module(module), "tqdm", without_bar) for module in _BARS]
    logger = logging.getLogger("datasets")
    with ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        for module, name, replace in replacements:
            if (original := getattr(module, name, None)) is not None:
                setattr(module, name, replace(original))
                stack.callback(setattr, module, name, original)
        yield
