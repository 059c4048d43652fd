"""A loaded model as lm-eval sees it: its own `HFLM`, with checked token ids and without noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qcli.data.tokens import require_known_ids

if TYPE_CHECKING:
    from qcli.models.source import ModelSource

_BARS = ("lm_eval.api.model", "lm_eval.api.task", "lm_eval.models.huggingface")  # modules that draw them


def wrapped(loaded: Any, source: ModelSource) -> Any:
    """The model for `simple_evaluate`; ids that the model has no embedding for are a UsageError, as for texts."""
    from lm_eval.models.huggingface import HFLM

    class Checked(HFLM):  # type: ignore[misc]
        def tok_encode(self, *arguments: Any, **options: Any) -> Any:
            ids = super().tok_encode(*arguments, **options)
            flat = ids if not ids or isinstance(ids[0], int) else [each for inner in ids for each in inner]
            require_known_ids(source, tokenizer, max(flat, default=0))
            return ids

        def tok_batch_encode(self, *arguments: Any, **options: Any) -> Any:
            ids, mask = super().tok_batch_encode(*arguments, **options)
            require_known_ids(source, tokenizer, int(ids.max()) if ids.numel() else 0)
            return ids, mask

    tokenizer = source.tokenizer()
    return Checked(pretrained=loaded, tokenizer=tokenizer, batch_size=8)


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
