"""Whether Triton kernels run on this machine, and on which devices they take the place of many torch operations."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from qcli.utils.errors import warn

_OLDEST = (7, 5)  # compute capability
DEVICES = {"cuda"}
"""Types of the devices that `serve` is true for; tests add `cpu`, where Triton's interpreter runs them."""


@cache
def unavailable_reason() -> str | None:
    """Why Triton kernels do not run on this machine's GPU, with what would help; None: they do."""
    if find_spec("triton") is None:
        return "Triton is missing: install torch with CUDA, which brings it, or `pip install triton`"
    if not interpreted() and torch.cuda.get_device_capability() < _OLDEST:
        return f"the GPU's compute capability is below {_OLDEST[0]}.{_OLDEST[1]}"
    return None


@cache
def interpreted() -> bool:
    """Whether Triton interprets kernels in place of compiling them. Needs Triton."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def serve(device: torch.device) -> bool:
    """Whether kernels compute on a device what takes torch many operations; where a GPU cannot, a warning says so."""
    if device.type not in DEVICES:
        return False
    reason = unavailable_reason()
    if reason is not None:
        _warn_once(reason)
    return reason is None


@cache
def _warn_once(reason: str) -> None:
    warn(f"quantizing and training take many times longer on this GPU than they could: {reason}")
