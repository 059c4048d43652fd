"""Model folders with quantized layers; their weights are decoded when they are read."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qcli.core.activations import Activations
from qcli.core.weight import Format
from qcli.models.folder import FolderSource
from qcli.utils.dtypes import COMPUTE_DTYPES, StoredTensor, torch_dtype
from qcli.utils.errors import VerificationError
from qcli.utils.safetensors import Extent, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight


@dataclass(frozen=True)
class LayerStorage:
    """How a quantized layer is stored: its format and its shape `(out_features, in_features)`.

    Raises:
        VerificationError: the shape is that of no matrix.
    """

    format: Format
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise VerificationError(f"a quantized layer has the shape {list(self.shape)}", hint="copy it again")

    def stored(self, layer: str) -> dict[str, StoredTensor]:
        """The layer's tensors on disk, by full name."""
        return {f"{layer}.{suffix}": tensor for suffix, tensor in self.format.stored(self.shape).items()}

    def restore(self, layer: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The weight, from its tensors by full name."""
        suffixes = self.format.stored(self.shape)
        return self.format.from_stored({suffix: tensors[f"{layer}.{suffix}"] for suffix in suffixes}, self.shape)


def stored_tensors(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The weight's tensors as they are stored, by full name: inverse of `LayerStorage.restore`."""
    return {f"{layer}.{suffix}": tensor for suffix, tensor in weight.format.to_stored(weight).items()}


class StorageConfig(Protocol):
    """The `quantization_config` of a layout, parsed: how each layer is stored.

    Attributes:
        activations: how the inputs of quantized layers are quantized; None: not at all.
    """

    activations: Activations | None

    def layer(self, name: str) -> LayerStorage | None:
        """How the layer with this module name is stored; None: dense."""


class QuantizedSource(FolderSource):
    """A folder whose linear layers are quantized, in one layout; subclasses parse its `quantization_config`.

    Raises:
        VerificationError: the config is not understood, or tensors are missing, unexpected, or of another shape or
            dtype than the config implies.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> None:
        super().__init__(path, config, trust_remote_code=trust_remote_code)
        self._storage = self._storage_config(config["quantization_config"])
        self.activations = self._storage.activations
        self._check()

    def _storage_config(self, config: dict[str, Any]) -> StorageConfig:
        raise NotImplementedError

    @cached_property
    def quantized(self) -> dict[str, LayerStorage]:
        """The quantized layers, by module name, in order of computation."""
        names = (name for name, _, _ in self._linear_names())
        return {name: storage for name in names if (storage := self._storage.layer(name)) is not None}

    @property
    def vocabulary(self) -> Mapping[str, LayerStorage]:
        """Embedding and head, by module name, as far as they are quantized."""
        return {}

    @cached_property
    def packed(self) -> dict[str, LayerStorage]:
        """Everything that is quantized: `quantized` and `vocabulary`."""
        return {**self.quantized, **self.vocabulary}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model runs in, by its config: of dense tensors and of decoded weights."""
        name = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        return torch_dtype(name if name in COMPUTE_DTYPES else "float32")

    def tensors(self) -> dict[str, StoredTensor]:
        """Headers of the decoded model: each quantized layer has a float32 weight."""
        decoded = {}
        parts = {name: layer for layer, storage in self.packed.items() for name in storage.stored(layer)}
        seen: set[str] = set()
        for name, stored in super().tensors().items():
            layer = parts.get(name)
            if layer is not None and layer not in seen:
                seen.add(layer)
                rows, columns = self.packed[layer].shape
                decoded[f"{layer}.weight"] = StoredTensor(
                    "F32", (columns, rows) if self._turned(layer) else (rows, columns)
                )
            elif layer is None:
                decoded[name] = stored
        return decoded

    def formats(self) -> Mapping[str, Format]:
        return {layer: storage.format for layer, storage in self.quantized.items()}

    def read_quantized(self, layer: str) -> QuantizedWeight:
        """Codes and tables of a quantized layer."""
        storage = self.packed[layer]
        extents = ((name, self.extents[name]) for name in storage.stored(layer))
        return storage.restore(layer, read_tensors(extents))

    def read_packed(
        self, layer: str, read: Callable[[Iterable[tuple[str, Extent]]], dict[str, Tensor]] = read_tensors
    ) -> dict[str, Tensor]:
        """The tensors of a quantized layer by suffix, as its format stores them, whatever the layout.

        Args:
            read: reads, or maps, those that lie in the file as the format stores them.
        """
        storage = self.packed[layer]
        suffixes = storage.format.stored(storage.shape)
        if all(f"{layer}.{suffix}" in self.extents for suffix in suffixes):
            return read((suffix, self.extents[f"{layer}.{suffix}"]) for suffix in suffixes)
        return storage.format.to_stored(self.read_quantized(layer))

    def stored_as(self, name: str) -> str:
        storage = self.packed.get(name.removesuffix(".weight"))
        return super().stored_as(name) if storage is None else storage.format.name

    def bits_per_weight(self) -> float:
        return self._bits(f"{layer}.weight" for layer in self.quantized)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        tensors = super()._read([name for name in names if name.removesuffix(".weight") not in self.packed])
        for name in names:
            layer = name.removesuffix(".weight")
            if layer in self.packed:
                dense = self.read_quantized(layer).dense()
                tensors[name] = dense.T.contiguous() if self._turned(layer) else dense
        return {name: tensors[name] for name in names}

    def _turned(self, layer: str) -> bool:
        """Whether the dense model has the weight of a quantized layer as `[in, out]`."""
        return self.family.conv1d and layer in self.quantized

    def stored_bytes(self, name: str) -> int:
        layer = name.removesuffix(".weight")
        if layer in self.packed:
            return sum(tensor.bytes for tensor in self.packed[layer].stored(layer).values())
        return super().stored_bytes(name)

    def _check(self) -> None:
        actual = super().tensors()
        for layer, storage in self.packed.items():
            if f"{layer}.weight" in actual.keys() - storage.stored(layer).keys():
                raise VerificationError(
                    f"{self.path}: {layer} has a dense weight, its config says {storage.format.name}"
                )
            for name, stored in storage.stored(layer).items():
                if name not in actual:
                    raise VerificationError(f"{self.path} has no tensor {name}", hint="copy the checkpoint again")
                if actual[name] != stored:
                    raise VerificationError(
                        f"{self.path}: {name} is {_describe(actual[name])}, its config says {_describe(stored)}"
                    )
        known = {name for layer, storage in self.packed.items() for name in storage.stored(layer)}
        linears = {layer for layer, _, _ in self._linear_names()}
        surplus = [name for name in actual if name not in known and _is_quantized(name, linears)]
        if surplus:
            raise VerificationError(f"{self.path}: {surplus[0]} belongs to no quantized layer of its config")


def _is_quantized(name: str, linears: Container[str]) -> bool:
    """Whether only quantized layers have a tensor of this name: it is a linear layer's, and neither weight nor bias."""
    owner, _, part = name.rpartition(".")
    return "weight_" in part or (owner in linears and part not in ("weight", "bias"))


def _describe(stored: StoredTensor) -> str:
    return f"{stored.dtype} {list(stored.shape)}"
