"""`bitsandbytes`: four-bit codes of a table with a scale for each block (`nf4`, `fp4`), or eight bits by row.

Blocks run through the matrix as one vector. Their scales may themselves be codes of a table, in larger blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from qcli.models.encoding import Decoded, Encoding, part
from qcli.utils.dtypes import STORED_NAME
from qcli.utils.files import parse_json
from qcli.utils.safetensors import Extent, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BitsAndBytes"]

_STATE, _ROWS = ".quant_state.bitsandbytes__", ".SCB"
_TYPES = ("nf4", "fp4")
_LEVELS = 127


class BitsAndBytes(Encoding):
    """Layers of bitsandbytes."""

    method: ClassVar[str] = "bitsandbytes"
    unused: ClassVar[tuple[str, ...]] = (".weight_format",)

    @property
    def description(self) -> str:
        if not self.config.get("load_in_4bit", self.config.get("_load_in_4bit")):
            return "bitsandbytes, 8 bits by row"
        return f"bitsandbytes, {self.config.get('bnb_4bit_quant_type', 'fp4')}"

    def weights(self, stored: Mapping[str, Extent]) -> Iterator[tuple[str, Decoded, list[str]]]:
        for name in stored:
            if _STATE in name:
                yield self._four_bits(stored, *name.split(_STATE))
            elif name.endswith(_ROWS):
                yield self._eight_bits(stored, f"{name.removesuffix(_ROWS)}.weight", name)

    def _eight_bits(self, stored: Mapping[str, Extent], weight: str, scale: str) -> tuple[str, Decoded, list[str]]:
        parts = {"weight": part(stored, weight), "scale": stored[scale]}
        dtype, shape = parts["weight"].stored
        if dtype != "I8" or len(shape) != 2 or parts["scale"].stored.shape not in ((shape[0],), (shape[0], 1)):
            raise self.malformed(weight)
        return weight, self.weight(weight, shape, parts, _decode_rows), [weight, scale]

    def _four_bits(self, stored: Mapping[str, Extent], weight: str, kind: str) -> tuple[str, Decoded, list[str]]:
        if kind not in _TYPES:
            raise self.unread(f"the type {kind!r}", " and ".join(_TYPES))
        state_name = f"{weight}{_STATE}{kind}"
        names = {"weight": weight, "absmax": f"{weight}.absmax", "table": f"{weight}.quant_map"}
        state = self._state(weight, stored[state_name])
        if state["nested"]:
            names |= {"nested_absmax": f"{weight}.nested_absmax", "nested_table": f"{weight}.nested_quant_map"}
        parts = {role: part(stored, full) for role, full in names.items()}
        shape, block = state["shape"], state["blocksize"]
        if parts["weight"].bytes != -(-prod(shape) // 2) or prod(parts["absmax"].stored.shape) != -(
            -prod(shape) // block
        ):
            raise self.malformed(weight)
        decode = partial(_decode_blocks, shape=shape, block=block, nested=state["nested"])
        decoded = self.weight(weight, shape, parts, decode, dtype=state["dtype"])
        return weight, decoded, [*names.values(), state_name]

    def _state(self, weight: str, extent: Extent) -> dict[str, Any]:
        """Shape, block size, dtype, and where scales are codes, their block size and mean."""
        try:
            state = parse_json(read_bytes(extent))
            shape = tuple(int(size) for size in state["shape"])
            dtype = STORED_NAME[f"torch.{state['dtype']}"]
            nested = None
            if "nested_blocksize" in state:
                nested = int(state["nested_blocksize"]), float(state["nested_offset"])
            block = int(state["blocksize"])
            if len(shape) != 2 or min(*shape, block, *(nested or (1,))[:1]) < 1:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise self.malformed(weight) from None
        return {"shape": shape, "dtype": dtype, "blocksize": block, "nested": nested}


def _decode_rows(parts: dict[str, Tensor]) -> Tensor:
    return parts["weight"].float() * (parts["scale"].float().view(-1, 1) / _LEVELS)


def _decode_blocks(
    parts: dict[str, Tensor], shape: tuple[int, int], block: int, nested: tuple[int, float] | None
) -> Tensor:
    import torch

    scales = parts["absmax"].reshape(-1)
    if nested is not None:
        size, offset = nested
        outer = parts["nested_absmax"].float().repeat_interleave(size)[: len(scales)]
        scales = parts["nested_table"].float()[scales.int()] * outer + offset
    packed = parts["weight"].reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[: prod(shape)]
    values = parts["table"].float()[codes.int()]
    values = torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)
    values *= scales.float().unsqueeze(1)
    return values.flatten()[: prod(shape)].view(shape)
