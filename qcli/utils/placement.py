"""What a command needs of a machine's memory, compared with what there is before work starts.

torch is imported where a device is asked for: recipes import this module.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qcli.utils.errors import ResourceError
from qcli.utils.memory import free_memory, free_memory_of_host

if TYPE_CHECKING:
    import torch

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}
SIZE = rf"^[1-9][0-9]*(\.[0-9]+)?({'|'.join(_UNITS)})$"
"""How recipes and flags write a number of bytes."""
RUNTIME = 450 * 10**6
"""Bytes of a process that has loaded torch and transformers."""
_USABLE = 0.9  # of a GPU's free memory: what its allocator does not lose to fragments


@dataclass(frozen=True)
class Demand:
    """Bytes that a command needs at its peak, estimated.

    Attributes:
        device: on the compute device, without what can wait in host memory.
        resident: likewise, with what only some phases keep waiting; without `waiting`.
        waiting: of activations between two uses, which can be on the device or in host memory.
        host: of the process besides, with libraries and what is read and written.
        together: device and host where they are one memory: their peaks may come at different times.
    """

    device: int
    resident: int
    waiting: int
    host: int
    together: int


class Peak:
    """The highest needs of the phases of a command.

    Args:
        runtime: bytes of the process in every phase.
    """

    def __init__(self, runtime: int) -> None:
        self.runtime = runtime
        self._device = self._resident = self._host = self._together = 0

    def add(self, *, device: int = 0, host: int = 0, waiting: int = 0) -> None:
        """A phase that needs this; `waiting` can be on the device or in host memory."""
        self._device, self._host = max(self._device, device), max(self._host, host)
        self._resident = max(self._resident, device + waiting)
        self._together = max(self._together, device + host + waiting)

    def demand(self, waiting: int) -> Demand:
        """Of all phases; `waiting` as for `Demand`."""
        host, together = self.runtime + self._host, self.runtime + self._together
        return Demand(self._device, self._resident, waiting, host, together)


@dataclass(frozen=True)
class Placement:
    """Where a command keeps what it needs.

    Attributes:
        device: `cpu` or `cuda`.
        on_host: whether activations wait in host memory, because the GPU's does not hold them.
        waiting: bytes of these activations.
        peak: estimated bytes on the device; of the CPU, all of the process.
        usable: bytes on the device that may be used; None: unknown.
        host_peak, host_usable: likewise in host memory where the device is a GPU.
        problem: why it does not fit, in words; None: it does.
        limited: whether `usable` is what the user allows, not what is free.
    """

    device: str
    on_host: bool
    waiting: int
    peak: int
    usable: int | None
    host_peak: int | None = None
    host_usable: int | None = None
    problem: str | None = None
    limited: bool = False

    def require(self, hint: str) -> None:
        """Raise ResourceError if it does not fit; `hint`: what needs less."""
        if self.problem is not None:
            raise ResourceError(self.problem, hint=hint)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def in_words(self) -> str:
        """Such as `about 6.3 GB of GPU memory (22.1 GB usable), about 21.4 GB of host memory (120.0 GB free);
        activations wait in host memory`."""
        if self.host_peak is None:
            return _of_memory(self.peak, "host", self.usable, "allowed" if self.limited else "free")
        device = _of_memory(self.peak, "GPU", self.usable, "allowed" if self.limited else "usable")
        words = f"{device}, {_of_memory(self.host_peak, 'host', self.host_usable, 'free')}"
        return (
            f"{words}; activations wait {'in host memory' if self.on_host else 'on the GPU'}" if self.waiting else words
        )


def place(demand: Demand, device: torch.device, limit: str | None, what: str, processes: int = 1) -> Placement:
    """Decide where a command keeps its activations.

    Args:
        limit: a size (see `SIZE`) that bounds the device in place of the memory that is free.
        what: the command, as a problem names it.
        processes: that share the memory of this machine; each has a GPU of its own.
    """
    usable = free_memory(device) if limit is None else parse_size(limit)
    host_free = free_memory_of_host()
    if device.type == "cpu" and usable is not None and limit is None:
        usable //= processes
    if device.type == "cpu":
        peak = demand.together + demand.waiting
        problem = _problem(what, "memory", peak, usable, limit)
        return Placement("cpu", False, demand.waiting, peak, usable, problem=problem, limited=limit is not None)
    if usable is not None and limit is None:
        usable = int(_USABLE * usable)
    on_device = demand.resident + demand.waiting
    on_host = usable is not None and on_device > usable
    peak = demand.device if on_host else on_device
    host_peak = demand.host + (on_device - demand.device if on_host else 0)
    host_free = None if host_free is None else host_free // processes
    problem = _problem(what, "GPU memory", peak, usable, limit)
    problem = problem or _problem(what, "host memory", host_peak, host_free, None)
    return Placement(
        device.type, on_host, demand.waiting, peak, usable, host_peak, host_free, problem, limited=limit is not None
    )


def parse_size(text: str) -> int:
    """Bytes of a size such as `24GB` or `7.5GiB`, which matches `SIZE`."""
    unit = text.lstrip("0123456789.")
    return int(float(text.removesuffix(unit)) * _UNITS[unit])


def limit_memory(device: torch.device, limit: str | None) -> None:
    """Let allocations on a GPU fail beyond `limit`, a size; None: not any more, in a process that limited another run.
    On the CPU it only bounds what is planned."""
    if device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if limit is None else min(1.0, parse_size(limit) / total)
        torch.cuda.set_per_process_memory_fraction(share, device)


def _problem(what: str, kind: str, needed: int, usable: int | None, limit: str | None) -> str | None:
    if usable is None or needed <= usable:
        return None
    bound = f"{_gigabytes(usable)} are free" if limit is None else f"--max-memory allows {limit}"
    return f"{what} needs about {_gigabytes(needed)} of {kind}, {bound}"


def _of_memory(size: int, kind: str, usable: int | None, word: str) -> str:
    bound = "" if usable is None else f" ({_gigabytes(usable)} {word})"
    return f"about {_gigabytes(size)} of {kind} memory{bound}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
