"""The processes that work on one run: those that `torchrun` started, or this one alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """All of them do the same, with samples and shards of their own; the first one alone writes and prints.

    Attributes:
        rank: of this one; the first is 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def agreed(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them."""
        if self.size == 1:
            return make()
        from torch import distributed

        found = [make() if self.first else None]
        distributed.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[return-value]

    def sum(self, value: float) -> float:
        """Over all processes."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        total = torch.tensor(value, dtype=torch.float64, device=local_device())
        distributed.all_reduce(total)
        return float(total)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier()

    def save(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """A checkpoint to which each process writes what it holds; safetensors files."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        if self.first:
            shutil.rmtree(folder, ignore_errors=True)
        self.wait()
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        self.wait()

    def load(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Overwrite tensors with those of `save`."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Within: each process has all of a sharded module's parameters."""
        if self.size == 1:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(module, FSDPModule)
        module.unshard()
        try:
            yield
        finally:
            module.reshard()

    def shard(self, module: nn.Module, whole: Iterable[nn.Parameter] = ()) -> None:
        """Let each process hold a part of every parameter but `whole`; gradients become means over processes."""
        if self.size > 1:
            from torch.distributed.fsdp import fully_shard

            fully_shard(module, ignored_params=set(whole))


def is_first() -> bool:
    """Whether this process writes and prints; asked before any group of processes exists."""
    return int(os.environ.get("RANK", "0")) == 0


def count() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """The GPU of this process among those of its machine; the CPU where there is none."""
    import torch

    gpu = torch.cuda.is_available()
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else "cpu")


@contextmanager
def together(device: torch.device) -> Iterator[Processes]:
    """Join the other processes that `torchrun` started, if any."""
    if count() == 1:
        yield Processes()
        return
    import torch
    from torch import distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
