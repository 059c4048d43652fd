"""An exact count of the bytes that tensors hold, on the compute device and in host memory, without a GPU.

`Live` counts storages from the operation that makes them to their release. Tensors without values (`FakeTensorMode`)
have storages of the right size that take no memory and no time, so a block of a 70B model can be quantized on any
machine, by the code that does it on a GPU. All of it runs on the CPU device, the side of which is taken for the GPU:
what a `BatchMemory` keeps and what is read from files is host memory. What operations use inside of a kernel is not
seen, nor what an allocator loses to fragments.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.solvers import feedback, tiles
from qcli.algorithms.training import loop, losses
from qcli.core import by_code
from qcli.core.weight import QuantizedWeight
from qcli.models.source import ModelSource
from qcli.models.stream import ModelStream
from qcli.utils.stored_batches import BatchMemory

DEVICE, HOST = "device", "host"


class Live(TorchDispatchMode):
    """Counts the bytes of storages while it is open.

    Attributes:
        now: bytes, by side.
        peak: highest bytes so far, by side.
        largest: the largest storages of the device at its peak: bytes, and the operation that made them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.largest: list[tuple[int, str]] = []
        self._snapshot = 0.0
        self._known: dict[int, tuple[int, str, str]] = {}  # by storage: bytes, side, operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and isinstance(args[0], torch._subclasses.fake_tensor.FakeTensor):
            return self._ordinary(args[0])
        if name == "equal" and isinstance(args[0], torch._subclasses.fake_tensor.FakeTensor):
            return True
        output = func(*args, **kwargs or {})
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._count(leaf, DEVICE, name)
        if name == "any":
            output.is_any = True
        return output

    def restart(self) -> None:
        """Begin a new peak, at what lives now."""
        self.peak, self._snapshot, self.largest = Counter(self.now), 0.0, []

    def on_host(self, tensors: Any) -> Any:
        """Take the storages of these tensors for host memory; returns them."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                known = self._known.get(leaf.untyped_storage()._cdata)
                if known is not None and known[1] == DEVICE:
                    self.now[DEVICE] -= known[0]
                    self._known[leaf.untyped_storage()._cdata] = (known[0], HOST, known[2])
                    self._add(known[0], HOST)
                else:
                    self._count(leaf, HOST, "read")
        return tensors

    def _count(self, tensor: Tensor, side: str, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes(), side, name
            weakref.finalize(storage, self._release, key)
            self._add(storage.nbytes(), side)

    def _add(self, size: int, side: str) -> None:
        self.now[side] += size
        self.peak[side] = max(self.peak[side], self.now[side])
        if side == DEVICE and self.now[DEVICE] > 1.02 * self._snapshot:
            self._snapshot = self.now[DEVICE]
            storages = ((size, name) for size, device, name in self._known.values() if device == DEVICE)
            self.largest = sorted(storages, reverse=True)[:40]

    def _release(self, key: int) -> None:
        size, side, _ = self._known.pop(key)
        self.now[side] -= size

    def _ordinary(self, tensor: Tensor) -> Any:
        """What is true of a value that a fake tensor does not have, in a run without fallbacks."""
        if tensor.dtype == torch.bool:
            return not hasattr(tensor, "is_any")
        return 1.0 if tensor.is_floating_point() else 0


class _OneFakeMode(FakeTensorMode):
    """Copies of modules share the mode of the original."""

    def __deepcopy__(self, memo: object) -> _OneFakeMode:
        return self


@contextmanager
def counted(*, fake: bool) -> Iterator[Live]:
    """Within: tensors are counted, and have no values if `fake`."""
    live = Live()
    to_host, read, best = BatchMemory._to_host, ModelSource.read, loop._on_host
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(BatchMemory, "_to_host", lambda *args: live.on_host(to_host(*args))))
        stack.enter_context(mock.patch.object(loop, "_on_host", lambda *args: live.on_host(best(*args))))
        stack.enter_context(mock.patch.object(tiles, "_CPU", tiles._GPU))
        stack.enter_context(mock.patch.dict(losses.LOGITS_AT_ONCE, cpu=losses.LOGITS_AT_ONCE["cuda"]))
        stack.enter_context(mock.patch.object(by_code, "sums_by_code", by_code.one_code_at_a_time))
        if fake:
            stack.enter_context(mock.patch.object(ModelSource, "read", lambda *args: live.on_host(_unread(*args))))
            stack.enter_context(mock.patch.object(LinearGroup, "is_dead", property(lambda _: False)))
            stack.enter_context(mock.patch.object(ModelStream, "drop_vocabulary", _drop_vocabulary))
            stack.enter_context(mock.patch.object(QuantizedWeight, "check", lambda _: None))
            stack.enter_context(mock.patch.object(feedback, "quantize_columns", _quantize_columns))
            stack.enter_context(_OneFakeMode())
        else:
            stack.enter_context(mock.patch.object(ModelSource, "read", lambda *args: live.on_host(read(*args))))
        stack.enter_context(live)
        yield live


def _drop_vocabulary(stream: ModelStream) -> None:
    """Fake tensors cannot be moved to the meta device."""
    for module in (stream.model.get_input_embeddings(), stream.model.get_output_embeddings()):
        module.register_parameter("weight", None)


def _quantize_columns(weight: Tensor, factor: Tensor, order: Tensor, format: Any, parts: Any, **_: Any) -> Tensor:
    """The buffers of `quantize_columns`, without its operations for each column."""
    columns = weight.T[order].contiguous()
    return feedback._codes(columns, order, format, parts)


def _unread(source: ModelSource, names: Any) -> dict[str, Tensor]:
    stored = source.tensors()
    return {name: torch.empty(stored[name].shape, dtype=stored[name].torch_dtype) for name in names}
