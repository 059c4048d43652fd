"""Backend, the base class of `backends/`, and the choice of one for each layer.

A backend computes a layer from the tensors on disk as they are: nothing is laid out anew at load, so that loading costs
no time, `state_dict` returns what was read, and memory is that of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from qcli.utils import registry
from qcli.utils.errors import warn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qcli.core.weight import Format

_PACKAGE = "qcli.inference.backends"
_REFERENCE = "reference"
SAID: set[tuple[str, str]] = set()
"""Backends and the reasons against them that this process has warned of."""


class Backend:
    """A way to compute `x W_hat^T + bias` of a packed layer. One instance serves all layers: it holds no tensors."""

    name: ClassVar[str]
    device_types: ClassVar[frozenset[str] | None]
    """Devices that it runs on; None: all."""

    def unavailable_reason(self) -> str | None:
        """Why this machine cannot run it, with what would help; None if it can."""
        return None

    def unsupported_reason(self, format: Format, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        """Why a layer `(out_features, in_features)` with inputs of `dtype` cannot be computed; None if it can."""
        return None

    def linear(
        self, x: Tensor, format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> Tensor:
        """`x W_hat^T + bias`, without what `Format.attach` adds.

        Args:
            x: `[..., in_features]`, float16, bfloat16 or float32.
            tensors: by suffix, as `Format.stored` describes them, on x's device.
            bias: `[out_features]`, any floating dtype.

        Returns:
            `[..., out_features]` in x's dtype; sums are float32.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Choice:
    """The backend of a layer, and why faster ones do not serve it, by their names."""

    backend: Backend
    reasons: Mapping[str, str]


@cache
def choose(format: Format, shape: tuple[int, int], device_type: str, dtype: torch.dtype) -> Choice:
    """The fastest backend that can compute a layer on a device."""
    reasons: dict[str, str] = {}
    for name in registry.names(_PACKAGE):
        if name == _REFERENCE:
            continue
        backend = load(name)
        if backend.device_types is not None and device_type not in backend.device_types:
            continue
        reason = backend.unavailable_reason() or backend.unsupported_reason(format, shape, dtype)
        if reason is None:
            return Choice(backend, reasons)
        reasons[name] = reason
    return Choice(load(_REFERENCE), reasons)


@cache
def load(name: str) -> Backend:
    """The backend of this name."""
    backend: Backend = registry.load(_PACKAGE, name)()
    return backend


def examine() -> list[dict[str, str | None]]:
    """Every backend, and why this machine cannot run it (None: it can), as plain data."""
    import torch

    present = {"cpu", *(("cuda",) if torch.cuda.is_available() else ())}
    report: list[dict[str, str | None]] = []
    for name in registry.names(_PACKAGE):
        backend = load(name)
        types = backend.device_types
        absent = types is not None and not types & present
        reason = f"there is no {min(types)} device" if types is not None and absent else backend.unavailable_reason()
        report.append({"name": name, "devices": "all" if types is None else ", ".join(sorted(types)), "reason": reason})
    return report


def warn_of_reference(layer: str, reasons: Mapping[str, str]) -> None:
    """Say that a layer is computed by the reference: once for each reason, however many layers it holds for."""
    for item in reasons.items():
        if item not in SAID:
            SAID.add(item)
            warn(f"{layer} runs on the slow reference backend: {item[0]}: {item[1]}")
