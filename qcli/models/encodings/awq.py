"""`awq`: four-bit integers with a scale and zero point for each group of inputs (AutoAWQ, layout `gemm`).

A 32-bit word holds the codes of eight outputs of one input, in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qcli.models.encoding import Decoded, Encoding, float_dtype, part
from qcli.utils.safetensors import Extent

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AWQ"]

_CODES = ".qweight"
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of outputs in order
_PER_WORD = 8


class AWQ(Encoding):
    """Layers of AutoAWQ."""

    method: ClassVar[str] = "awq"

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        super().__init__(config, dtype)
        version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise self.unread(f"version {version!r} of {bits!r} bits", "version 'gemm' of 4 bits")

    @property
    def description(self) -> str:
        return f"awq, 4 bits in groups of {self.config.get('group_size', self.config.get('q_group_size'))}"

    def weights(self, stored: Mapping[str, Extent]) -> Iterator[tuple[str, Decoded, list[str]]]:
        for name in stored:
            if not name.endswith(_CODES):
                continue
            layer = name.removesuffix(_CODES)
            names = {role: f"{layer}.{role}" for role in ("qweight", "qzeros", "scales")}
            parts = {role: part(stored, full) for role, full in names.items()}
            shapes = [extent.stored.shape for extent in parts.values()]
            if any(len(shape) != 2 or 0 in shape for shape in shapes):
                raise self.malformed(layer)
            (columns, words), zeros, (groups, rows) = shapes
            if rows != words * _PER_WORD or zeros != (groups, words) or columns % groups:
                raise self.malformed(layer)
            dtype = float_dtype(parts["scales"], self.dtype)
            weight = f"{layer}.weight"
            yield weight, self.weight(weight, (rows, columns), parts, _decode, dtype=dtype), list(names.values())


def _decode(parts: dict[str, Tensor]) -> Tensor:
    from qcli.models.encodings._numbers import dequantize, in_groups

    scales, codes = parts["scales"].T, _unpack(parts["qweight"])
    columns = codes.shape[1]
    groups = in_groups(columns, columns // scales.shape[1])
    return dequantize(codes.float(), scales, groups, _unpack(parts["qzeros"]))


def _unpack(words: Tensor) -> Tensor:
    """Codes of eight outputs a word, in their order: int32 `[n, words]` -> uint8 `[8 words, n]`."""
    from qcli.core import packing

    codes = packing.unpack_bits(words, 4, words.shape[1] * _PER_WORD)
    return codes.view(len(words), -1, _PER_WORD)[..., list(_PLACES)].flatten(1).T
