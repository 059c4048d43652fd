"""The original GPTQ layout (AutoGPTQ, `checkpoint_format: gptq`), for symmetric weights.

A 32-bit word holds the codes of consecutive inputs of one output. Zero points are stored minus one, as this version of
the layout requires; columns are in their original order, so `g_idx` is ascending.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qcli.core.activations import Activations
from qcli.core.formats.affine import Affine
from qcli.models.quantized import LayerStorage, QuantizedSource
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError
from qcli.utils.safetensors import Extent

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["GPTQSource"]

NAME = "gptq"


def tensors(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors on disk, by full name.

    Args:
        weight: symmetric; its rows and columns of codes fill whole words.
    """
    import torch

    from qcli.core import packing

    format = _affine(weight.format)
    scale = weight.tables["weight_scale"].T.contiguous()
    return {
        f"{layer}.qweight": packing.pack_bits(weight.codes, format.bits).T.contiguous(),
        f"{layer}.qzeros": _zeros(format, scale.shape),
        f"{layer}.scales": scale,
        f"{layer}.g_idx": format.groups_of(torch.arange(weight.shape[1])).int(),
    }


def quantization_config(format: Affine) -> dict[str, Any]:
    """The checkpoint's `quantization_config`: one format for all layers."""
    return {
        "quant_method": NAME,
        "checkpoint_format": "gptq",
        "bits": format.bits,
        "group_size": format.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }


class GPTQSource(QuantizedSource):
    """A folder that `qcli pack` wrote in this layout."""

    def _storage_config(self, config: dict[str, Any]) -> _StorageConfig:
        return _StorageConfig(config, self.extents)


class _LayerStorage(LayerStorage):
    def stored(self, layer: str) -> dict[str, StoredTensor]:
        rows, columns = self.shape
        format = _affine(self.format)
        groups = format.groups(columns)
        return {
            f"{layer}.qweight": StoredTensor("I32", (columns * format.bits // 32, rows)),
            f"{layer}.qzeros": StoredTensor("I32", (groups, rows * format.bits // 32)),
            f"{layer}.scales": StoredTensor("F16", (groups, rows)),
            f"{layer}.g_idx": StoredTensor("I32", (columns,)),
        }

    def restore(self, layer: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        import torch

        from qcli.core import packing
        from qcli.core.weight import QuantizedWeight

        format, scale = _affine(self.format), tensors[f"{layer}.scales"]
        groups = format.groups_of(torch.arange(self.shape[1]))
        if not torch.equal(tensors[f"{layer}.qzeros"], _zeros(format, scale.shape)):
            raise VerificationError(f"{layer}.qzeros differs from that of symmetric weights")
        if not torch.equal(tensors[f"{layer}.g_idx"].long(), groups):
            raise VerificationError(f"{layer}.g_idx is not that of columns in their original order")
        codes = packing.unpack_bits(tensors[f"{layer}.qweight"].T.contiguous(), format.bits, self.shape[1])
        return QuantizedWeight(format, self.shape, codes, {"weight_scale": scale.T.contiguous()})


class _StorageConfig:
    """The parsed `quantization_config`."""

    activations: Activations | None = None

    def __init__(self, config: Mapping[str, Any], extents: Mapping[str, Extent]) -> None:
        self._extents = extents
        try:
            self._format = Affine(bits=config["bits"], group_size=config["group_size"], zero_point="none")
        except (KeyError, ValidationError):
            raise VerificationError("quantization_config is not understood") from None
        if dict(config) != quantization_config(self._format):
            raise VerificationError("quantization_config is not what `qcli pack --format gptq` writes")

    def layer(self, name: str) -> LayerStorage | None:
        """How a layer is stored, by the presence and shape of its `qweight`; None: dense."""
        if (extent := self._extents.get(f"{name}.qweight")) is None:
            return None
        if len(extent.stored.shape) != 2:
            raise VerificationError(f"{name}.qweight is not a matrix")
        words, rows = extent.stored.shape
        return _LayerStorage(self._format, (rows, words * 32 // self._format.bits))


def _zeros(format: Affine, shape: tuple[int, ...]) -> Tensor:
    """Packed zero points for scales `[groups, out]`: the center of the grid, minus one, in every entry."""
    import torch

    from qcli.core import packing

    return packing.pack_bits(torch.full(shape, format.center - 1, dtype=torch.uint8), format.bits)


def _affine(format: object) -> Affine:
    assert isinstance(format, Affine)
    return format
