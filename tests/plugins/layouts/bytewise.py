"""Ternary layers with a signed byte per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcli.core.activations import Activations
from qcli.models.quantized import LayerStorage, QuantizedSource
from qcli.utils import registry
from qcli.utils.dtypes import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["BytewiseSource"]


def tensors(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors on disk."""
    import torch

    return {f"{layer}.levels": weight.codes.to(torch.int8) - 1, f"{layer}.scale": weight.tables["scale"]}


def quantization_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What `config.json` says."""
    return {"quant_method": "bytewise", "shapes": {name: list(shape) for name, shape in shapes.items()}}


class BytewiseSource(QuantizedSource):
    """A folder in this layout."""

    def _storage_config(self, config: dict[str, Any]) -> _StorageConfig:
        return _StorageConfig(config["shapes"])


class _StorageConfig:
    activations: Activations | None = None

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self._shapes = shapes

    def layer(self, name: str) -> LayerStorage | None:
        if name not in self._shapes:
            return None
        rows, columns = self._shapes[name]
        return _LayerStorage(registry.load("qcli.core.formats", "ternary")(), (rows, columns))


class _LayerStorage(LayerStorage):
    def stored(self, layer: str) -> dict[str, StoredTensor]:
        return {
            f"{layer}.levels": StoredTensor("I8", self.shape),
            f"{layer}.scale": StoredTensor("F16", (self.shape[0], 1)),
        }

    def restore(self, layer: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        import torch

        from qcli.core.weight import QuantizedWeight

        codes = (tensors[f"{layer}.levels"] + 1).to(torch.uint8)
        return QuantizedWeight(self.format, self.shape, codes, {"scale": tensors[f"{layer}.scale"]})
