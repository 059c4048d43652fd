"""The processes that work on one run: those that `torchrun` started, or this one alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from qcli.utils.errors import QcliError
from qcli.utils.launch import count

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
_PATIENCE = timedelta(days=2)  # the first one may sample text for hours; if one ends, torchrun ends all


@dataclass(frozen=True)
class Processes:
    """All of them do the same, with samples and shards of their own; the first one alone writes and prints.

    Attributes:
        device: where this one computes.
        rank: of this one; the first is 0.
        size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def agreed(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; or the error it meets."""
        if self.size == 1:
            return make()
        from torch import distributed

        found: list[tuple[T | None, QcliError | None]] = [(None, None)]
        if self.first:
            try:
                found = [(make(), None)]
            except QcliError as problem:
                found = [(None, problem)]
        distributed.broadcast_object_list(found, src=0)
        made, error = found[0]
        if error is not None:
            raise error
        return cast("T", made)

    def sum(self, value: float) -> float:
        """Over all processes."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        total = torch.tensor(value, dtype=torch.float64, device=self.device)
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
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(whole))


@contextmanager
def together(device: torch.device) -> Iterator[Processes]:
    """Join the other processes that `torchrun` started, if any."""
    if count() == 1:
        yield Processes(device)
        return
    import torch
    from torch import distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
