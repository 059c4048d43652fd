"""Model folders with packed layers, read as the dense weights that their codes stand for."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qcli.core.activations import Activations
from qcli.core.weight import Format
from qcli.models.folder import FolderSource
from qcli.models.manifest import Packed
from qcli.utils.dtypes import COMPUTE_DTYPES, StoredTensor, torch_dtype
from qcli.utils.errors import VerificationError
from qcli.utils.safetensors import read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight


class StorageConfig(Protocol):
    """What a `quantization_config` says of how layers are stored, whoever's it is.

    Attributes:
        activations: how the inputs of quantized layers are quantized; None: not at all.
    """

    activations: Activations | None

    def packed(self, layer: str) -> Packed | None:
        """How a layer is stored, by its module name; None when it is dense."""


class PackedSource(FolderSource):
    """A folder whose linear layers are packed in one layout.

    Raises:
        VerificationError: version or format unknown; tensors missing, surplus, or of a wrong shape or dtype.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> None:
        super().__init__(path, config, trust_remote_code=trust_remote_code)
        self._storage = self._storage_config(config["quantization_config"])
        self.activations = self._storage.activations
        self._check()

    def _storage_config(self, config: dict[str, Any]) -> StorageConfig:
        raise NotImplementedError

    @cached_property
    def packed(self) -> dict[str, Packed]:
        """The quantized layers, by module name, in order of computation."""
        layers = (name for name, _, _ in self._linear_names())
        return {layer: packed for layer in layers if (packed := self._storage.packed(layer)) is not None}

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense tensors and of the decoded weights when the model runs, as its config says."""
        name = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        return torch_dtype(name if name in COMPUTE_DTYPES else "float32")

    def tensors(self) -> dict[str, StoredTensor]:
        """Headers as if the model were dense: a quantized layer has its weight, as float32."""
        logical = {}
        parts = {name: layer for layer, packed in self.packed.items() for name in packed.stored(layer)}
        done: set[str] = set()
        for name, stored in super().tensors().items():
            layer = parts.get(name)
            if layer is not None and layer not in done:
                done.add(layer)
                rows, columns = self.packed[layer].shape
                logical[f"{layer}.weight"] = StoredTensor(
                    "F32", (columns, rows) if self.family.conv1d else (rows, columns)
                )
            elif layer is None:
                logical[name] = stored
        return logical

    def formats(self) -> Mapping[str, Format]:
        return {layer: packed.format for layer, packed in self.packed.items()}

    def read_quantized(self, layer: str) -> QuantizedWeight:
        """Codes and tables of a layer."""
        packed = self.packed[layer]
        extents = ((name, self.extents[name]) for name in packed.stored(layer))
        return packed.restore(layer, read_tensors(extents))

    def stored_as(self, name: str) -> str:
        packed = self.packed.get(name.removesuffix(".weight"))
        return super().stored_as(name) if packed is None else packed.format.name

    def bits_per_weight(self) -> float:
        return self._bits(f"{layer}.weight" for layer in self.packed)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        tensors = super()._read([name for name in names if name.removesuffix(".weight") not in self.packed])
        for name in names:
            layer = name.removesuffix(".weight")
            if layer in self.packed:
                dense = self.read_quantized(layer).dense()
                tensors[name] = dense.T.contiguous() if self.family.conv1d else dense
        return {name: tensors[name] for name in names}

    def _stored_bytes(self, name: str) -> int:
        layer = name.removesuffix(".weight")
        if layer in self.packed:
            return sum(tensor.bytes for tensor in self.packed[layer].stored(layer).values())
        return super()._stored_bytes(name)

    def _check(self) -> None:
        found = super().tensors()
        for layer, packed in self.packed.items():
            if f"{layer}.weight" in found:
                raise VerificationError(
                    f"{self.path}: {layer} has a dense weight, its config says {packed.format.name}"
                )
            for name, stored in packed.stored(layer).items():
                if name not in found:
                    raise VerificationError(f"{self.path} has no tensor {name}", hint="the checkpoint is incomplete")
                if found[name] != stored:
                    raise VerificationError(
                        f"{self.path}: {name} is {_words(found[name])}, its config says {_words(stored)}"
                    )
        known = {name for layer, packed in self.packed.items() for name in packed.stored(layer)}
        linears = {layer for layer, _, _ in self._linear_names()}
        surplus = [name for name in found if name not in known and _is_quantized(name, linears)]
        if surplus:
            raise VerificationError(f"{self.path}: {surplus[0]} belongs to no quantized layer of its config")


def _is_quantized(name: str, linears: Container[str]) -> bool:
    """Whether only a quantized layer has a tensor of this name: a linear layer's that is neither weight nor bias."""
    owner, _, part = name.rpartition(".")
    return "weight_" in part or (owner in linears and part not in ("weight", "bias"))


def _words(stored: StoredTensor) -> str:
    return f"{stored.dtype} {list(stored.shape)}"
