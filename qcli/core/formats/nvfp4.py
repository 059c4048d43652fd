"""Four-bit floats (E2M1) in blocks of 16: `w_hat = value * block_scale / divisor`, NVIDIA's NVFP4.

A block's scale is a float of 8 bits (E4M3). The divisor, one for the matrix, is a power of two here: scales and
weights are then exact in bfloat16, and layers that an engine fuses can be brought to one divisor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from qcli.core.formats._tables import check_tables
from qcli.core.weight import Format
from qcli.utils.dtypes import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["NVFP4"]

BLOCK = 16
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE, DIVISOR = "block_scale", "divisor"
_SIGN = 8  # in a code
_NAN = 0x7F  # E4M3


class NVFP4(Format):
    """Tables: `block_scale` uint8 `[out, in / 16]`, the bits of E4M3, positive; `divisor` float32 `[1]`."""

    name: ClassVar[str] = "nvfp4"

    bits: Literal[4] = 4

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        return {
            "weight_packed": StoredTensor("I32", (shape[0], -(-shape[1] // 8))),
            SCALE: StoredTensor("U8", (shape[0], shape[1] // BLOCK)),
            DIVISOR: StoredTensor("F32", (1,)),
        }

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        from qcli.core import packing

        tables = {name: weight.tables[name].contiguous() for name in (SCALE, DIVISOR)}
        return {"weight_packed": packing.pack_bits(weight.codes, 4), **tables}

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        from qcli.core import packing
        from qcli.core.weight import QuantizedWeight

        codes = packing.unpack_bits(tensors["weight_packed"], 4, shape[1])
        return QuantizedWeight(self, shape, codes, {name: tensors[name] for name in (SCALE, DIVISOR)})

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        values = weight.float() / _spread(tables)
        levels = torch.tensor(LEVELS, device=weight.device)
        magnitude = torch.bucketize(values.abs(), (levels[1:] + levels[:-1]) / 2)
        return torch.where(magnitude > 0, magnitude + _SIGN * (values < 0), 0).to(torch.uint8)

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        values = torch.tensor([*LEVELS, *(-level for level in LEVELS)], device=codes.device)
        return values[codes.int()] * _spread(tables)

    def step_sizes(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """To the next value towards 0, which is the nearest; of 0 to the smallest."""
        import torch

        gaps = torch.tensor(LEVELS, device=codes.device).diff()
        return gaps[(codes % _SIGN).int().sub_(1).clamp_(min=0)] * _spread(tables)

    @property
    def trains_tables(self) -> bool:
        return False

    def table_units(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}  # the scales are no floats that training could move, and the divisor stays a power of two

    def slice_rows(self, tables: Mapping[str, Tensor], rows: slice) -> Mapping[str, Tensor]:
        return {SCALE: tables[SCALE][rows], DIVISOR: tables[DIVISOR]}

    @property
    def column_step(self) -> int:
        return BLOCK

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        blocks = slice(columns.start // BLOCK, columns.stop // BLOCK)
        return self, {SCALE: tables[SCALE][rows, blocks], DIVISOR: tables[DIVISOR]}

    def check(self, weight: QuantizedWeight) -> None:
        stored = self.stored(weight.shape)
        scale, divisor = weight.tables[SCALE], weight.tables[DIVISOR]
        problems = {
            "a code does not fit 4 bits": (weight.codes > 15).any(),
            f"{SCALE} holds NaN or numbers that are not positive": ((scale == 0) | (scale >= _NAN)).any(),
            f"{DIVISOR} is not a power of two": (divisor.frexp().mantissa != 0.5).any(),
        }
        check_tables(weight.tables, {name: stored[name] for name in (SCALE, DIVISOR)}, problems)

    @property
    def largest_weight(self) -> float:
        return 1e38


def with_divisor(weight: QuantizedWeight, divisor: Tensor) -> QuantizedWeight | None:
    """The same weight with another divisor, a power of two; None: its scales would not be exact."""
    import torch

    from qcli.core.weight import QuantizedWeight

    scale = weight.tables[SCALE].view(torch.float8_e4m3fn).float()
    moved = scale * divisor / weight.tables[DIVISOR]
    nearest = moved.to(torch.float8_e4m3fn)
    if not torch.equal(nearest.float(), moved):
        return None
    tables = {SCALE: nearest.view(torch.uint8), DIVISOR: divisor}
    return QuantizedWeight(weight.format, weight.shape, weight.codes, tables)


def _spread(tables: Mapping[str, Tensor]) -> Tensor:
    """The scale of each weight, float32 `[out, in]`."""
    import torch

    scale = tables[SCALE].contiguous().view(torch.float8_e4m3fn).float() / tables[DIVISOR]
    return scale.repeat_interleave(BLOCK, 1)
