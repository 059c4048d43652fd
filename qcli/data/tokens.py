"""Text to token windows: calibration samples drawn at random, evaluation windows back to back.

Where the tokenizer puts a begin token before a text, every window begins with it, too: models of such tokenizers have
never seen a sequence without. It counts as one of the window's tokens and is never predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcli.data.begin import Bos, begin_tokens
from qcli.data.calibration_folder import read_folder
from qcli.data.chats import chat_render
from qcli.data.datasets import is_folder, is_sampled, read_text
from qcli.data.default_text import named
from qcli.data.identity import content_key
from qcli.data.names import SELF
from qcli.data.offsets import window_offsets
from qcli.data.source import Data, TextSource, WeightedText, is_hub, label, parts
from qcli.models.manifest import versions
from qcli.models.source import reported
from qcli.utils.cache import Cache
from qcli.utils.device import hardware
from qcli.utils.errors import UsageError
from qcli.utils.progress import Progress, silent

if TYPE_CHECKING:
    from qcli.models.source import ModelSource

_SELF_WINDOWS = 32  # evaluation windows that are sampled by default


@dataclass(frozen=True)
class Tokens:
    """Token windows, and what they are.

    Attributes:
        ids: int64 `[windows, length]`, on the CPU.
        data: the text they were cut from, as the user named it; for `auto`, what stood for it.
        begin: how many of each window's tokens come before its text.
    """

    ids: Tensor
    data: Data
    begin: int = 0

    @property
    def name(self) -> str:
        """What the text is called in results."""
        return label(self.data)

    @property
    def bos(self) -> bool:
        """Whether windows begin with a begin token."""
        return self.begin > 0

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    @property
    def key(self) -> list[Any]:
        """Cache key of what is computed of the windows: the same ids may be cut into other windows."""
        return [self.sha256, list(self.ids.shape)]


@dataclass(frozen=True)
class TokenRequest:
    """Windows to draw at random from a text.

    Attributes:
        data: a set of `sets/` or on the hub (training part), or `auto` (see `default_text`); a file (`rows.kinds`);
            `self`, sampled from the model; several of them, which share the windows by weight; or a folder written by
            `qcli calibrate`, whose windows are used as they are, whatever else is here.
        samples, seq_len: number of windows, and tokens in each.
        seed: the same request gives the same windows.
        held_out: of `samples`, the last ones, which share no token with those before.
        validation: further windows, behind `samples`, that share no token with any other.
        bos: whether windows begin with a begin token; one that a folder's windows do not is refused.
    """

    data: Data
    samples: int
    seq_len: int
    seed: int | str
    held_out: int = 0
    validation: int = 0
    bos: Bos = "auto"


def calibration_tokens(
    request: TokenRequest,
    source: ModelSource,
    *,
    device: torch.device | str = "cpu",
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Tokens:
    """Windows at random places of a text, `samples` and behind them `validation` of the request.

    Args:
        source: the model: its tokenizer, its longest context and, for `self`, its weights.
        device: where `self` is sampled.
        cache: keeps the windows; None: nothing is kept.

    Raises:
        UsageError: no such data, unreadable, or too short; windows longer than the model's context; `bos` does not fit
            the tokenizer or the folder.
        ResourceError: not enough memory to sample from the model.
    """
    if isinstance(request.data, str):
        request = replace(request, data=named(request.data))
    if is_folder(request.data):
        return _from_folder(request.data, source, request.bos)
    begin = _begin(source, request.bos, request.seq_len)
    settings = [request.samples, request.seq_len, request.seed, request.held_out, request.validation]
    return _cached(
        request.data,
        source,
        {"calibration": settings},
        begin,
        torch.device(device),
        cache,
        lambda: _draw(request, source, begin, device, progress),
    )


def evaluation_tokens(
    data: str | TextSource,
    source: ModelSource,
    *,
    window: int,
    max_windows: int | None = None,
    bos: Bos = "auto",
    device: torch.device | str = "cpu",
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Tokens:
    """Consecutive windows that do not overlap, from the start of a text; a shorter rest is left out.

    Args:
        data: a set of `sets/` or on the hub (test or validation part), or `auto` (see `default_text`); a file
            (`rows.kinds`); `self`, sampled from `source` independently of any calibration, 32 windows unless
            `max_windows` is given; or a folder written by `qcli calibrate`, whose windows are truncated to `window`.
        window: tokens per window, at least 2, a begin token included; at most those of the calibration folder.
        max_windows: use only the first ones.
        bos, device, cache: as for `calibration_tokens`.

    Raises:
        UsageError: as `calibration_tokens`.
        ResourceError: not enough memory to sample from the model.
    """
    if window < 2:
        raise UsageError(f"a window of {window} leaves no token to predict", hint="a window has at least 2 tokens")
    data = named(data) if isinstance(data, str) else data
    if is_folder(data):
        whole = _from_folder(data, source, bos)
        if window > (length := whole.ids.shape[1]):
            raise UsageError(
                f"{data} has windows of {length} tokens, {window} are asked for",
                hint=f"--window {length} or less, or none",
            )
        return replace(whole, ids=whole.ids[:max_windows, :window].contiguous())
    begin = _begin(source, bos, window)
    return _cached(
        data,
        source,
        {"evaluation": [window, max_windows]},
        begin,
        torch.device(device),
        cache,
        lambda: _consecutive(data, source, window, max_windows, begin, device, progress),
    )


def require_training_samples(tokens: Tokens, held_out: int) -> None:
    """Raise UsageError unless there are more samples than are held out."""
    if len(tokens.ids) <= held_out:
        raise UsageError(
            f"{tokens.name} has {len(tokens.ids)} samples and {held_out} are held out: none is left to train on",
            hint="use more text, or more --samples",
        )


def _from_folder(data: str, source: ModelSource, bos: Bos) -> Tokens:
    """The folder's windows, which begin as they do.

    Raises:
        UsageError: damaged, too long for the model, or `bos` asks for another beginning.
    """
    ids = read_folder(Path(data), source)
    _require_context(ids.shape[1], source)
    begin = next((each for each in _beginnings(source) if _all_begin(ids, each)), [])
    if bos != "auto" and bos != bool(begin):
        have, asked = ("no", "true") if bos else ("a", "false")
        raise UsageError(
            f"{data}: its windows begin with {have} begin token, bos is {asked}",
            hint=f"bos: auto takes them as they are; or run `qcli calibrate --bos {asked}` again",
        )
    return Tokens(ids, data, len(begin))


def _beginnings(source: ModelSource) -> Iterator[list[int]]:
    """What windows of the model's text may begin with."""
    yield begin_tokens(source, "auto")
    if (bos := source.tokenizer().bos_token_id) is not None:
        yield [bos]


