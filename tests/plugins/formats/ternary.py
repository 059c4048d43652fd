"""Three levels per row: `w_hat = scale * (code - 1)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from qcli.core.weight import Format
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["Ternary"]


class Ternary(Format):
    """Tables: `scale` float16 `[out, 1]`."""

    name: ClassVar[str] = "ternary"

    bits: Literal[2] = 2

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        return {
            "weight_packed": StoredTensor("I32", (shape[0], -(-shape[1] // 16))),
            "scale": StoredTensor("F16", (shape[0], 1)),
        }

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        from qcli.core import packing

        return {"weight_packed": packing.pack_bits(weight.codes, 2), "scale": weight.tables["scale"]}

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        from qcli.core import packing
        from qcli.core.weight import QuantizedWeight

        codes = packing.unpack_bits(tensors["weight_packed"], 2, shape[1])
        return QuantizedWeight(self, shape, codes, {"scale": tensors["scale"]})

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        return (1 + weight.float() / tables["scale"].float()).round().clamp(0, 2).to(torch.uint8)

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return (codes.float() - 1) * tables["scale"].float()

    @property
    def column_step(self) -> int:
        return 1

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        return self, {"scale": tables["scale"][rows]}

    def check(self, weight: QuantizedWeight) -> None:
        if int(weight.codes.max()) > 2:
            raise VerificationError("a code is not one of three levels")
