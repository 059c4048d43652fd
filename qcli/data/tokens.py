"""Text to token windows: calibration samples drawn at random, evaluation windows one after another.

No window starts with a beginning-of-text token: windows lie anywhere in a text, not at its start.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcli.data.datasets import LOCAL, NAMED, SELF, is_folder, read_text
from qcli.utils.errors import UsageError
from qcli.utils.files import sha256
from qcli.utils.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qcli.models.open import Source

CALIBRATION = "calibration.json"  # of a folder of `qcli calibrate`: what it was made of
_SELF_WINDOWS = 32  # evaluation windows to sample where no number is asked for


@dataclass(frozen=True)
class Tokens:
    """Token windows, and what they are.

    Attributes:
        ids: int64 `[windows, length]`, on the CPU.
        source: the data they were cut from, as the user named it.
    """

    ids: Tensor
    source: str

    @property
    def sha256(self) -> str:
        """Hash of the ids: equal tokens, equal hash."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()


def calibration_tokens(
    data: str,
    source: Source,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    held_out: int = 0,
    judges: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Tokens:
    """Windows at random places of a text, the same for the same seed.

    Args:
        data: `wikitext2`, `c4` or `ptb` (training part); a .txt, .jsonl or .parquet file; `self`; or a folder
            written by `qcli calibrate`, whose windows are taken as they are, whatever else is asked for.
        source: the model: its tokenizer, its longest context and, for `self`, its weights.
        held_out: so many of `samples`, the last ones, share no token with those before.
        judges: so many windows more, behind `samples`, share no token with any of these.
        device: where `self` samples.

    Raises:
        UsageError: no such data, unreadable, or too short; windows longer than the model's context.
        ResourceError: not enough memory to sample from the model.
    """
    if is_folder(data):
        return _from_folder(Path(data), source)
    _check_length(seq_len, source.config)
    if data == SELF:
        from qcli.data.generated import sample

        return Tokens(sample(source, samples + judges, seq_len, f"calibration:{seed}", device, progress), SELF)
    ids = _encode(source.tokenizer(), read_text(data, calibration=True))
    if len(ids) <= seq_len:
        raise UsageError(
            f"{data}: too short for calibration: {len(ids)} tokens, but a window of {seq_len} needs {seq_len + 1}",
            hint="use more text, or a smaller --seq-len",
        )
    generator = random.Random(seed)
    offsets = [generator.randrange(0, len(ids) - seq_len) for _ in range(samples)]
    taken = _Taken(len(ids), seq_len, data)
    if 0 < held_out < samples:
        held = offsets[-held_out:]
        for offset in held:
            taken.add(offset)
        free = taken.free("a smaller --seq-len")
        offsets = [int(generator.choice(free)) if taken.at(offset) else offset for offset in offsets[:-held_out]] + held
    for offset in offsets if judges else ():
        taken.add(offset)
    for _ in range(judges):
        offset = generator.randrange(0, len(ids) - seq_len)
        if taken.at(offset):
            offset = int(generator.choice(taken.free("fewer --samples, or a smaller --seq-len")))
        taken.add(offset)
        offsets.append(offset)
    return Tokens(torch.stack([ids[offset : offset + seq_len] for offset in offsets]), data)


def evaluation_tokens(
    data: str,
    source: Source,
    *,
    window: int,
    max_windows: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Tokens:
    """Consecutive windows that do not overlap, from the start of a text; a shorter rest is left out.

    Args:
        data: `wikitext2`, `c4` or `ptb` (test or validation part); a .txt, .jsonl or .parquet file; `self`: text
            sampled from `source`, never that of a calibration, 32 windows unless `max_windows` says otherwise; or a
            folder written by `qcli calibrate`, whose windows are cut where they are longer than `window`.
        window: tokens per window, at least 2.
        max_windows: use only the first ones.

    Raises:
        UsageError: no such data, unreadable, or too short; windows longer than the model's context.
        ResourceError: not enough memory to sample from the model.
    """
    if window < 2:
        raise UsageError(f"window {window} holds no token to predict", hint="a window has at least 2 tokens")
    if is_folder(data):
        return Tokens(_from_folder(Path(data), source).ids[:max_windows, :window].contiguous(), data)
    _check_length(window, source.config)
    if data == SELF:
        from qcli.data.generated import sample

        count = max_windows or _SELF_WINDOWS
        return Tokens(sample(source, count, window, "evaluation", device, progress), SELF)
    ids = _encode(source.tokenizer(), read_text(data, calibration=False))
    windows = len(ids) // window
    if windows == 0:
        raise UsageError(
            f"{data}: too short for evaluation: {len(ids)} tokens, but one window needs {window}",
            hint="use more text, or a smaller --window",
        )
    return Tokens(ids[: windows * window].view(windows, window)[:max_windows].clone(), data)


def context_length(config: Mapping[str, Any]) -> int | None:
    """The longest sequence a model was made for; None where its config names no limit."""
    text = config.get("text_config") or config  # of a multimodal model
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(limit := text.get(key), int):
            return limit
    return None


def text_identity(data: str) -> str | None:
    """What calibration data is cut from: a file's hash, a set's name; None: the model's own text, or unknown."""
    if is_folder(data):
        try:
            found: str | None = json.loads((Path(data) / CALIBRATION).read_bytes()).get("text_identity")
        except (OSError, ValueError, AttributeError):
            return None  # such a folder is its tokens; what tells of them may be gone
        return found
    return data if data in NAMED else text_sha256(data)


def text_sha256(data: str) -> str | None:
    """Of a local file; other texts are known by their name."""
    return sha256(Path(data)) if Path(data).is_file() else None


def content_key(data: str, source: Source) -> dict[str, Any]:
    """What decides the tokens of a text, besides their windows: its content, and who reads or writes it."""
    return {
        "data": data,
        "text": text_sha256(data),
        "tokenizer": source.tokenizer_content(),
        "writer": source.content() if data == SELF else None,
        "context": context_length(source.config),
    }


def require_training(found: Tokens, held_out: int) -> None:
    """Raise UsageError unless samples are left to train on when `held_out` of them judge."""
    if len(found.ids) <= held_out:
        raise UsageError(
            f"{found.source} has {len(found.ids)} samples: {held_out} are held out and none is left to train on",
            hint="use more text, or more --samples",
        )


class _Taken:
    """Where windows may still lie in a text if they shall share no token with others."""

    def __init__(self, length: int, window: int, data: str) -> None:
        self.length, self.window, self.data = length, window, data
        self._taken = torch.zeros(length - window, dtype=torch.bool)

    def add(self, offset: int) -> None:
        """Take what a window covers."""
        self._taken[max(0, offset - self.window + 1) : offset + self.window] = True

    def at(self, offset: int) -> bool:
        """Whether a window here would share a token with another."""
        return bool(self._taken[offset])

    def free(self, less: str) -> Tensor:
        """The other offsets.

        Raises:
            UsageError: there are so few that windows would be all the same; `less` helps.
        """
        found = torch.nonzero(~self._taken).flatten()
        if len(found) < min(self.window, self.length - self.window):
            raise UsageError(
                f"{self.data}: too short to keep samples apart: of its {self.length} tokens hardly a window of "
                f"{self.window} is left to others",
                hint=f"use more text, {less}",
            )
        return found


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _check_length(length: int, config: Mapping[str, Any]) -> None:
    limit = context_length(config)
    if limit is not None and length > limit:
        raise UsageError(
            f"windows of {length} tokens do not fit the model's context of {limit}",
            hint=f"use --seq-len {limit} (to evaluate: --window {limit}) or less",
        )


def _from_folder(folder: Path, source: Source) -> Tokens:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "tokens.safetensors"
    if not file.is_file():
        raise UsageError(f"{folder} is not a folder of `qcli calibrate`: no {file.name}", hint=LOCAL)
    try:
        ids = load_file(file)["ids"]
    except (SafetensorError, KeyError):
        ids = torch.empty(0)
    if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
        raise UsageError(f"{file}: damaged", hint="run `qcli calibrate` again")
    vocabulary = source.hf_config().get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise UsageError(
            f"{folder}: its tokens are not those of a model with a vocabulary of {vocabulary}",
            hint="calibrate with the model that is quantized",
        )
    _check_length(ids.shape[1], source.config)
    return Tokens(ids, str(folder))
