"""The processes that share one run: those that `torchrun` started, or this one alone.

torch is imported by what communicates: the command line asks for the world size at every start.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from qcli.utils.errors import QcliError, ResourceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
_TIMEOUT = timedelta(days=2)  # of a collective: rank 0 may generate text for hours; if one dies, torchrun ends all
_END_SECONDS = 30.0  # until torchrun has ended a process because another has failed, at most
_STORE_TIMEOUT = timedelta(seconds=5)  # torchrun keeps the store on the main machine


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


@cache
def fails_first() -> bool:
    """Whether this process is the first of its run to fail; asked for when it does. It alone says why: the others
    meet the same problem, or `torchrun` ends them because of it."""
    if world_size() == 1:
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # made in C++

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, timeout=_STORE_TIMEOUT, wait_for_workers=False)
        return bool(store.add(f"qcli/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):  # not started by torchrun, or it has ended
        return is_main_process()


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

    def mean(self, value: float, count: int) -> float:
        """The mean of all processes' items, of which this one has `count` with the mean `value` (any, if it has none).

        All get the same number.
        """
        if self.world_size == 1:
            return value
        import torch

        sums = torch.tensor([value * count if count else 0.0, count], dtype=torch.float64, device=self.device)
        self.add_up(sums)
        total, counted = sums.tolist()
        return float(total / counted)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes, the same in all of them."""
        if self.world_size > 1:
            from torch import distributed

            distributed.all_reduce(tensor)

    def share(self, count: int) -> range:
        """The consecutive ones of `count` items that are this process's; shares differ by one item at most."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def exchange(self, value: T) -> list[T]:
        """The values of all processes, by rank; their tensors arrive on this process's device."""
        if self.world_size == 1:
            return [value]
        import torch
        from torch import distributed

        from qcli.utils import payload

        own, values = payload.pack(value, self.device), list[T]()
        for rank, size in enumerate(self._sizes(own)):
            content = own if rank == self.rank else torch.empty(size, dtype=torch.uint8, device=self.device)
            distributed.broadcast(content, src=rank)
            values.append(value if rank == self.rank else payload.unpack(content))
        return values

    def to_main(self, value: T) -> Iterator[T]:
        """In the main process the values of all, by rank, one in memory at a time; elsewhere none. To be exhausted."""
        if self.world_size == 1:
            yield value
            return
        import torch
        from torch import distributed

        from qcli.utils import payload

        own = payload.pack(None if self.is_main else value, self.device)
        sizes = self._sizes(own)
        if not self.is_main:
            distributed.send(own, dst=0)
            return
        yield value
        for rank in range(1, self.world_size):
            content = torch.empty(sizes[rank], dtype=torch.uint8, device=self.device)
            distributed.recv(content, src=rank)
            yield payload.unpack(content)

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

    def _sizes(self, content: Tensor) -> list[int]:
        """Length of every process's `content`, by rank."""
        import torch
        from torch import distributed

        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        distributed.all_gather(sizes, torch.tensor([len(content)], device=self.device))
        return [int(size) for size in sizes]


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Join the process group of `torchrun`, unless this process has already; a group of one without it."""
    if world_size() == 1:
        yield Processes(device)
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        yield Processes(device, distributed.get_rank(), distributed.get_world_size())
        return
    own = device if device.type == "cuda" else None
    if own is not None:
        torch.cuda.set_device(own)
    distributed.init_process_group("gloo" if own is None else "nccl", timeout=_TIMEOUT, device_id=own)
    try:
        yield Processes(device, distributed.get_rank(), distributed.get_world_size())
    except BaseException as error:
        first = fails_first()  # before the others notice that this process has left
        if isinstance(error, RuntimeError) and _is_left_alone(error):
            if not first:
                time.sleep(_END_SECONDS)  # torchrun reports the exit code of the process that ends first
            message = "another process of this run has ended"
            raise ResourceError(message, hint="its own message, or the system's log, says why") from error
        raise  # the end of the process ends the group: NCCL would wait here for the others, who wait for this one
    distributed.destroy_process_group()


def _is_left_alone(error: RuntimeError) -> bool:
    """Whether communication failed: the process at the other end was killed."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)
