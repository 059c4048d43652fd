"""`modelopt`: fp8 with a scale for the matrix, rows or blocks, and NVFP4, as NVIDIA publishes models.

NVFP4 has an fp8 scale for every 16 inputs of an output, and one in float32 for the matrix, which multiplies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from qcli.models.encoding import Decoded, Encoding, part
from qcli.utils.safetensors import Extent

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModelOpt"]

_SCALE, _OUTER, _INPUTS = ".weight_scale", ".weight_scale_2", ".pre_quant_scale"
_FP4_GROUP = 16


class ModelOpt(Encoding):
    """Layers of NVIDIA's Model Optimizer."""

    method: ClassVar[str] = "modelopt"
    unused: ClassVar[tuple[str, ...]] = (".input_scale", ".k_scale", ".v_scale", ".output_scale")

    @property
    def description(self) -> str:
        return f"{self.method}, {self.config.get('quant_algo', 'fp8')}"

    def weights(self, stored: Mapping[str, Extent]) -> Iterator[tuple[str, Decoded, list[str]]]:
        for name in stored:
            if name.endswith(_INPUTS):
                raise self.unread("scales of inputs", "fp8 and NVFP4 without them")
            if not name.endswith(_SCALE):
                continue
            layer = name.removesuffix(_SCALE)
            weight = f"{layer}.weight"
            names = {"weight": weight, "scale": name}
            dtype, shape = part(stored, weight).stored
            if len(shape) != 2 or 0 in shape or dtype not in ("U8", "F8_E4M3"):
                raise self.malformed(weight)
            rows, columns = shape
            if dtype == "U8":
                names["outer"], columns = f"{layer}{_OUTER}", 2 * columns
            parts = {role: part(stored, full) for role, full in names.items()}
            grid = self._grid(weight, (rows, columns), parts["scale"].stored.shape, packed=dtype == "U8")
            decode = partial(_decode, grid=grid)
            yield weight, self.weight(weight, (rows, columns), parts, decode), list(names.values())

    def _grid(self, weight: str, shape: tuple[int, int], scales: tuple[int, ...], *, packed: bool) -> tuple[int, int]:
        """Rows and columns of scales; only those of blocks have more than one column."""
        rows, columns = shape
        sizes = tuple(size for size in scales if size > 1)
        if not packed and sizes in ((), (rows,)):
            return (sizes[0] if sizes else 1), 1
        grid = scales if len(scales) == 2 else sizes
        if len(grid) != 2 or rows % grid[0] or columns % grid[1]:
            raise self.malformed(weight)
        if packed and grid != (rows, columns // _FP4_GROUP):
            raise self.malformed(weight)
        return grid[0], grid[1]


def _decode(parts: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
    import torch

    from qcli.models.encodings._numbers import dequantize, in_groups, unpack_fp4

    weight, scales = parts["weight"], parts["scale"].float().view(grid)
    values = unpack_fp4(weight) if weight.dtype == torch.uint8 else weight.float()
    if "outer" in parts:
        scales = scales * parts["outer"].float().view(1, 1)
    rows, columns = values.shape
    return dequantize(values, scales, in_groups(columns, columns // grid[1]), height=rows // grid[0])
