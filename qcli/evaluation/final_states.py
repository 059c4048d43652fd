"""The hidden states that leave a model's last block, for all windows: what its predictions are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcli.data.tokens import Tokens
from qcli.models.manifest import versions
from qcli.models.open import ModelSource
from qcli.models.stream import ModelStream, batches
from qcli.utils.cache import Cache
from qcli.utils.device import hardware
from qcli.utils.environment import versions_of
from qcli.utils.progress import Progress
from qcli.utils.stored_batches import BatchMemory, StoredBatches


@dataclass(frozen=True)
class FinalStates:
    """A model's final hidden states.

    Attributes:
        name: of the model.
        stream: has the model's final norm and head.
        hidden: by text, `[batch, length, hidden]` each, on the CPU.
    """

    name: str
    stream: ModelStream
    hidden: Mapping[str, Sequence[Tensor]]

    def windows(self, text: str) -> list[Tensor]:
        """Hidden states `[length, hidden]` of each window of a text; views."""
        return [window for batch in self.hidden[text] for window in batch]


def final_states(
    name: str, stream: ModelStream, windows: Sequence[Tokens], cache: Cache, progress: Progress
) -> FinalStates:
    """Run all windows through a model, one block in memory at a time; or take what the cache has."""
    key = {
        "final_states": [tokens.key for tokens in windows],
        **model_key(stream.source, stream.device, stream.dtype, cache),
    }
    shapes = {name: (*ids.shape, stream.width) for name, ids in _named_batches(windows)}
    stored = cache.tensors(
        key,
        lambda: _run_blocks(stream, windows, f"evaluating {name}", progress),
        lambda tensors: {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes,
    )
    hidden = {
        tokens.name: [stored[f"{number}.{batch}"] for batch in range(len(batches(tokens.ids)))]
        for number, tokens in enumerate(windows)
    }
    return FinalStates(name, stream, hidden)


def model_key(source: ModelSource, device: torch.device, dtype: torch.dtype, cache: Cache) -> dict[str, Any]:
    """Cache key of what a model computes; its files are only hashed if the cache keeps anything."""
    content = source.content() if cache.folder is not None else None
    return {
        "model": content,
        "computed": hardware(device),
        "dtype": str(dtype),
        "packages": versions_of("gguf"),
        **versions(),
    }


def _run_blocks(stream: ModelStream, windows: Sequence[Tokens], stage: str, progress: Progress) -> dict[str, Tensor]:
    """Final hidden states by `TEXT.BATCH`, both as numbers."""
    if not windows:
        return {}
    progress(stage, 0, stream.n_blocks)
    memory = BatchMemory(stream.device, on_host=stream.device.type != "cpu")
    hidden: StoredBatches[Tensor] = memory.store()
    names = []
    for name, ids in _named_batches(windows):
        names.append(name)
        hidden.append(stream.embed(ids))
    for index in range(stream.n_blocks):
        stream.advance(stream.load_block(index), index, hidden)
        progress(stage, index + 1, stream.n_blocks)
    return dict(zip(names, hidden.waiting(), strict=True))


def _named_batches(windows: Sequence[Tokens]) -> Iterator[tuple[str, Tensor]]:
    """Tokens int64 `[windows, length]` of each pass, by `TEXT.BATCH`."""
    for number, tokens in enumerate(windows):
        for batch, ids in enumerate(batches(tokens.ids)):
            yield f"{number}.{batch}", ids
