"""`gptq`: integers with a scale and zero point for each group of inputs (AutoGPTQ, GPTQModel, optimum).

A 32-bit word holds codes of consecutive inputs of one output. `g_idx` has the group of each input, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from qcli.models.encoding import Decoded, Encoding, float_dtype, part
from qcli.utils.safetensors import Extent

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GPTQ"]

_CODES = ".qweight"
_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # the first stores zero points minus one


class GPTQ(Encoding):
    """Layers of AutoGPTQ and its successors."""

    method: ClassVar[str] = "gptq"

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        super().__init__(config, dtype)
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        if layout not in _OFFSETS:
            raise self.unread(f"checkpoint_format {layout!r}", " and ".join(_OFFSETS))
        self._offset = _OFFSETS[layout]

    @property
    def description(self) -> str:
        return f"gptq, {self.config.get('bits')} bits in groups of {self.config.get('group_size')}"

    def weights(self, stored: Mapping[str, Extent]) -> Iterator[tuple[str, Decoded, list[str]]]:
        for name in stored:
            if not name.endswith(_CODES):
                continue
            layer = name.removesuffix(_CODES)
            names = {role: f"{layer}.{role}" for role in ("qweight", "qzeros", "scales")}
            if f"{layer}.g_idx" in stored:
                names["g_idx"] = f"{layer}.g_idx"
            parts = {role: part(stored, full) for role, full in names.items()}
            words, rows = self._matrix(layer, parts["qweight"])
            groups, _ = self._matrix(layer, parts["scales"])
            columns = self._columns(layer, parts)
            bits = words * 32 // columns
            shapes = {role: extent.stored.shape for role, extent in parts.items()}
            fit = bits in range(1, 9) and words * 32 == bits * columns and shapes["scales"] == (groups, rows)
            if not fit or shapes["qzeros"] != (groups, -(-rows * bits // 32)):
                raise self.malformed(layer)
            decode = partial(_decode, bits=bits, size=-(-columns // groups), offset=self._offset)
            dtype = float_dtype(parts["scales"], self.dtype)
            weight = f"{layer}.weight"
            yield weight, self.weight(weight, (rows, columns), parts, decode, dtype=dtype), list(names.values())

    def _matrix(self, layer: str, extent: Extent) -> tuple[int, int]:
        if len(extent.stored.shape) != 2 or 0 in extent.stored.shape:
            raise self.malformed(layer)
        rows, columns = extent.stored.shape
        return rows, columns

    def _columns(self, layer: str, parts: Mapping[str, Extent]) -> int:
        """Number of inputs; from the config where the layer does not say it itself."""
        if "g_idx" in parts and len(parts["g_idx"].stored.shape) == 1:
            return parts["g_idx"].stored.shape[0]
        bits, size = self.config.get("bits"), self.config.get("group_size")
        groups, words = parts["scales"].stored.shape[0], parts["qweight"].stored.shape[0]
        if isinstance(size, int) and size > 0 and (words * 32) % (groups * size) == 0 and "g_idx" not in parts:
            return groups * size  # also where a layer has bits of its own
        if not isinstance(bits, int) or not 1 <= bits <= 8 or "g_idx" in parts:
            raise self.malformed(layer)
        return words * 32 // bits


def _decode(parts: dict[str, Tensor], bits: int, size: int, offset: int) -> Tensor:
    from qcli.core import packing
    from qcli.models.encodings._numbers import dequantize, in_groups, unpack_down

    scales = parts["scales"].T
    columns = parts["qweight"].shape[0] * 32 // bits
    groups = parts["g_idx"].long() if "g_idx" in parts else in_groups(columns, size)
    if int(groups.min()) < 0 or int(groups.max()) >= scales.shape[1]:
        raise ValueError("groups that have no scale")
    zeros = packing.unpack_bits(parts["qzeros"], bits, len(scales)).T.float() + offset
    return dequantize(unpack_down(parts["qweight"], bits, columns).float(), scales, groups, zeros)
