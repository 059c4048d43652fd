"""Devices and dtypes by the names that flags and recipes use, and the precision of matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from qcli.utils.causal_attention import CausalAttention
from qcli.utils.distributed import local_rank, world_size
from qcli.utils.dtypes import COMPUTE_DTYPES, torch_dtype
from qcli.utils.errors import ResourceError, UsageError


def resolve_device(name: str) -> torch.device:
    """The device of a name: `auto` (the first GPU, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: an unknown name, or a device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}", hint="auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name!r} is not available: torch sees {torch.cuda.device_count()} CUDA devices",
            hint="use --device cpu, or check the driver with `qcli doctor`",
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", hint="auto, cpu, cuda or cuda:N")
    return device


def local_device(name: str) -> torch.device:
    """The device of this process: under `torchrun` each has a GPU of its own, or all share the CPU.

    Args:
        name: as for `resolve_device`.

    Raises:
        UsageError: an unknown name, or one GPU for several processes.
        ResourceError: fewer GPUs than processes on this machine.
    """
    if world_size() == 1 or name == "cpu":
        return resolve_device(name)
    if name not in ("auto", "cuda"):
        raise UsageError(
            f"device {name!r} cannot serve {world_size()} processes", hint="--device cuda gives each its own"
        )
    gpus, rank = torch.cuda.device_count(), local_rank()
    if name == "auto" and not gpus:
        return torch.device("cpu")
    if rank >= gpus:
        raise ResourceError(
            f"local rank {rank} has no GPU of its own: this machine has {gpus}",
            hint="start as many processes as there are GPUs",
        )
    return torch.device("cuda", rank)


def resolve_dtype(name: str, auto: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype of activations and dense weights by its name; `auto` is resolved to the argument `auto`."""
    if name == "auto":
        return auto
    if name not in COMPUTE_DTYPES:
        raise UsageError(f"dtype {name!r} is not supported", hint=f"auto, {', '.join(COMPUTE_DTYPES)}")
    return torch_dtype(name)


def has_fast_matmul(device: torch.device) -> bool:
    """Whether the device computes matrix products in bf16 or TF32 faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def hardware(device: torch.device) -> dict[str, Any]:
    """What kind of unit computes, as far as results depend on it; plain data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"device": device.type, "name": name, "fast": has_fast_matmul(device)}


def linear_dtype(*, fast: bool) -> torch.dtype:
    """What linear layers round float32 weights to under `matmul_precision` with a device."""
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def matmul_precision(*, fast: bool, device: torch.device | None = None) -> Iterator[None]:
    """Set the precision of float32 matrix products while the context is open.

    Args:
        fast: compute them with bf16 or TF32 units; otherwise in full float32.
        device: with `fast`, linear layers and attention on this device also run in bf16 (autocast). The residual
            stream, norms and accumulation stay float32 either way.
    """
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if fast else "highest")
    kind, lower = "cpu" if device is None else device.type, fast and device is not None
    attention = CausalAttention() if lower and kind == "cpu" else nullcontext()
    try:
        with torch.autocast(kind, torch.bfloat16, enabled=lower, cache_enabled=False), attention:
            yield
    finally:
        torch.set_float32_matmul_precision(previous)
