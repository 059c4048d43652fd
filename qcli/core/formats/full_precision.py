"""Weights as they are: for layers of which only the inputs are quantized (W16A8).

There are no codes. The weight is the format's one table, so that loading, simulation of quantized inputs, verification
and evaluation treat such layers as they treat all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qcli.core.formats._tables import check_tables
from qcli.core.weight import Format
from qcli.utils.dtypes import DTYPES, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["FullPrecision"]

WEIGHT = "weight_full"
FloatDType = Literal["F32", "F16", "BF16"]


class FullPrecision(Format):
    """A weight in floating point.

    Tables: `weight_full` `[out, in]` in `dtype`. Codes are all 0, take no memory and are not stored.
    """

    name: ClassVar[str] = "full-precision"

    bits: int = Field(ge=16, le=32)
    dtype: FloatDType

    @classmethod
    def of(cls, dtype: FloatDType) -> Self:
        """The format for weights of safetensors' dtype `dtype`."""
        return cls(bits=8 * DTYPES[dtype].bytes, dtype=dtype)

    @model_validator(mode="after")
    def _bits_of_dtype(self) -> Self:
        if self.bits != 8 * DTYPES[self.dtype].bytes:
            raise ValueError(f"bits is {self.bits}, {self.dtype} has {8 * DTYPES[self.dtype].bytes}")
        return self

    @property
    def rounds(self) -> bool:
        return False

    def hold(self, weight: Tensor) -> QuantizedWeight:
        """The weight, float `[out, in]`, in this format."""
        tables = {WEIGHT: weight.to(self.stored((1, 1))[WEIGHT].torch_dtype)}
        return self.from_stored(tables, (weight.shape[0], weight.shape[1]))

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        return {WEIGHT: StoredTensor(self.dtype, shape)}

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {WEIGHT: weight.tables[WEIGHT].contiguous()}

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        from qcli.core.weight import QuantizedWeight

        table = tensors[WEIGHT]
        return QuantizedWeight(self, shape, self.encode(table, {}), {WEIGHT: table})

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        return torch.zeros(1, 1, dtype=torch.uint8, device=weight.device).expand(weight.shape)

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        # A copy, as of every format: transformers initializes the weights of linear layers in place before it loads.
        return tables[WEIGHT].to(torch.float32, copy=True)

    def table_units(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}  # the weight is not trained

    @property
    def column_step(self) -> int:
        return 1

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        return self, {WEIGHT: tables[WEIGHT][rows, columns]}

    def check(self, weight: QuantizedWeight) -> None:
        check_tables(weight.tables, self.stored(weight.shape))

    @property
    def largest_weight(self) -> float:
        return inf
