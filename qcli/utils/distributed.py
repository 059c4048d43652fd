"""The processes that share one run: those that `torchrun` started, or this one alone.

torch is imported by what communicates: the command line asks for the world size at every start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from qcli.utils.errors import QcliError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
_TIMEOUT = timedelta(days=2)  # of a collective: rank 0 may generate text for hours; if one dies, torchrun ends all


def is_main_process() -> bool:
    """Whether this process writes and prints; known before any process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Number of processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """A group of processes that run the same program on different samples and shards; only the main one writes.

    Attributes:
        device: of this process.
        rank: of this process; the main one has 0.
        world_size: number of processes.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def broadcast(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process and return its result in all of them, or raise its QcliError in all."""
        if self.world_size == 1:
            return make()
        from torch import distributed

        result: list[tuple[T | None, QcliError | None]] = [(None, None)]
        if self.is_main:
            try:
                result = [(make(), None)]
            except QcliError as error:
                result = [(None, error)]
        distributed.broadcast_object_list(result, src=0)
        value, problem = result[0]
        if problem is not None:
            raise problem
        return cast("T", value)

    def sum(self, value: float) -> float:
        """All-reduce a number."""
        if self.world_size == 1:
            return value
        import torch
        from torch import distributed

        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return float(total)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            from torch import distributed

            distributed.barrier()

    def save(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write a sharded checkpoint of safetensors files; every process writes its own shards."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        if self.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        self.barrier()
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        self.barrier()

    def load(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Overwrite tensors with those that `save` wrote."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))

    def shard(self, module: nn.Module, replicated: Iterable[nn.Parameter] = ()) -> None:
        """Shard a module's parameters with FSDP, except `replicated`; gradients become means over the processes."""
        if self.world_size > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world_size,))
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(replicated))

    @contextmanager
    def unsharded(self, module: nn.Module) -> Iterator[None]:
        """Gather all parameters of a sharded module while the context is open."""
        if self.world_size == 1:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(module, FSDPModule)
        module.unshard()
        try:
            yield
        finally:
            module.reshard()


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Join the process group of `torchrun`; a group of one without it."""
    if world_size() == 1:
        yield Processes(device)
        return
    import torch
    from torch import distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Processes(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
