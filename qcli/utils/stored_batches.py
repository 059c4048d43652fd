"""What waits for its next use, a batch at a time: on the device where it is used, or in host memory.

In host memory, the next batch is copied to the device ahead of its use and a new one back while the device works on:
pinned memory, and a CUDA stream of its own, in whose order all copies happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


class BatchMemory:
    """Where the batches of a run wait.

    Args:
        device: where they are used.
        on_host: whether they wait in host memory; else nothing is ever copied.
    """

    def __init__(self, device: torch.device, *, on_host: bool = False) -> None:
        self.device, self.on_host = device, on_host
        self._copies = torch.cuda.Stream(device) if on_host and device.type == "cuda" else None

    def store(self, batches: Iterable[T] = ()) -> StoredBatches[T]:
        """A store of these batches, which are taken one at a time."""
        stored: StoredBatches[T] = StoredBatches(self)
        for batch in batches:
            stored.append(batch)
        return stored

    def keep(self, batch: Any) -> Any:
        """A tensor, or a structure of tensors, as it waits."""
        return tree_map_only(Tensor, self._to_host, batch) if self.on_host else batch

    def fetch(self, kept: Any) -> Any:
        """A copy for the device of what waits; it is only complete after `arrived`."""
        return tree_map_only(Tensor, self._to_device, kept) if self.on_host else kept

    def arrived(self) -> None:
        """Let the device wait for all that has been fetched."""
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)

    def finish(self) -> None:
        """Wait until what `keep` has returned can be read."""
        if self._copies is not None:
            self._copies.synchronize()

    def _to_host(self, tensor: Tensor) -> Tensor:
        kept = torch.empty_like(tensor, device="cpu", pin_memory=self._copies is not None)
        self._copy(tensor, kept)
        return kept

    def _to_device(self, kept: Tensor) -> Tensor:
        tensor = torch.empty_like(kept, device=self.device)
        self._copy(kept, tensor)
        return tensor

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if self._copies is None:
            target.copy_(source)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        on_device = target if target.is_cuda else source
        on_device.record_stream(self._copies)  # its memory is not used again before the copy is done


class StoredBatches(Generic[T]):
    """A list of batches, tensors or structures of them, that are read and written on the device of their memory.

    A batch is replaced, never changed in place.

    Attributes:
        memory: where they are.
    """

    def __init__(self, memory: BatchMemory, kept: Iterable[T] = ()) -> None:
        self.memory, self._kept = memory, list(kept)
        self._ahead: tuple[int, T] | None = None  # a batch under way, and its number

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: int) -> T:
        """Batch `number`; the one behind it is fetched, too."""
        if not self.memory.on_host:
            return self._kept[number]
        batch = self._ahead[1] if self._ahead is not None and self._ahead[0] == number else self._fetch(number)
        self.memory.arrived()
        following = number + 1
        self._ahead = (following, self._fetch(following)) if following < len(self) else None
        return batch

    def __setitem__(self, number: int, batch: T) -> None:
        if self._ahead is not None and self._ahead[0] == number:
            self._ahead = None
        self._kept[number] = self.memory.keep(batch)

    def __iter__(self) -> Iterator[T]:
        return (self[number] for number in range(len(self)))

    def append(self, batch: T) -> None:
        """Add a batch."""
        self._kept.append(self.memory.keep(batch))

    def copy(self) -> StoredBatches[T]:
        """The same batches, to be replaced on their own."""
        return StoredBatches(self.memory, self._kept)

    def waiting(self) -> list[T]:
        """All batches where they are."""
        self.memory.finish()
        return list(self._kept)

    def samples(self: StoredBatches[Tensor], indices: Sequence[int]) -> Tensor:
        """As `picked`, stacked to `[len(indices), ...]`; all have one shape."""
        return torch.stack(self.picked(indices))

    def picked(self: StoredBatches[Tensor], indices: Sequence[int]) -> list[Tensor]:
        """Samples of batches `[batch, ...]`, all of one batch size but the last, which may be smaller.

        Args:
            indices: sample numbers, counted through all batches.
        """
        size = len(self._kept[0])
        picked: list[Tensor] = [self.memory.fetch(self._kept[index // size][index % size]) for index in indices]
        self.memory.arrived()
        return picked

    def _fetch(self, number: int) -> T:
        batch: T = self.memory.fetch(self._kept[number])
        return batch