def _all_begin(ids: Tensor, begin: list[int]) -> bool:
    return 0 < len(begin) < ids.shape[1] and bool((ids[:, : len(begin)] == torch.tensor(begin)).all())


def _begin(source: ModelSource, bos: Bos, length: int) -> list[int]:
    """The begin tokens of windows of `length` tokens, which leave room for text."""
    begin = begin_tokens(source, bos)
    if begin:
        require_known_ids(source, max(begin))
    if len(begin) >= length:
        raise UsageError(
            f"windows of {length} tokens have no room for text behind {len(begin)} begin tokens",
            hint="use longer windows, or bos: false",
        )
    return begin


def _cached(
    data: Data,
    source: ModelSource,
    settings: dict[str, Any],
    begin: list[int],
    device: torch.device,
    cache: Cache | None,
    make: Callable[[], Tensor],
) -> Tokens:
    if cache is None or cache.folder is None or any(is_hub(part.path) for part in parts(data)):  # it may change there
        return Tokens(make(), data, len(begin))
    key = {**settings, "begin": begin, **content_key(data, source, calibration="calibration" in settings), **versions()}
    if is_sampled(data):
        key["computed"] = hardware(device)
    ids = cache.tensors(key, lambda: {"ids": make()}, _is_tokens)["ids"]
    require_known_ids(source, int(ids.max()))  # they may be those of a model with the same tokenizer and more rows
    return Tokens(ids, data, len(begin))


def _is_tokens(tensors: dict[str, Tensor]) -> bool:
    return tensors.keys() == {"ids"} and tensors["ids"].ndim == 2 and tensors["ids"].dtype == torch.int64


