"""The layout `gemm` of AutoAWQ: 4 bits, a scale and a zero point for each group of inputs.

A 32-bit word holds the codes of eight consecutive outputs of one input, in the order 0, 2, 4, 6, 1, 3, 5, 7. Symmetric
weights have the zero point 8 everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

__all__ = ["AWQSource"]

NAME = "awq"
BITS, PER_WORD = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs in a word, the first in the lowest bits
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs in order


def tensors(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors on disk, by full name.

    Args:
        weight: affine in 4 bits, without floating-point zero points; a multiple of eight outputs.
    """
    import torch

    format, scale = _affine(weight.format), weight.tables["weight_scale"].T.contiguous()
    zeros = (
        torch.full(scale.shape, format.center, dtype=torch.uint8)
        if format.zero_point == "none"
        else weight.tables["weight_zero_point"].T
    )
    return {
        f"{layer}.qweight": _pack(weight.codes.T),
        f"{layer}.qzeros": _pack(zeros),
        f"{layer}.scales": scale,
    }


def quantization_config(format: Affine, dense: Sequence[str]) -> dict[str, Any]:
    """The checkpoint's `quantization_config`.

    Args:
        format: of all quantized layers; zero points are stored for symmetric ones, too.
        dense: linear layers of the blocks that are not quantized, by name.
    """
    return {
        "quant_method": NAME,
        "version": "gemm",
        "bits": BITS,
        "group_size": format.group_size,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", *dense],
    }


class AWQSource(QuantizedSource):
    """A folder that `qcli pack` wrote in this layout."""

    def _storage_config(self, config: dict[str, Any]) -> _StorageConfig:
        return _StorageConfig(config, self.extents)


class _LayerStorage(LayerStorage):
    def stored(self, layer: str) -> dict[str, StoredTensor]:
        rows, columns = self.shape
        groups = _affine(self.format).groups(columns)
        return {
            f"{layer}.qweight": StoredTensor("I32", (columns, rows // PER_WORD)),
            f"{layer}.qzeros": StoredTensor("I32", (groups, rows // PER_WORD)),
            f"{layer}.scales": StoredTensor("F16", (groups, rows)),
        }

    def restore(self, layer: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        from qcli.core.weight import QuantizedWeight

        tables = {
            "weight_scale": tensors[f"{layer}.scales"].T.contiguous(),
            "weight_zero_point": _unpack(tensors[f"{layer}.qzeros"]).T.contiguous(),
        }
        codes = _unpack(tensors[f"{layer}.qweight"]).T.contiguous()
        return QuantizedWeight(self.format, self.shape, codes, tables)


class _StorageConfig:
    """The parsed `quantization_config`."""

    activations: Activations | None = None

    def __init__(self, config: Mapping[str, Any], extents: Mapping[str, Extent]) -> None:
        self._extents = extents
        try:
            self._format = Affine(bits=BITS, group_size=config["group_size"], zero_point="integer")
            expected = quantization_config(self._format, config["modules_to_not_convert"][1:])
        except (KeyError, TypeError, ValidationError):
            raise VerificationError("quantization_config is not understood") from None
        if dict(config) != expected:
            raise VerificationError("quantization_config is not what `qcli pack --format awq` writes")

    def layer(self, name: str) -> LayerStorage | None:
        """How a layer is stored, by the presence and shape of its `qweight`; None: dense."""
        if (extent := self._extents.get(f"{name}.qweight")) is None:
            return None
        if len(extent.stored.shape) != 2:
            raise VerificationError(f"{name}.qweight is not a matrix")
        columns, words = extent.stored.shape
        return _LayerStorage(self._format, (words * PER_WORD, columns))


def _pack(codes: Tensor) -> Tensor:
    """uint8 `[n, outputs]` -> int32 `[n, outputs / 8]`."""
    from qcli.core import packing

    return packing.pack_bits(codes.unflatten(1, (-1, PER_WORD))[..., list(_ORDER)].flatten(1), BITS)


def _unpack(words: Tensor) -> Tensor:
    """Inverse of `_pack`."""
    from qcli.core import packing

    codes: Tensor = packing.unpack_bits(words, BITS, words.shape[1] * PER_WORD).unflatten(1, (-1, PER_WORD))
    return codes[..., list(_PLACES)].flatten(1)


def _affine(format: object) -> Affine:
    assert isinstance(format, Affine)
    return format
