"""Keys and values of earlier tokens, for models that generate."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


def empty_cache(blocks: int, length: int) -> Cache:
    """A cache with room for `length` tokens, which grows when more come."""
    return Cache(layers=[_GrowingLayer(length) for _ in range(blocks)])


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room to spare: appending does not copy earlier ones."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._reserve(stop, key_states, value_states)
        elif stop > self._length:
            keys, values = self.keys, self.values
            assert keys is not None and values is not None
            self._reserve(2 * stop, keys, values)
            self._write(0, start, keys, values)
        self._write(start, stop, key_states, value_states)
        self.keys, self.values = (buffer[..., :stop, :] for buffer in self._buffers)
        return self.keys, self.values

    def _reserve(self, length: int, keys: Tensor, values: Tensor) -> None:
        """Make room for `length` tokens, or for the announced number if that is larger, like these."""
        self._length = max(self._length, length)
        self._buffers = tuple(
            states.new_empty(*states.shape[:-2], self._length, states.shape[-1]) for states in (keys, values)
        )

    def _write(self, start: int, stop: int, keys: Tensor, values: Tensor) -> None:
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[..., start:stop, :] = states