def _draw(
    request: TokenRequest, source: ModelSource, begin: list[int], device: torch.device | str, progress: Progress
) -> Tensor:
    _require_context(request.seq_len, source)
    texts = parts(request.data)
    if not isinstance(request.data, tuple):
        return _draw_of(texts[0], request, source, begin, device, progress)
    drawn = request.samples + request.validation
    owners = _shares(texts, request.samples) + _shares(texts, request.validation)
    ids = torch.empty(drawn, request.seq_len, dtype=torch.int64)
    held_out = range(request.samples - request.held_out, request.samples) if request.held_out else range(0)
    for number, text in enumerate(texts):
        own = [sample for sample in range(drawn) if owners[sample] == number]
        if not any(sample < request.samples for sample in own):
            raise UsageError(
                f"{text}: its weight of {text.weight:g} gives it none of {request.samples} samples",
                hint="raise its weight, or the number of samples",
            )
        share = replace(
            request,
            samples=sum(sample < request.samples for sample in own),
            held_out=sum(sample in held_out for sample in own),
            validation=sum(sample >= request.samples for sample in own),
            seed=f"{request.seed}:{number}",
        )
        ids[own] = _draw_of(text, share, source, begin, device, progress)
    return ids


def _shares(texts: Sequence[WeightedText], samples: int) -> list[int]:
    """Which text each sample is of: always the one that is furthest behind its share."""
    total, counts = sum(text.weight for text in texts), [0] * len(texts)
    owners = []
    for sample in range(1, samples + 1):
        missing = [text.weight / total * sample - count for text, count in zip(texts, counts, strict=True)]
        owners.append(missing.index(max(missing)))
        counts[owners[-1]] += 1
    return owners


def _draw_of(
    text: WeightedText,
    request: TokenRequest,
    source: ModelSource,
    begin: list[int],
    device: torch.device | str,
    progress: Progress,
) -> Tensor:
    """The windows of a request, of one text."""
    if text.path == SELF:
        from qcli.data.generated import sample

        windows, seed = request.samples + request.validation, f"calibration:{request.seed}"
        return sample(source, windows, request.seq_len, seed, begin, device, progress)
    ids = _encode(source, read_text(text, chat_render(source), calibration=True))
    span = request.seq_len - len(begin)
    if len(ids) <= span:
        raise UsageError(
            f"{text.path}: too short for calibration: {len(ids)} tokens, but a window of {request.seq_len} needs "
            f"{span + 1}",
            hint="use more text, or a smaller --seq-len",
        )
    offsets = window_offsets(
        text.path,
        span,
        len(ids),
        samples=request.samples,
        held_out=request.held_out,
        validation=request.validation,
        seed=request.seed,
    )
    return _after(begin, torch.stack([ids[offset : offset + span] for offset in offsets]))


def _after(begin: list[int], ids: Tensor) -> Tensor:
    """Windows `[windows, length]` behind begin tokens."""
    return torch.cat([torch.tensor(begin, dtype=ids.dtype).expand(len(ids), -1), ids], 1) if begin else ids


def _consecutive(
    data: str | TextSource,
    source: ModelSource,
    window: int,
    max_windows: int | None,
    begin: list[int],
    device: torch.device | str,
    progress: Progress,
) -> Tensor:
    _require_context(window, source)
    if label(data) == SELF:
        from qcli.data.generated import sample

        return sample(source, max_windows or _SELF_WINDOWS, window, "evaluation", begin, device, progress)
    ids = _encode(source, read_text(data, chat_render(source), calibration=False))
    span = window - len(begin)
    windows = len(ids) // span
    if windows == 0:
        raise UsageError(
            f"{label(data)}: too short for evaluation: {len(ids)} tokens, but one window needs {span}",
            hint="use more text, or a smaller --window",
        )
    return _after(begin, ids[: windows * span].view(windows, span)[:max_windows].clone())


def _encode(source: ModelSource, text: str) -> Tensor:
    tokenizer = source.tokenizer()
    with reported(f"{source.path}: the tokenizer fails on the text"):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids):
        require_known_ids(source, int(ids.max()))
    return ids


def require_known_ids(source: ModelSource, largest: int) -> None:
    """Raise UsageError if the model has no embedding for the largest id that its tokenizer gave."""
    vocabulary = source.hf_config().get_text_config().vocab_size
    if largest >= vocabulary:
        token = source.tokenizer().convert_ids_to_tokens(largest)
        raise UsageError(
            f"{source.path}: the tokenizer gives {token!r} the id {largest}, the model's vocabulary ends at "
            f"{vocabulary - 1}",
            hint="tokenizer and model do not belong together, or tokens were added without resizing the embedding",
        )


def _require_context(length: int, source: ModelSource) -> None:
    limit = source.context_length
    if limit is not None and length > limit:
        raise UsageError(
            f"windows of {length} tokens do not fit the model's context of {limit}",
            hint=f"use --seq-len {limit} (for evaluation: --window {limit}) or less",
        )
