"""Eight-bit floats (E4M3) with a scale for each row: `w_hat = scale * value`, as engines compute them on new GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from qcli.core.formats._tables import check_tables
from qcli.core.weight import Format
from qcli.utils.dtypes import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["FP8"]

LARGEST = 448.0
_MAGNITUDE = 0x7F  # of a code, without its sign; as a magnitude it is NaN
SCALE = "weight_scale"


class FP8(Format):
    """Tables: `weight_scale` bfloat16 `[out, 1]`, which float16 may be too small for. Codes are the bits of E4M3."""

    name: ClassVar[str] = "fp8"

    bits: Literal[8] = 8

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        return {
            "weight_packed": StoredTensor("I32", (shape[0], -(-shape[1] // 4))),
            SCALE: StoredTensor("BF16", (shape[0], 1)),
        }

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        from qcli.core import packing

        return {"weight_packed": packing.pack_bits(weight.codes, 8), SCALE: weight.tables[SCALE].contiguous()}

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        from qcli.core import packing
        from qcli.core.weight import QuantizedWeight

        codes = packing.unpack_bits(tensors["weight_packed"], 8, shape[1]).contiguous()
        return QuantizedWeight(self, shape, codes, {SCALE: tensors[SCALE]})

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        values = (weight.float() / tables[SCALE].float()).clamp_(-LARGEST, LARGEST)
        return values.to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return _values(codes) * tables[SCALE].float()

    def step_sizes(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """To the next value towards 0, which is the nearest; of 0 to the smallest."""
        magnitude = codes & _MAGNITUDE
        next_one = (magnitude.int() - 1).abs().to(codes.dtype)
        return (_values(magnitude) - _values(next_one)).abs() * tables[SCALE].float().abs()

    @property
    def column_step(self) -> int:
        return 1

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        return self, {SCALE: tables[SCALE][rows]}

    def check(self, weight: QuantizedWeight) -> None:
        problems = {"a code is NaN": (weight.codes & _MAGNITUDE == _MAGNITUDE).any()}
        check_tables(weight.tables, {SCALE: self.stored(weight.shape)[SCALE]}, problems)

    @property
    def largest_weight(self) -> float:
        return 1e38


def _values(codes: Tensor) -> Tensor:
    import torch

    return codes.contiguous().view(torch.float8_e4m3fn).float()
