"""Text sampled from a model: calibration without data, on the model's own distribution.

Each document starts with a token drawn uniformly from the vocabulary, continues greedily for a few tokens, so that it
settles on a subject, and is then sampled at temperature 1 (the procedure of OneBit's authors). When the model ends a
document, the next one starts in the same window: no sampled token is discarded. Where the tokenizer puts begin tokens
before a text, every document starts behind them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from inspect import signature
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcli.data.draws import draw
from qcli.models.kv_cache import empty_cache
from qcli.models.open import ModelSource
from qcli.models.stream import ModelStream
from qcli.utils.device import has_fast_matmul
from qcli.utils.errors import ResourceError, UsageError
from qcli.utils.memory import free_memory
from qcli.utils.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

_GREEDY = 4
_BATCH = 32
_CACHE_BYTES = 2 << 30


def sample(
    source: ModelSource,
    samples: int,
    length: int,
    seed: str,
    begin: Sequence[int] = (),
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Tensor:
    """Windows of text sampled from a model, which must fit in memory as a whole.

    Computes in bfloat16 if the device has units for it, else in float32. A window depends only on `seed` and its own
    index: each has its own random generator.

    Args:
        begin: tokens before every document.

    Returns:
        int64 `[samples, length]`, on the CPU.

    Raises:
        UsageError: the tokenizer has only special tokens.
        ResourceError: weights and KV cache do not fit in memory.
    """
    device = torch.device(device)
    dtype = torch.bfloat16 if has_fast_matmul(device) else torch.float32
    config, tokenizer = source.hf_config().get_text_config(), source.tokenizer()
    batch = _check_memory(source, config, length, device, dtype)

    stream = ModelStream(source, device=device, dtype=dtype)
    model = stream.load_whole()

    ends = _end_tokens(tokenizer, config)
    starts = _start_tokens(tokenizer, config, ends)
    if not starts:
        raise UsageError(
            f"{source.path}: the tokenizer has only special tokens, no text starts with them",
            hint="calibrate on text instead: --data FILE, or a named data set",
        )
    windows = []
    steps = -(-samples // batch) * length
    for first in range(0, samples, batch):
        numbers = range(first, min(first + batch, samples))
        generators = [random.Random(f"{seed}:{number}") for number in numbers]
        ids = torch.empty(len(numbers), length, dtype=torch.int64)
        cache = empty_cache(stream.n_blocks, length)
        positions = _sample_positions(model, cache, generators, length, starts, ends, begin, device)
        for step, tokens in enumerate(positions):
            ids[:, step] = tokens
            progress("sampling text from the model", first // batch * length + step + 1, steps)
        windows.append(ids)
    return torch.cat(windows)


@torch.inference_mode()
def _sample_positions(
    model: torch.nn.Module,
    cache: Cache,
    generators: list[random.Random],
    length: int,
    starts: list[int],
    ends: list[int],
    begin: Sequence[int],
    device: torch.device,
) -> Iterator[Tensor]:
    """The tokens of all windows, one position after another: int64 `[batch]` on the CPU, `length` times.

    A document does not attend to earlier ones and counts its positions from 0, as if it were alone. (Otherwise the
    model soon repeats one-word documents forever.)
    """
    ending, lead = torch.tensor(ends), len(begin)
    takes_positions = "position_ids" in signature(model.forward).parameters
    tokens = torch.tensor([generator.choice(starts) for generator in generators])
    if begin:
        tokens[:] = begin[0]
    age = torch.zeros_like(tokens)  # position of the last token in its document
    for step in range(length):
        yield tokens
        if step == length - 1:
            return
        document = torch.arange(step, -1, -1) <= age[:, None]
        positions = {"position_ids": age.to(device)[:, None]} if takes_positions else {}
        output = model(
            input_ids=tokens.to(device)[:, None],
            attention_mask=document.to(device, torch.int64),
            past_key_values=cache,
            use_cache=True,
            **positions,
        )
        logits = output.logits[:, -1].float()
        draws = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
        fresh = torch.tensor([generator.choice(starts) for generator in generators])
        drawn = draw(logits.softmax(-1), draws.to(device)).cpu()
        chosen = torch.where(age < lead + _GREEDY, logits.argmax(-1).cpu(), drawn)
        ended = torch.isin(tokens, ending) & (age >= lead)  # a begin token may be the end token, too
        age = torch.where(ended, 0, age + 1)
        tokens = torch.where(age > lead, chosen, fresh)
        for position, token in enumerate(begin):
            tokens[age == position] = token


def _start_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, ends: list[int]) -> list[int]:
    """The vocabulary without special tokens and without embedding rows that no token uses."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids, ends)
    return [token for token in range(min(len(tokenizer), config.vocab_size)) if token not in special]


def _end_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> list[int]:
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return sorted({token for token in (tokenizer.eos_token_id, *named) if token is not None})


def _check_memory(
    source: ModelSource, config: PreTrainedConfig, length: int, device: torch.device, dtype: torch.dtype
) -> int:
    """The number of windows to sample at once; it depends on the model alone, so that every machine does the same."""
    weights: int = sum(prod(tensor.shape) for tensor in source.tensors().values()) * dtype.itemsize
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = 2 * config.num_hidden_layers * heads * width * length * dtype.itemsize
    batch: int = min(_BATCH, max(1, max(_CACHE_BYTES, weights) // window))
    needed, free = weights + batch * window, free_memory(device)
    if free is not None and needed > free:
        raise ResourceError(
            f"sampling text from the model needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
            hint="calibrate on text instead: --data FILE, or a named data set; all other steps run block by block",
        )
    return batch
